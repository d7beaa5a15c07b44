"""The one local training loop of the project: every strategy trains through :func:`fit`.

Data are preloaded tensors, permuted once an epoch by an addressed stream and sliced into batches,
so there is no loader to configure wrongly and no order that depends on workers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count, islice
from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor, nn
from torch.autograd import grad

from fedkd.clients.dp_sgd import DpSgd, Summands, poisson, private, rate_of, steps_of
from fedkd.clients.lean import clipped, update_for
from fedkd.clients.tally import Tally
from fedkd.clients.training import Training, frozen
from fedkd.data.federated import Split
from fedkd.errors import ConfigError, RunError
from fedkd.models.base import BlockNet
from fedkd.rng import Rng
from fedkd.types import Arrays, DpClass

Drawn = Iterator[tuple[Tensor, Tensor, Tensor]]


@dataclass
class Batch:
    """One step's examples and what the network made of them.

    ``x`` (B, ...), ``y`` (B,), ``index`` (B,) positions in the split, ``logits`` (B, C),
    ``features`` the pooled outputs (B, d) of the blocks that some term asked for. ``weights`` are
    those of several clients, stacked (K, ...), where a :meth:`Term.merged` one is asked.
    """

    x: Tensor
    y: Tensor
    index: Tensor
    logits: Tensor
    features: dict[str, Tensor]
    weights: dict[str, Tensor] | None = None


@dataclass(frozen=True)
class Occasion:
    """One fit: which network learns from which data, and how fast.

    ``state`` is the memory of the client whose fit it is, ``{}`` on a server; ``validation`` gives
    examples of its own that nothing is trained on; None: there are none. ``rng`` is of this fit.
    """

    model: BlockNet
    data: Split
    lr: float
    rng: Rng
    state: Arrays = field(default_factory=dict)
    validation: Callable[[], Split] | None = None

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters()).device

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The number of features of each block but the head, and of classes, under ``""``."""
        self.model.eval()
        with torch.no_grad():
            names = self.model.block_names
            logits, features = self.model.forward_with_features(self.data.x[:1], names)
        return {"": logits.shape[-1]} | {n: features[n].shape[-1] for n in names}


@dataclass(frozen=True)
class Compared:
    """What a student says beside what it is taught, at the temperature of the targets.

    ``student`` (B, C) logits, already divided by T, and ``teacher`` (B, C) probabilities, of those
    examples or tokens that have a target; ``point`` is empty for the network's own output, else
    ``@`` and the block whose features are read.
    """

    student: Tensor
    teacher: Tensor
    point: str = ""


class Term(ABC):
    """One summand of the local loss: ``weight * mean over the batch`` of what it returns.

    ``dp`` says how it behaves under example-level DP: ``per-example`` terms return one value an
    example, (B,), and may be clipped one by one; ``weights-only`` terms return a scalar that does
    not depend on data; ``batch-coupled`` terms mix examples and are refused there. ``teaches``:
    it compares the network with soft targets, and says with which by :meth:`compared`.
    """

    dp: DpClass = "per-example"
    name: ClassVar[str] = "term"
    teaches: bool = False
    weight: float

    @abstractmethod
    def __call__(self, batch: Batch) -> Tensor:
        """Return the loss of each example (B,), or a scalar for ``weights-only`` terms."""

    def mean(self, batch: Batch) -> Tensor:
        """Return the mean of the losses of the batch, a scalar: what a step descends."""
        return self(batch).mean()

    def at(self) -> frozenset[str]:
        """Return the blocks whose features this term reads."""
        return frozenset()

    def modules(self) -> Sequence[nn.Module]:
        """Return trainable modules of the term's own, such as heads beside the network."""
        return ()

    def compared(self, batch: Batch) -> Compared | None:
        """Return what ``batch`` is taught and what the network says; None unless it ``teaches``."""
        return None

    def placed(self, occasion: Occasion) -> Sequence[Term]:
        """Get ready for a fit, and return the terms to train by: this one, and what it adds."""
        return (self,)

    def begins(self) -> None:  # noqa: B027
        """Take note that a private step begins, which asks for losses in parts, or not at all."""

    def keep(self, state: Arrays) -> None:  # noqa: B027
        """Write into a client's memory what this term learned in a fit, for the next one's."""

    @classmethod
    def merged(cls, terms: Sequence[Self], data: Sequence[Split]) -> Term | None:
        """Return one term for several clients' examples, in the order given; None: impossible.

        Rows of its batches come from all of them: ``batch.index`` counts through the union of
        ``data``. A ``weights-only`` term reads ``batch.weights``, (K, ...) by name, and gives (K,).
        """
        return None


@dataclass(frozen=True)
class FitResult:
    """What one call of :func:`fit` did: steps, examples seen, mean loss by name of the term.

    Terms of one name, such as the heads of several blocks, are averaged. ``agreement`` is how the
    network and what it was taught agree, where that was measured. ``private`` is what the
    data paid under DP-SGD: (noise multiplier, sampling rate, steps).
    """

    steps: int
    examples: int
    losses: dict[str, float] = field(default_factory=dict)
    private: tuple[float, float, int] | None = None
    agreement: dict[str, float] = field(default_factory=dict)


class Fitter(Protocol):
    """What trains a network as :func:`fit` does, for instance many clients' networks at once."""

    def __call__(
        self,
        model: BlockNet,
        data: Split,
        terms: Sequence[Term],
        training: Training,
        lr: float,
        rng: Rng,
        dp: DpSgd | None = None,
    ) -> FitResult:
        """Train ``model`` in place; see :func:`fit`."""


def fit(
    model: BlockNet,
    data: Split,
    terms: Sequence[Term],
    training: Training,
    lr: float,
    rng: Rng,
    dp: DpSgd | None = None,
) -> FitResult:
    """Train ``model`` in place on ``sum_j weight_j * mean_B term_j`` and return what was done.

    Batches are consecutive slices of one permutation an epoch, the last may be smaller. With
    ``training.steps`` the epochs repeat until that many steps are done. Terms of weight 0 must be
    left out by the caller; they are not evaluated as zeros.

    With ``dp`` batches are Poisson samples and each step is a
    :class:`~fedkd.clients.dp_sgd.PrivateStep`; ``losses`` are not covered by its noise.

    Raises:
        RunError: the loss is not finite, with the advice that usually mends it.
        ConfigError: there is nothing to train, or a term or network that DP-SGD cannot cover.
    """
    if len(data) == 0 or not terms:
        return FitResult(0, 0)
    if dp is not None and training.precision != "float32":
        raise ConfigError(
            f"DP-SGD with clients.training.precision = {training.precision!r}: clipping and noise "
            "are proved and tested for gradients in float32; set it to 'float32', or "
            "privacy.unit = 'client'"
        )
    parts = [model, *(module for term in terms for module in term.modules())]
    with ExitStack() as during:
        during.enter_context(frozen(model, training.frozen))
        # Two terms may share a head: each parameter is trained once.
        named = {id(p): p for part in parts for p in part.parameters() if p.requires_grad}
        if not named:
            raise ConfigError(
                "nothing to train: all parameters are frozen; take a block out of "
                "clients.training.frozen"
            )
        parameters = list(named.values())
        for part in parts:
            part.train()
        tally = Tally()
        if dp is None:
            losses = Losses(model, terms, training.precision == "bf16")
            _plain_steps(losses, _epochs(data, training, rng), parameters, training, lr, tally)
        else:
            terms, own, apart = _summands(model, terms)
            expected = rate_of(training, len(data)) * len(data)
            step = during.enter_context(
                private(parts, parameters, training, lr, own, apart, dp, expected, rng)
            )
            for x, y, index in _told(poisson(data, training, rng), terms):
                tally.add([step(x, y, index, training.max_grad_norm)], len(y), summed=True)
    # The loss of the last step says nothing about the weights that it left behind.
    sums, finite = _ending(tally, parameters)
    seen = tally.steps, tally.examples
    return finished(terms, training, lr, len(data), dp, *seen, sums, finite)


def _plain_steps(
    losses: Losses,
    drawn: Drawn,
    parameters: list[nn.Parameter],
    training: Training,
    lr: float,
    tally: Tally,
) -> None:
    """Take one gradient step a batch."""
    update, bound = update_for(training, parameters, lr), training.max_grad_norm
    for x, y, index in drawn:
        means = losses.means(x, y, index)
        parts = [
            mean if term.weight == 1.0 else mean * term.weight
            for mean, term in zip(means, losses.terms, strict=True)
        ]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        gradients = grad(total, parameters, allow_unused=True)
        update(clipped(gradients, bound) if bound else gradients)
        tally.add([mean.detach() for mean in means], y.shape[0])


def _ending(tally: Tally, parameters: Sequence[nn.Parameter]) -> tuple[list[float], bool]:
    """Return the sums of a tally and whether the weights are finite, by one look at the device."""
    sums, weights = tally.sums(), [p.detach() for p in parameters]
    norm = torch.stack(torch._foreach_norm(weights)).sum().to(sums.dtype)
    *found, size = torch.cat([sums.to(norm.device), norm[None]]).tolist()
    # A norm may overflow where no weight does: then they are looked at one by one.
    return found, math.isfinite(size) or all(bool(torch.isfinite(w).all()) for w in weights)


def finished(
    terms: Sequence[Term],
    training: Training,
    lr: float,
    n: int,
    dp: DpSgd | None,
    steps: int,
    examples: int,
    sums: Sequence[float],
    finite: bool,
) -> FitResult:
    """Return the result of a fit on ``n`` examples of which ``examples`` were seen, some again.

    ``sums`` are those of each term's loss over them; ``finite``: whether the weights are.

    Raises:
        RunError: the losses or the weights are not finite.
    """
    if not (finite and all(map(math.isfinite, sums))):
        raise RunError(
            f"training diverged: loss or weights are not finite after {steps} steps; lower "
            f"clients.training.lr (now {lr:.4g}) or set clients.training.max_grad_norm = 2.0"
        )
    by_name: dict[str, list[float]] = {}
    for term, total in zip(terms, sums if examples else (), strict=False):
        by_name.setdefault(term.name, []).append(total / examples)
    losses = {k: sum(v) / len(v) for k, v in by_name.items()}
    paid = None if dp is None else (dp.noise_multiplier, rate_of(training, n), steps)
    return FitResult(steps, examples, losses, paid)


class Losses:
    """The terms on a batch (x, y, index), as they come; without an example, no network is run.

    With ``half`` networks run in bfloat16; what they return is float32, and so are the means.
    """

    def __init__(self, model: BlockNet, terms: Sequence[Term], half: bool = False) -> None:
        self.model, self.terms, self.half = model, terms, half
        self.at = frozenset().union(*(term.at() for term in terms))

    def __call__(self, x: Tensor, y: Tensor, index: Tensor) -> list[Tensor]:
        batch = self.batch(x, y, index)
        return [term(batch) for term in self.terms]

    def means(self, x: Tensor, y: Tensor, index: Tensor) -> list[Tensor]:
        """Return the mean over the batch of each term."""
        if not self.half:
            batch = self.batch(x, y, index)
            return [term.mean(batch) for term in self.terms]
        with torch.autocast(x.device.type, torch.bfloat16):
            batch = self.batch(x, y, index)
            batch.logits = batch.logits.float()
            batch.features = {at: found.float() for at, found in batch.features.items()}
            return [term.mean(batch).float() for term in self.terms]

    def batch(self, x: Tensor, y: Tensor, index: Tensor) -> Batch:
        """Return the batch, with what the network says of it and what the terms read besides."""
        features: dict[str, Tensor] = {}
        if not y.shape[0]:
            logits = x.new_zeros(0, 0)
        elif self.at:
            logits, features = self.model.forward_with_features(x, self.at)
        else:
            logits = self.model(x)
        return Batch(x, y, index, logits, features)


def _told(drawn: Drawn, terms: Sequence[Term]) -> Drawn:
    """Yield batches, each a step, and tell the terms that it begins."""
    for batch in drawn:
        for term in terms:
            term.begins()
        yield batch


def _summands(model: BlockNet, terms: Sequence[Term]) -> tuple[list[Term], Summands, Summands]:
    """Part the terms for DP-SGD into those of single examples and those that read no data.

    Raises:
        ConfigError: a term is neither.
    """
    for term in terms:
        if term.dp not in ("per-example", "weights-only"):
            raise ConfigError(
                f"DP-SGD: the term {term.name!r} ({type(term).__name__}) is {term.dp}: its loss of "
                "one example depends on the others of the batch, so clipping each example's "
                "gradient bounds nothing; leave it out, or set privacy.unit = 'client'"
            )
    own = [term for term in terms if term.dp == "per-example"]
    apart = [term for term in terms if term.dp == "weights-only"]
    sides = [
        Summands([t.name for t in side], [t.weight for t in side], Losses(model, side))
        for side in (own, apart)
    ]
    return [*own, *apart], sides[0], sides[1]


def _epochs(data: Split, training: Training, rng: Rng) -> Drawn:
    """Yield the batches of one fit, epoch after epoch."""
    endless = (
        batch
        for epoch in count()
        for batch in batches(data, training.batch_size, rng.child("epoch", epoch))
    )
    return islice(endless, steps_of(training, len(data)))


def batches(data: Split, size: int, rng: Rng) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return one epoch of ``data`` as (x, y, index) batches in the order of ``rng``."""
    order = torch.randperm(len(data), generator=rng.torch()).to(data.y.device)
    x, y = _rows(data.x, order), data.y.index_select(0, order)
    return list(zip(x.split(size), y.split(size), order.split(size), strict=True))


def _rows(x: Tensor, order: Tensor) -> Tensor:
    """Return the examples in another order; images channels last, by one copy if they are so."""
    if x.dim() == 4 and x.shape[1] > 1:
        return x.permute(0, 2, 3, 1).index_select(0, order).permute(0, 3, 1, 2)
    x = x.index_select(0, order)
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
