"""Averaging of weights under a layer schedule: FedAvg and its relatives are settings of this."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from fedkd.clients.client import Client, Predictor, Update, personal
from fedkd.clients.local import Term
from fedkd.clients.terms import Supervised
from fedkd.models.base import BlockNet, block_of
from fedkd.models.book import to_arrays
from fedkd.options import options
from fedkd.privacy.payload import Payload, Weights
from fedkd.rng import Rng
from fedkd.strategies.base import Setting, Strategy
from fedkd.strategies.schedule import LayerSchedule
from fedkd.types import Arrays, ClientInfo, Metrics, Upload, prefixed, select

LAST_ROUND = "meta/last_round"
"""Server-side bookkeeping, (K,): the last round each client took part in; it never travels."""


@options
class ModelAveraging(Strategy):
    """Clients train, the server averages the blocks that take part: ``w = sum_k p_k w_k``.

    Blocks that do not take part stay on the client and are never sent. A block that is dropped goes
    on from the last average (``handover = "global"``; sent once more to clients that have not yet
    received it) or from the client's own last copy (``"local"``).
    """

    weighting: Annotated[
        Literal["examples", "uniform"],
        Field(description="weights of the average: training examples, or the same for everybody"),
    ] = "examples"

    def schedule(self, blocks: Sequence[str]) -> LayerSchedule:
        """Return which of ``blocks`` (shallow to deep, head last) are averaged at which round."""
        return LayerSchedule.always(blocks)

    def handover_from(self) -> str:
        """Return ``global`` or ``local``: what a dropped block goes on from."""
        return "global"

    def terms(self, client: Client, model: BlockNet, received: Arrays) -> list[Term]:
        """Return the local loss; plain cross-entropy unless a method says otherwise."""
        return [Supervised()]

    def init(self, setting: Setting, rng: Rng) -> Arrays:
        label = setting.clients[0].model
        ever = self.schedule(setting.book.blocks(label)).ever
        shared = {k: v for k, v in setting.book.initial(label).items() if block_of(k) in ever}
        size = max(c.id for c in setting.clients) + 1
        return {**prefixed("model", shared), LAST_ROUND: np.zeros(size, dtype=np.int64)}

    def broadcast(self, state: Arrays, client: ClientInfo, round_: int, setting: Setting) -> Arrays:
        schedule = self.schedule(setting.book.blocks(client.model))
        last = int(state[LAST_ROUND][client.id])
        return {
            f"model/{key}": value
            for key, value in select(state, "model").items()
            if self._sent(schedule, block_of(key), round_, last)
        }

    def _sent(self, schedule: LayerSchedule, block: str, round_: int, last: int) -> bool:
        if block in schedule(round_):
            return True
        dropped = schedule.dropped_at(block)
        return last < dropped if self.handover_from() == "global" else last == 0

    def local_update(self, client: Client, received: Arrays) -> Update:
        model = self.start(client, received)
        result = client.fit(model, self.terms(client, model, received))
        return Update(self.finish(client, model), personal(model), loss_metrics(result.losses))

    def start(self, client: Client, received: Arrays) -> BlockNet:
        """Return the client's network: its own personal blocks with the blocks received.

        A dropped block that it goes on from by itself stays its own: where an upload was lost, the
        server does not know that it has it, and hands it over once more.
        """
        own, sent = select(client.state, "model"), select(received, "model")
        schedule = self.schedule(client.book.blocks(client.info.model))
        if schedule.monotone:
            now = schedule(client.round)
            sent = {k: w for k, w in sent.items() if block_of(k) in now or k not in own}
        return client.model(own, sent)

    def finish(self, client: Client, model: BlockNet) -> Arrays:
        """Keep the personal blocks of the trained ``model`` and return those that travel."""
        weights = to_arrays(model)
        schedule = self.schedule(model.names)
        now = schedule(client.round)
        kept = {k for k in weights if block_of(k) not in now}
        if self.handover_from() == "local":
            kept |= {k for k in weights if schedule.dropped_at(block_of(k))}
        client.state.update({f"model/{k}": weights[k] for k in sorted(kept)})
        return {f"model/{k}": w for k, w in weights.items() if block_of(k) in now}

    def aggregate(
        self, state: Arrays, uploads: Sequence[Upload], round_: int, setting: Setting
    ) -> tuple[Arrays, Metrics]:
        averaged = average(
            [prefixed("model", select(u.arrays, "model")) for u in uploads],
            [u.client.examples if self.weighting == "examples" else 1 for u in uploads],
        )
        last = state[LAST_ROUND].copy()
        last[[k for u in uploads for k in u.clients]] = round_
        return {**state, **averaged, LAST_ROUND: last}, {}

    def declare(
        self, received: Arrays, client: ClientInfo, round_: int, setting: Setting
    ) -> Payload | None:
        """Return the blocks that are averaged, relative to what the client received."""
        now = self.schedule(setting.book.blocks(client.model))(round_)
        model = select(received, "model").items()
        reference = {f"model/{key}": value for key, value in model if block_of(key) in now}
        return (Weights(reference),) if reference else ()

    def alone(self, setting: Setting) -> list[str]:
        if self.weighting == "uniform":
            return []
        return [
            "strategy.weighting = 'examples' weighs clients by their examples, so that one client "
            "can move the average by more than its share; set strategy.weighting = 'uniform'"
        ]

    def predictor(self, client: Client, received: Arrays) -> Predictor:
        return personal(self.start(client, received))

    def server_model(self, state: Arrays) -> Arrays | None:
        return select(state, "model")

    def problems(self, setting: Setting) -> list[str]:
        """Refuse mixed architectures unless the averaged blocks agree in name and shape."""
        shared: list[dict[str, tuple[int, ...]]] = []
        for label in sorted({c.model for c in setting.clients}):
            ever = self.schedule(setting.book.blocks(label)).ever
            shapes = setting.book.shapes(label)
            shared.append({k: s for k, s in shapes.items() if block_of(k) in ever})
        if any(shapes != shared[0] for shapes in shared[1:]):
            return [
                "clients have different architectures, and the blocks that are averaged differ in "
                "name or shape; give all clients one model, average only blocks that agree "
                "(lg-fedavg with equal heads), or use fedd2s with reading = 'up_to_cut'"
            ]
        return []


def average(items: Sequence[Arrays], weights: Sequence[float]) -> Arrays:
    """Return ``sum_k w_k x_k / sum_k w_k`` of every key, over the items that have it.

    Sums run in the given order in double precision, the result has the items' own type; so one
    item, or many equal ones, give that item back to the last bit. Where all weights are 0 (only
    clients without examples took part) the items count alike.

    >>> average([{"w": np.float32([0, 1])}, {"w": np.float32([4, 1])}], [1, 3])["w"].tolist()
    [3.0, 1.0]
    """
    weights = weights if any(weights) else [1.0] * len(items)
    sums: dict[str, np.ndarray] = {}
    mass: dict[str, float] = {}
    for arrays, weight in zip(items, weights, strict=True):
        for key, value in arrays.items():
            if key not in sums:
                sums[key], mass[key] = np.zeros(value.shape), 0.0
            sums[key] += value.astype(np.float64) * weight
            mass[key] += weight
    types = {key: value.dtype for arrays in items for key, value in arrays.items()}
    return {key: (total / mass[key]).astype(types[key]) for key, total in sums.items()}


def loss_metrics(losses: dict[str, float]) -> Metrics:
    """Name the mean training losses of a fit as metrics: ``loss/supervised`` and so on."""
    return {f"loss/{name}": value for name, value in losses.items()}
