"""What a strategy sees on the client's side: its data, its memory, its networks, the one loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedkd.clients.agreeing import agreement
from fedkd.clients.dp_sgd import DpSgd
from fedkd.clients.local import FitResult, Fitter, Occasion, Term, fit
from fedkd.clients.training import Training
from fedkd.data.federated import ClientData, Split
from fedkd.errors import RunError
from fedkd.models.base import BlockNet
from fedkd.models.book import ModelBook
from fedkd.rng import Rng, stream
from fedkd.types import Arrays, ClientInfo, Metrics, Task

Predictor = Callable[[Tensor], dict[str, Tensor]]
"""Maps inputs (B, ...) to logits or log-probabilities (B, C) by name of the predictor."""


@dataclass
class Client:
    """One simulated client in one round.

    ``state`` is the client's memory: arrays that it keeps between rounds and never sends by itself.
    It is saved with every checkpoint. ``round`` counts from 1; it is 0 before the first.
    ``attempt`` is above 0 where rounds that somebody may have seen are played again: all draws of
    such a round are fresh.
    ``public`` is the public pool that the server and every client hold, where there is one.

    Under a privacy plan ``dp`` makes :meth:`fit` on own data private, ``release`` noises knowledge
    beside weights, and ``spent`` lists what own data paid in this round, as (noise multiplier,
    sampling rate, steps). ``temperatures`` (n,) of own training examples and
    ``public_temperatures`` (Q,) of the pool belong to ``swing``. ``fitter`` is the one loop, or
    what an executor has for it. ``noted`` are metrics that its fits leave, beside what a strategy
    says of them.
    """

    info: ClientInfo
    data: ClientData
    state: Arrays
    book: ModelBook
    training: Training
    seed: int
    round: int
    rounds: int
    device: torch.device | str = "cpu"
    public: Split | None = None
    dp: DpSgd | None = None
    release: Any = None
    spent: list[tuple[float, float, int]] = field(default_factory=list)
    temperatures: Tensor | None = None
    public_temperatures: Tensor | None = None
    swing: Any = None
    fitted: set[str] = field(default_factory=set)
    fitter: Fitter = fit
    attempt: int = 0
    noted: Metrics = field(default_factory=dict)

    @property
    def task(self) -> Task:
        """What is learned."""
        return self.book.task

    def rng(self, *purpose: str | int) -> Rng:
        """Return this client's stream for a purpose in this round."""
        again = (f"#{self.attempt}",) if self.attempt else ()
        return stream(self.seed, *purpose, self.round, self.info.id, *again)

    def model(self, *sources: Arrays) -> BlockNet:
        """Return this client's network: initial weights, overwritten by each source in turn."""
        return self.book.make(self.info.model, *sources, device=self.device)

    def fit(
        self,
        model: BlockNet,
        terms: Sequence[Term],
        purpose: str = "local",
        training: Training | None = None,
        data: Split | None = None,
    ) -> FitResult:
        """Train ``model`` in place through the one loop, on its training data or ``data``.

        Calls with another ``purpose`` draw other batches and leave the first ones as they are. On
        its own training data it goes by ``dp``, where there is one, and notes what that cost; other
        ``data`` must be public. In the last round it notes how the network and what it was taught
        agree.
        """
        training = training or self.training
        lr = training.lr_at(self.round, self.rounds)
        chosen = self.data.train if data is None else data
        mine = self.data.train
        # Rows are asked for only where they tell something: a stack may never need them here.
        dp = self.dp
        if dp is not None and chosen is not mine and chosen.x is not mine.x:
            dp = None
        if dp is not None:
            if purpose in self.fitted:
                raise RunError(
                    f"a client trains twice as {purpose!r} in one round: both fits would draw the "
                    "same coins and noise; give each call of fit its own purpose"
                )
            self.fitted.add(purpose)
        rng = self.rng(purpose)
        if len(chosen):
            on = Occasion(model, chosen, lr, rng, self.state, lambda: self.data.validation)
            terms = [term for given in terms for term in given.placed(on)]
        result = self.fitter(model, chosen, terms, training, lr, rng, dp)
        if result.private is not None:
            self.spent.append(result.private)
        for term in terms:
            term.keep(self.state)
        if self.round == self.rounds:
            self.noted |= agreement(model, chosen, terms)
        return result

    def epochs(self, epochs: int) -> Training:
        """Return this client's training options with another number of local epochs."""
        return replace(self.training, epochs=epochs, steps=0)


@dataclass(frozen=True)
class Update:
    """What local work gives back: what travels, and what the client would predict with right now.

    ``predictor`` is judged on the client as the read-out ``own``; only ``arrays`` and ``metrics``
    leave it.
    """

    arrays: Arrays
    predictor: Predictor
    metrics: Metrics = field(default_factory=dict)


class ByNetworks:
    """A predictor that follows from networks alone: with equal parameters it answers alike.

    ``rule`` names how it does, and whatever else an answer depends on; a client's predictors of one
    rule and equal ``networks``, in this order, are taken for one. They are put in evaluation mode
    when they are first asked for: most clients are not judged in most rounds.
    """

    def __init__(self, rule: str, networks: Sequence[nn.Module], predict: Predictor) -> None:
        self.rule, self._networks, self._predict = rule, tuple(networks), predict
        self._ready = False

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """The networks, in evaluation mode."""
        if not self._ready:
            for network in self._networks:
                network.eval()
            self._ready = True
        return self._networks

    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        _ = self.networks
        return self._predict(x)


def personal(model: BlockNet) -> Predictor:
    """Return the predictor of a network alone, under the name ``personal``."""
    return ByNetworks("personal", (model,), lambda x: {"personal": model(x)})
