"""DP-SGD: what makes one step of the training loop differentially private for each example.

Opacus' engine wants to own model, loader and loop; here its parts (per-example gradients, the
optimizer that clips and adds noise) serve the one loop of the project, and the accounting lies with
whoever spends: a fit says which mechanism it used, how often, at which sampling rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from fedkd.clients.books.book import Books, opened, unfollowed
from fedkd.clients.lean import Update, clipped, update_for
from fedkd.clients.noise import Noise, Noised, Taker
from fedkd.clients.per_example import ByOpacus, PerExample, attached, clipping, separate
from fedkd.clients.training import Training
from fedkd.data.federated import Split
from fedkd.errors import ConfigError
from fedkd.rng import Restarted, Rng

Mode = Literal["auto", "bookkeeping", "hooks", "functorch", "ghost"]
UNCLIPPED = torch.finfo(torch.float32).max
COINS = 1 << 16
"""Coins that are tossed at once: one step at a time, most of the time goes by between them."""


@dataclass(frozen=True)
class DpSgd:
    """How one fit is made private: noise of std ``noise_multiplier * max_grad_norm`` on each sum.

    ``max_grad_norm`` bounds the L2 norm of one example's gradient of the whole loss, over all
    trained parameters. Limits: 0 and ``inf`` are plain training on Poisson batches.
    ``max_physical_batch_size`` examples are in memory at once, 0: all; the result is the same up to
    rounding. ``address`` tells the noise of one run from that of another with the same seed.

    Raises:
        ConfigError: a value out of range, or noise without a bound on what it should hide.
    """

    noise_multiplier: float
    max_grad_norm: float = 1.0
    mode: Mode = "auto"
    max_physical_batch_size: int = 0
    address: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.noise_multiplier < math.inf:
            raise ConfigError(
                f"DP-SGD: noise_multiplier = {self.noise_multiplier}: must be 0 or more, and finite"
            )
        if not self.max_grad_norm > 0:
            raise ConfigError(
                f"DP-SGD: max_grad_norm = {self.max_grad_norm}: must be above 0 (inf: no clipping)"
            )
        if self.noise_multiplier and math.isinf(self.max_grad_norm):
            raise ConfigError(
                "DP-SGD: noise is measured in units of max_grad_norm, which is inf; set "
                "privacy.dp_sgd.max_grad_norm, for instance to 1.0, or noise_multiplier = 0"
            )
        if self.mode not in get_args(Mode):
            raise ConfigError(f"DP-SGD: unknown mode {self.mode!r} ({', '.join(get_args(Mode))})")
        if self.max_physical_batch_size < 0:
            raise ConfigError("DP-SGD: max_physical_batch_size must be 0 (the whole batch) or more")


def steps_of(training: Training, n: int) -> int:
    """Return the steps of one fit on n examples: ``steps``, or ``epochs * ceil(n / batch_size)``.

    >>> steps_of(Training(epochs=2, batch_size=4), 10), steps_of(Training(steps=7), 10)
    (6, 7)
    """
    if not n:
        return 0
    return training.steps or training.epochs * math.ceil(n / training.batch_size)


def rate_of(training: Training, n: int) -> float:
    """Return the probability that an example is in a batch, ``min(1, batch_size / n)``.

    n counts as public: it also says how many steps there are.

    >>> rate_of(Training(batch_size=4), 10), rate_of(Training(batch_size=16), 10)
    (0.4, 1.0)
    """
    return min(1.0, training.batch_size / n) if n else 0.0


def poisson(data: Split, training: Training, rng: Rng) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield a batch (x, y, index) a step: each example is in it with rate q, by its own coin.

    Batches differ in size and may be empty. Inputs are row-major, as Opacus' samplers need them.
    """
    n, rate, steps = len(data), rate_of(training, len(data)), steps_of(training, len(data))
    coins, together = Restarted(), max(1, COINS // max(1, n))
    for start in range(0, steps, together):
        some = range(start, min(start + together, steps))
        drawn = np.empty((len(some), n))
        for step, row in zip(some, drawn, strict=True):
            coins.at(rng.child("poisson", step)).random(out=row)
        heads = drawn < rate
        sizes = np.count_nonzero(heads, axis=1).tolist()
        index = torch.from_numpy(heads.nonzero()[1]).to(data.y.device)
        labels = data.y.index_select(0, index)
        for y, i in zip(labels.split(sizes), index.split(sizes), strict=True):
            x = data.x.index_select(0, i).to(memory_format=torch.contiguous_format)
            yield x, y, i


@dataclass(frozen=True)
class Summands:
    """Some terms of the loss: a name and a weight for each, and their values on (x, y, index)."""

    names: Sequence[str]
    weights: Sequence[float]
    evaluate: Callable[[Tensor, Tensor, Tensor], list[Tensor]]


def weighted(losses: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the sum of losses (J x the same shape), each times its weight."""
    parts = [v if w == 1.0 else w * v for w, v in zip(weights, losses, strict=True)]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


class PrivateStep:
    """One step: clip each example's gradient to C, sum, add N(0, (z C)^2), divide by q n, update.

    The loss of an example is the weighted sum of all ``own`` terms, so a term more does not mean a
    gradient more: the joint gradient is clipped. Terms that read no data (``apart``) get an empty
    batch, and their gradient is added after the noise. A bound on the batch's gradient
    (``Training.max_grad_norm``) then applies to what is released already: it costs nothing. An
    example whose gradient is not finite contributes nothing.

    Large batches go through memory in parts: Opacus' ``BatchMemoryManager`` does that to a loader;
    there is none here, so what adds the noise is told directly which part is the last.
    """

    def __init__(
        self,
        gradients: PerExample | Books,
        taker: Taker,
        parameters: Sequence[nn.Parameter],
        update: Update,
        own: Summands,
        apart: Summands,
        physical: int,
    ) -> None:
        self.gradients, self.taker, self.parameters = gradients, taker, parameters
        self.update, self.own, self.apart, self.physical = update, own, apart, physical

    def __call__(self, x: Tensor, y: Tensor, index: Tensor, max_norm: float) -> Tensor:
        """Do the step; return the sum over examples of each loss, own terms first (J,)."""
        if self.physical and len(y) > self.physical:
            batches = zip(*(t.split(self.physical) for t in (x, y, index)), strict=True)
            first, *others = batches
        else:
            first, others = (x, y, index), []
        sums = self._gradients(*first)
        for other in others:
            self.taker.take(last=False)
            sums = sums + self._gradients(*other)
        self.taker.take(last=True)
        values = self._add_apart(x[:0], y[:0], index[:0]) if self.apart.weights else None
        released = [p.grad for p in self.parameters]
        self.update(clipped(released, max_norm) if max_norm else released)
        return sums if values is None else torch.cat([sums, values * len(y)])

    def _gradients(self, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        """Leave the gradients of a part of the batch; return its summed losses."""
        if not len(y) or not self.own.weights:
            self.gradients.nothing()
            return torch.zeros(len(self.own.weights))
        self.gradients.clear()
        try:
            losses = self.own.evaluate(x, y, index)
        except NotImplementedError:
            if not self.gradients.form():
                raise
            return self._gradients(x, y, index)
        for name, loss in zip(self.own.names, losses, strict=True):
            if loss.shape != y.shape[:1]:
                raise ConfigError(
                    f"DP-SGD: the term {name!r} returned the shape {tuple(loss.shape)} for "
                    f"{len(y)} examples; a per-example term returns one loss for each, (B,)"
                )
        finite = self.gradients.backward(weighted(losses, self.own.weights))
        if finite is not None and not finite.all():
            return self._gradients(x[finite], y[finite], index[finite])
        sums = [loss.detach().sum(0, keepdim=True) for loss in losses]
        return (sums[0] if len(sums) == 1 else torch.cat(sums)).cpu()

    def _add_apart(self, *nobody: Tensor) -> Tensor:
        """Add the gradient of terms that read no data to the noised one; return their values."""
        with self.gradients.paused():
            values = [value.mean() for value in self.apart.evaluate(*nobody)]
            total = weighted(values, self.apart.weights)
            if total.requires_grad:
                found = torch.autograd.grad(total, self.parameters, allow_unused=True)
                for p, gradient in zip(self.parameters, found, strict=True):
                    if gradient is not None:
                        p.grad = gradient if p.grad is None else p.grad + gradient
        return torch.stack([value.detach() for value in values]).cpu()


@contextmanager
def private(
    parts: Sequence[nn.Module],
    parameters: Sequence[nn.Parameter],
    training: Training,
    lr: float,
    own: Summands,
    apart: Summands,
    dp: DpSgd,
    expected: float,
    rng: Rng,
) -> Iterator[PrivateStep]:
    """Make updates of ``parameters``, the trainable ones of ``parts``, private for a while.

    ``expected`` is q n, which divides sums in place of the realised size of a batch. Noise comes
    from ``rng.child("dp-noise")``, on and on through the steps.

    Raises:
        ConfigError: a network that has no per-example gradients.
    """
    problems = [problem for part in parts for problem in dp_problems(part)]
    if problems:
        raise ConfigError("\n".join(problems))
    # Opacus multiplies norm and noise: inf times no noise would be no number.
    norm = min(dp.max_grad_norm, UNCLIPPED)
    std, address = dp.noise_multiplier * norm, rng.child("dp-noise", dp.address)
    kept = separate(parts)
    mode = _by_opacus(dp.mode, kept)
    with ExitStack() as during:
        gradients: PerExample | Books
        taker: Taker
        if mode is None:
            gradients = during.enter_context(opened(kept, norm, expected))
            taker = Noised(parameters, Noise(address, std / expected, dp.mode))
        else:
            gradients, noise = (
                during.enter_context(attached(kept, mode, norm)),
                Noise(address, std, dp.mode),
            )
            if mode == "ghost":
                taker = Noised(parameters, noise, expected)
            else:
                taker = clipping(parameters, norm, noise, expected)
        # Opacus' hooks move the weights, and an update keeps hold of where they are.
        update = update_for(training, parameters, lr)
        physical = dp.max_physical_batch_size
        yield PrivateStep(gradients, taker, parameters, update, own, apart, physical)


def _by_opacus(mode: Mode, parts: Sequence[nn.Module]) -> ByOpacus | None:
    """Return how Opacus is to find gradients; none: book-keeping does, which is faster.

    Raises:
        ConfigError: book-keeping is asked for and cannot follow a layer.
    """
    match mode:
        case "hooks" | "functorch" | "ghost":
            return mode
    strange = [layer for part in parts for layer in unfollowed(part)]
    if strange and mode == "bookkeeping":
        raise ConfigError(
            f"DP-SGD: book-keeping does not follow the layer {', '.join(strange)}; set "
            "privacy.dp_sgd.grad_sample_mode = 'auto' or 'hooks'"
        )
    return "hooks" if strange else None


def dp_problems(module: nn.Module) -> list[str]:
    """Return why ``module`` cannot be trained with DP-SGD, one sentence each; nothing: it can.

    Opacus' own check overlooks BatchNorm that is frozen or has no parameters: it mixes the examples
    of a batch all the same, and keeps running statistics of them without noise.
    """
    from opacus.validators import ModuleValidator

    found = []
    for name, layer in module.named_modules():
        kind = f"the layer {name or 'itself'!r} ({type(layer).__name__})"
        trained = any(p.requires_grad for p in layer.parameters(recurse=False))
        known = [t for t in type(layer).__mro__ if t in ModuleValidator.VALIDATORS]
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            found.append(
                f"DP-SGD: {kind} mixes the examples of a batch, also when frozen or without "
                "parameters; use GroupNorm or LayerNorm"
            )
        elif isinstance(layer, nn.modules.instancenorm._InstanceNorm) and layer.track_running_stats:
            found.append(
                f"DP-SGD: {kind} keeps running statistics of examples without noise; set "
                "track_running_stats=False"
            )
        elif any(True for _ in layer.buffers(recurse=False)):
            found.append(
                f"DP-SGD: {kind} has a buffer, which no noise covers; make it a constant of the "
                "code or a parameter"
            )
        elif trained and isinstance(layer, nn.RNNBase | nn.MultiheadAttention):
            found.append(
                f"DP-SGD: {kind} has no per-example gradients; write it over nn.Linear, as model "
                "'vit-tiny' does with attention, or take the layer of opacus.layers for it"
            )
        elif trained and known:
            found += [f"DP-SGD: {kind}: {e}" for e in ModuleValidator.VALIDATORS[known[0]](layer)]
        if vars(layer).get("inplace"):
            found.append(f"DP-SGD: {kind} changes its input in place; set inplace=False")
    once = {name for name, _ in module.named_parameters()}
    found += [
        f"DP-SGD: the parameter {name!r} is used by two layers, so the gradient of one example is "
        "undefined for it; give each layer its own"
        for name, _ in module.named_parameters(remove_duplicate=False)
        if name not in once
    ]
    return found
