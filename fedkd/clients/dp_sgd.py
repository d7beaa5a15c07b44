"""DP-SGD: what makes one step of the training loop differentially private for each example.

Opacus' engine wants to own model, loader and loop; here its parts (per-example gradients, the
optimizer that clips and adds noise) serve the one loop of the project, and the accounting lies with
whoever spends: a fit says which mechanism it used, how often, at which sampling rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedkd.clients.per_example import Mode, PerExample, attached
from fedkd.clients.training import Training
from fedkd.data.federated import Split
from fedkd.errors import ConfigError
from fedkd.rng import Rng

UNCLIPPED = torch.finfo(torch.float32).max


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
    mode: Mode = "hooks"
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
        if self.mode not in ("hooks", "functorch", "ghost"):
            raise ConfigError(f"DP-SGD: unknown mode {self.mode!r} (hooks, functorch, ghost)")
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
    rate = rate_of(training, len(data))
    for step in range(steps_of(training, len(data))):
        coins = torch.from_numpy(rng.child("poisson", step).numpy().random(len(data)))
        index = (coins < rate).nonzero().flatten().to(data.y.device)
        x = data.x.index_select(0, index).to(memory_format=torch.contiguous_format)
        yield x, data.y.index_select(0, index), index


@dataclass(frozen=True)
class Summands:
    """Some terms of the loss: a name and a weight for each, and their values on (x, y, index)."""

    names: Sequence[str]
    weights: Sequence[float]
    evaluate: Callable[[Tensor, Tensor, Tensor], list[Tensor]]


class PrivateStep:
    """One step: clip each example's gradient to C, sum, add N(0, (z C)^2), divide by q n, update.

    The loss of an example is the weighted sum of all ``own`` terms, so a term more does not mean a
    gradient more: the joint gradient is clipped. Terms that read no data (``apart``) get an empty
    batch, and their gradient is added after the noise. A bound on the batch's gradient
    (``Training.max_grad_norm``) then applies to what is released already: it costs nothing. An
    example whose gradient is not finite contributes nothing.

    Large batches go through memory in parts: Opacus' ``BatchMemoryManager`` does that to a loader;
    there is none here, so the optimizer is told directly to skip all updates but the last.
    """

    def __init__(
        self, gradients: PerExample, optimizer: Any, own: Summands, apart: Summands, dp: DpSgd
    ) -> None:
        self.gradients, self.optimizer = gradients, optimizer
        self.own, self.apart, self.physical = own, apart, dp.max_physical_batch_size

    def __call__(self, x: Tensor, y: Tensor, index: Tensor, max_norm: float) -> Tensor:
        """Do the step; return the sum over examples of each loss, own terms first (J,)."""
        size = self.physical or max(len(y), 1)
        parts = list(zip(x.split(size), y.split(size), index.split(size), strict=True))
        sums = torch.zeros(len(self.own.weights))
        for i, part in enumerate(parts):
            self.optimizer.zero_grad(set_to_none=True)
            sums += self._gradients(*part)
            self.optimizer.signal_skip_step(do_skip=i + 1 < len(parts))
            self.optimizer.pre_step()
        values = self._add_apart(x[:0], y[:0], index[:0])
        if max_norm:
            nn.utils.clip_grad_norm_(self.optimizer.params, max_norm)
        self.optimizer.original_optimizer.step()
        return torch.cat([sums, values * len(y)])

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
        each = torch.stack([w * v for w, v in zip(self.own.weights, losses, strict=True)]).sum(0)
        finite = self.gradients.backward(each)
        if not finite.all():
            return self._gradients(x[finite], y[finite], index[finite])
        return torch.stack([loss.detach().sum() for loss in losses]).cpu()

    def _add_apart(self, *nobody: Tensor) -> Tensor:
        """Add the gradient of terms that read no data to the noised one; return their values."""
        if not self.apart.weights:
            return torch.zeros(0)
        with self.gradients.paused():
            values = [value.mean() for value in self.apart.evaluate(*nobody)]
            total = torch.stack(
                [w * v for w, v in zip(self.apart.weights, values, strict=True)]
            ).sum()
            if total.requires_grad:
                parameters = self.optimizer.params
                found = torch.autograd.grad(total, parameters, allow_unused=True)
                for p, gradient in zip(parameters, found, strict=True):
                    if gradient is not None:
                        p.grad += gradient
        return torch.stack([value.detach() for value in values]).cpu()


@contextmanager
def private(
    parts: Sequence[nn.Module],
    optimizer: torch.optim.Optimizer,
    own: Summands,
    apart: Summands,
    dp: DpSgd,
    expected: float,
    rng: Rng,
) -> Iterator[PrivateStep]:
    """Make ``optimizer`` private over all trainable parameters of ``parts`` for a while.

    ``expected`` is q n, which divides sums in place of the realised size of a batch. Noise comes
    from ``rng.child("dp-noise")``, on and on through the steps.

    Raises:
        ConfigError: a network that has no per-example gradients.
    """
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping

    problems = [problem for part in parts for problem in dp_problems(part)]
    if problems:
        raise ConfigError("\n".join(problems))
    # Opacus multiplies norm and noise: inf times no noise would be no number.
    norm = min(dp.max_grad_norm, UNCLIPPED)
    kind = DPOptimizerFastGradientClipping if dp.mode == "ghost" else DPOptimizer
    noise = rng.child("dp-noise", dp.address).numpy()

    class Addressed(kind):  # type: ignore[misc, valid-type]
        """Draws noise from the whole 128-bit address: a torch seed on the CPU has 32 bits only."""

        def add_noise(self) -> None:
            self.noise_multiplier = 0.0
            super().add_noise()
            self.noise_multiplier = dp.noise_multiplier
            std = dp.noise_multiplier * norm
            for p in self.params if std else ():
                drawn = noise.standard_normal(p.numel(), dtype=np.float32)
                p.grad += std * torch.from_numpy(drawn).to(p).view_as(p)

    with attached(parts, dp.mode, norm) as gradients:
        noisy = Addressed(
            optimizer,
            noise_multiplier=dp.noise_multiplier,
            max_grad_norm=norm,
            expected_batch_size=expected,
            loss_reduction="mean",
        )
        yield PrivateStep(gradients, noisy, own, apart, dp)


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
