"""Ditto: a personal model beside the global one, held near it."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from pydantic import Field

from fedkd.clients.client import Client, Predictor, Update, personal
from fedkd.clients.local import Term
from fedkd.clients.terms import Proximal, Supervised
from fedkd.clients.training import Training
from fedkd.models.book import to_arrays
from fedkd.options import Count, NonNegative, options
from fedkd.strategies.averaging import ModelAveraging, loss_metrics
from fedkd.strategies.base import strategies
from fedkd.types import Arrays, prefixed, select


@strategies.register("ditto")
@options
class Ditto(ModelAveraging):
    """FedAvg for a global model, beside it ``min_v F_k(v) + lambda/2 ||v - w_global||^2``.

    Clients are judged by v; only w travels. Limits: lambda = 0 makes v a local-only model (trained
    in the rounds in which the client takes part).
    Source: Li et al., Ditto: Fair and Robust Federated Learning Through Personalization, ICML
    2021, algorithm 1.
    """

    source = "Li et al., ICML 2021, algorithm 1"
    sequences = True

    lam: Annotated[NonNegative, Field(description="pull of the personal towards the global")] = 0.1
    personal_epochs: Annotated[Count, Field(description="local epochs of the personal model")] = 1

    def local_update(self, client: Client, received: Arrays) -> Update:
        shared = client.model(select(received, "model"))
        reference = {k: p.detach().clone() for k, p in shared.named_parameters()}
        result = client.fit(shared, [Supervised()])
        own = client.model(select(client.state, "personal"))
        terms: list[Term] = [Supervised()]
        if self.lam:
            terms.append(Proximal(own, reference, self.lam))
        client.fit(own, terms, "personal", client.epochs(self.personal_epochs))
        client.state.update(prefixed("personal", to_arrays(own)))
        arrays = prefixed("model", to_arrays(shared))
        return Update(arrays, personal(own), loss_metrics(result.losses))

    def fits(self, training: Training) -> tuple[Training, ...]:
        return (training, replace(training, epochs=self.personal_epochs, steps=0))

    def predictor(self, client: Client, received: Arrays) -> Predictor:
        kept = select(client.state, "personal")
        return personal(client.model(kept or select(received, "model")))
