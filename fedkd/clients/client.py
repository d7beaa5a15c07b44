"""What a strategy sees on the client's side: its data, its memory, its networks, the one loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedkd.clients.local import FitResult, Term, fit
from fedkd.clients.training import Training
from fedkd.data.federated import ClientData, Split
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
    ``public`` is the public pool that the server and every client hold, where there is one.
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

    @property
    def task(self) -> Task:
        """What is learned."""
        return self.book.task

    def rng(self, *purpose: str | int) -> Rng:
        """Return this client's stream for a purpose in this round."""
        return stream(self.seed, *purpose, self.round, self.info.id)

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

        Calls with another ``purpose`` draw other batches and leave the first ones as they are.
        """
        training = training or self.training
        lr = training.lr_at(self.round, self.rounds)
        data = self.data.train if data is None else data
        return fit(model, data, terms, training, lr, self.rng(purpose))

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


def personal(model: BlockNet) -> Predictor:
    """Return the predictor of a network alone, under the name ``personal``."""
    model.eval()
    return lambda x: {"personal": model(x)}
