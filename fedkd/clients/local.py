"""The one local training loop of the project: every strategy trains through :func:`fit`.

Data are preloaded tensors, permuted once an epoch by an addressed stream and sliced into batches,
so there is no loader to configure wrongly and no order that depends on workers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from typing import ClassVar, Literal, Protocol, Self

import torch
from torch import Tensor, nn

from fedkd.clients.dp_sgd import DpSgd, Summands, poisson, private, rate_of, steps_of
from fedkd.clients.training import Training, frozen
from fedkd.data.federated import Split
from fedkd.errors import ConfigError, RunError
from fedkd.models.base import BlockNet
from fedkd.rng import Rng

DpClass = Literal["per-example", "weights-only", "batch-coupled"]
Step = Callable[[Tensor, Tensor, Tensor, float], Tensor]


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


class Term(ABC):
    """One summand of the local loss: ``weight * mean over the batch`` of what it returns.

    ``dp`` says how it behaves under example-level DP: ``per-example`` terms return one value an
    example, (B,), and may be clipped one by one; ``weights-only`` terms return a scalar that does
    not depend on data; ``batch-coupled`` terms mix examples and are refused there.
    """

    dp: ClassVar[DpClass] = "per-example"
    name: ClassVar[str] = "term"
    weight: float

    @abstractmethod
    def __call__(self, batch: Batch) -> Tensor:
        """Return the loss of each example (B,), or a scalar for ``weights-only`` terms."""

    def at(self) -> frozenset[str]:
        """Return the blocks whose features this term reads."""
        return frozenset()

    def modules(self) -> Sequence[nn.Module]:
        """Return trainable modules of the term's own, such as heads beside the network."""
        return ()

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

    Terms of one name, such as the heads of several blocks, are averaged. ``private`` is what the
    data paid under DP-SGD: (noise multiplier, sampling rate, steps).
    """

    steps: int
    examples: int
    losses: dict[str, float] = field(default_factory=dict)
    private: tuple[float, float, int] | None = None


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
        optimizer = training.make(parameters, lr)
        for part in parts:
            part.train()
        if dp is None:
            step: Step = partial(_plain_step, Losses(model, terms), optimizer, parameters)
            drawn = _epochs(data, training, rng)
        else:
            terms, own, apart = _summands(model, terms)
            expected = rate_of(training, len(data)) * len(data)
            step = during.enter_context(private(parts, optimizer, own, apart, dp, expected, rng))
            drawn = poisson(data, training, rng)
        sums = torch.zeros(len(terms))
        steps = examples = 0
        for x, y, index in drawn:
            sums += step(x, y, index, training.max_grad_norm)
            steps, examples = steps + 1, examples + len(y)
    # The loss of the last step says nothing about the weights that it left behind.
    finite = torch.stack([torch.isfinite(p).all() for p in parameters]).all()
    if not (finite and torch.isfinite(sums).all()):
        raise RunError(
            f"training diverged: loss or weights are not finite after {steps} steps; lower "
            f"clients.training.lr (now {lr:.4g}) or set clients.training.max_grad_norm = 2.0"
        )
    by_name: dict[str, list[float]] = {}
    for term, mean in zip(terms, (sums / examples).tolist() if examples else (), strict=False):
        by_name.setdefault(term.name, []).append(mean)
    losses = {k: sum(v) / len(v) for k, v in by_name.items()}
    paid = None if dp is None else (dp.noise_multiplier, rate_of(training, len(data)), steps)
    return FitResult(steps, examples, losses, paid)


class Losses:
    """The terms on a batch (x, y, index), as they come; without an example, no network is run."""

    def __init__(self, model: BlockNet, terms: Sequence[Term]) -> None:
        self.model, self.terms = model, terms
        self.at = frozenset().union(*(term.at() for term in terms))

    def __call__(self, x: Tensor, y: Tensor, index: Tensor) -> list[Tensor]:
        features: dict[str, Tensor] = {}
        if not len(y):
            logits = x.new_zeros(0, 0)
        elif self.at:
            logits, features = self.model.forward_with_features(x, self.at)
        else:
            logits = self.model(x)
        batch = Batch(x, y, index, logits, features)
        return [term(batch) for term in self.terms]


def _plain_step(
    evaluate: Losses,
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    x: Tensor,
    y: Tensor,
    index: Tensor,
    max_norm: float,
) -> Tensor:
    """Take one gradient step; return the sum over examples of each term's loss (J,)."""
    losses = [loss.mean() for loss in evaluate(x, y, index)]
    total = losses[0] * evaluate.terms[0].weight
    for loss, term in zip(losses[1:], evaluate.terms[1:], strict=True):
        total = total + loss * term.weight
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    if max_norm:
        nn.utils.clip_grad_norm_(parameters, max_norm)
    optimizer.step()
    return torch.stack([loss.detach() for loss in losses]).cpu() * len(y)


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


def _epochs(data: Split, training: Training, rng: Rng) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
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
    x = data.x.index_select(0, order)
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    y = data.y.index_select(0, order)
    return list(zip(x.split(size), y.split(size), order.split(size), strict=True))
