"""The two bounds of every comparison: no communication at all, and all data in one place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from fedkd.clients.client import Client, Predictor, Update, personal
from fedkd.clients.terms import Supervised
from fedkd.models.book import to_arrays
from fedkd.options import options
from fedkd.privacy.payload import Payload
from fedkd.rng import Rng
from fedkd.strategies.averaging import ModelAveraging, loss_metrics
from fedkd.strategies.base import Setting, Strategy, strategies
from fedkd.types import Arrays, ClientInfo, Metrics, Upload, prefixed, select


@strategies.register("local-only")
@options
class LocalOnly(Strategy):
    """Every client trains alone; nothing travels. The bound that any federation has to beat.

    With ``label_smoothing`` s it is the control that unmasks mere regularization: the target is
    ``(1 - s) onehot(y) + s / C``, with no communication at all.
    """

    source = "baseline"
    sequences = True
    mixed = True

    label_smoothing: Annotated[
        float, Field(ge=0, lt=1, description="share of the target spread over all classes")
    ] = 0.0

    def init(self, setting: Setting, rng: Rng) -> Arrays:
        return {}

    def broadcast(self, state: Arrays, client: ClientInfo, round_: int, setting: Setting) -> Arrays:
        return {}

    def declare(
        self, received: Arrays, client: ClientInfo, round_: int, setting: Setting
    ) -> Payload | None:
        return ()

    def alone(self, setting: Setting) -> list[str]:
        return []

    def local_update(self, client: Client, received: Arrays) -> Update:
        model = client.model(select(client.state, "model"))
        result = client.fit(model, [Supervised(label_smoothing=self.label_smoothing)])
        client.state.update(prefixed("model", to_arrays(model)))
        return Update({}, personal(model), loss_metrics(result.losses))

    def aggregate(
        self, state: Arrays, uploads: Sequence[Upload], round_: int, setting: Setting
    ) -> tuple[Arrays, Metrics]:
        return state, {}

    def predictor(self, client: Client, received: Arrays) -> Predictor:
        return personal(client.model(select(client.state, "model")))


@strategies.register("centralized")
@options
class Centralized(ModelAveraging):
    """One model trained on the union of all clients' data: the bound from above, no federation.

    A pseudo-client holds the pooled data and takes part in every round, with the same local
    epochs; clients are judged by its model. Its bytes are those of moving one model, not the data.
    """

    source = "baseline"
    sequences = True
    pooled = True

    def alone(self, setting: Setting) -> list[str]:
        return ["it trains on everybody's data in one place, where no client is apart from others"]
