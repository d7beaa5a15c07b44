"""FedProx: federated averaging with a proximal term that holds clients near the global model."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fedkd.clients.client import Client
from fedkd.clients.local import Term
from fedkd.clients.terms import Proximal, Supervised
from fedkd.models.base import BlockNet
from fedkd.options import NonNegative, options
from fedkd.strategies.averaging import ModelAveraging
from fedkd.strategies.base import strategies
from fedkd.types import Arrays


@strategies.register("fedprox")
@options
class FedProx(ModelAveraging):
    """FedAvg with the local loss ``CE + mu/2 ||w - w_global||^2``.

    Limits: mu = 0 is FedAvg bit for bit. Sensible values: 0.001 to 1.
    Source: Li et al., Federated Optimization in Heterogeneous Networks, MLSys 2020, eq. 2.
    """

    source = "Li et al., MLSys 2020, eq. 2"
    sequences = True

    mu: Annotated[NonNegative, Field(description="weight of the proximal term; 0 is FedAvg")] = 0.01

    def terms(self, client: Client, model: BlockNet, received: Arrays) -> list[Term]:
        terms: list[Term] = [Supervised()]
        if self.mu:
            start = {k: p.detach().clone() for k, p in model.named_parameters()}
            terms.append(Proximal(model, start, self.mu))
        return terms
