"""Federated averaging, and the same with fine-tuning before a client is judged."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fedkd.clients.client import Client, Predictor, personal
from fedkd.clients.terms import Supervised
from fedkd.options import Count, options
from fedkd.strategies.averaging import ModelAveraging
from fedkd.strategies.base import strategies
from fedkd.types import Arrays, select


@strategies.register("fedavg")
@options
class FedAvg(ModelAveraging):
    """Federated averaging: every block is averaged, ``w = sum_k n_k/n w_k``.

    Limits: one client with full participation is centralized training.
    Source: McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized
    Data, AISTATS 2017, algorithm 1.
    """

    source = "McMahan et al., AISTATS 2017, algorithm 1"
    sequences = True


@strategies.register("fedavg-ft")
@options
class FedAvgFineTuned(ModelAveraging):
    """Federated averaging, fine-tuned on each client's own data before the client is judged.

    The composite read-out trains a copy of the global model for ``finetune_epochs`` on the
    client's training data; nothing of it is sent or kept. Limits: no difference from FedAvg in
    what travels. The baseline that every personalised method has to beat.
    Source: a common baseline, for instance Collins et al., ICML 2021 (FedRep), section 5.
    """

    source = "common baseline; Collins et al., ICML 2021, section 5"
    sequences = True

    finetune_epochs: Annotated[Count, Field(description="local epochs before judging")] = 1

    def predictor(self, client: Client, received: Arrays) -> Predictor:
        model = client.model(select(received, "model"))
        client.fit(model, [Supervised()], "finetune", client.epochs(self.finetune_epochs))
        return personal(model)
