"""Averaging of weights under a layer schedule: FedAvg and its relatives are settings of this."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
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
from fedkd.strategies.base import Reducer, Setting, Strategy
from fedkd.strategies.schedule import LayerSchedule
from fedkd.types import Arrays, ClientInfo, Metrics, Upload, prefixed, select

LAST_ROUND = "meta/last_round"
"""Server-side bookkeeping, (K,): the last round each client took part in; it never travels."""
BLOCK = 32768
"""Numbers that are added at once when averaging: as doubles 256 KiB, half of a core's cache."""


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
        return _always(tuple(blocks))

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
        sent: dict[str, bool] = {}
        found: Arrays = {}
        for key, value in state.items():
            if key.startswith("model/"):
                block = block_of(key[6:])
                if block not in sent:
                    sent[block] = self._sent(schedule, block, round_, last)
                if sent[block]:
                    found[key] = value
        return found

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
        if own and schedule.monotone:
            now = schedule(client.round)
            sent = {k: w for k, w in sent.items() if block_of(k) in now or k not in own}
        return client.model(own, sent)

    def finish(self, client: Client, model: BlockNet) -> Arrays:
        """Keep the personal blocks of the trained ``model`` and return those that travel."""
        weights = to_arrays(model)
        schedule = self.schedule(model.names)
        now = schedule(client.round)
        if len(schedule.stages) == 1 and now.issuperset(model.names):
            return prefixed("model", weights)
        kept = {k for k in weights if block_of(k) not in now}
        if self.handover_from() == "local":
            kept |= {k for k in weights if schedule.dropped_at(block_of(k))}
        client.state.update({f"model/{k}": weights[k] for k in sorted(kept)})
        return {f"model/{k}": w for k, w in weights.items() if block_of(k) in now}

    def aggregate(
        self, state: Arrays, uploads: Sequence[Upload], round_: int, setting: Setting
    ) -> tuple[Arrays, Metrics]:
        reducer = ModelReducer(state, round_, by_examples=self.weighting == "examples")
        for upload in uploads:
            reducer.add(upload)
        return reducer.finish()

    def reducer(self, state: Arrays, round_: int, setting: Setting) -> Reducer | None:
        if type(self).aggregate is not ModelAveraging.aggregate:
            # A method that does more with the uploads needs its own reducer.
            return None
        return ModelReducer(state, round_, by_examples=self.weighting == "examples")

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


@lru_cache(maxsize=64)
def _always(blocks: tuple[str, ...]) -> LayerSchedule:
    """Return the one schedule of a network: every client asks for it, several times a round."""
    return LayerSchedule.always(blocks)


class ModelReducer:
    """Averages the ``model/`` arrays of uploads as they come; what it keeps is one sum."""

    def __init__(self, state: Arrays, round_: int, *, by_examples: bool) -> None:
        self.state, self.round_, self.by_examples = state, round_, by_examples
        self._mean, self._clients = Mean(), list[int]()

    def add(self, upload: Upload) -> None:
        """Add the networks of those that an upload speaks for."""
        weights = prefixed("model", select(upload.arrays, "model"))
        self._mean.add(weights, upload.client.examples if self.by_examples else 1)
        self._clients += upload.clients

    def finish(self) -> tuple[Arrays, Metrics]:
        """Return the next state of the server, and no metrics."""
        last = self.state[LAST_ROUND].copy()
        last[self._clients] = self.round_
        return {**self.state, **self._mean.result(), LAST_ROUND: last}, {}


def average(items: Iterable[Arrays], weights: Iterable[float]) -> Arrays:
    """Return ``sum_k w_k x_k / sum_k w_k`` of every key, over the items that have it.

    Sums run in the given order in double precision, the result has the items' own type; so one
    item, or many equal ones, give that item back to the last bit. Where all weights are 0 (only
    clients without examples took part) the items count alike.

    >>> average([{"w": np.float32([0, 1])}, {"w": np.float32([4, 1])}], [1, 3])["w"].tolist()
    [3.0, 1.0]
    """
    mean = Mean()
    for arrays, weight in zip(items, weights, strict=True):
        mean.add(arrays, weight)
    return mean.result()


class Mean:
    """What :func:`average` is, of items that come one after another and are not kept.

    >>> mean = Mean()
    >>> for k in (1, 2, 3): mean.add({"w": np.float32([k])}, 1)
    >>> mean.result()["w"].tolist()
    [2.0]
    """

    def __init__(self) -> None:
        self._sums: Arrays = {}
        self._mass: dict[str, float] = {}
        self._types: dict[str, np.dtype] = {}
        self._weighed = False
        self._block = np.empty(0)

    def add(self, arrays: Arrays, weight: float) -> None:
        """Add one item; weights are not negative."""
        if weight and not self._weighed:
            # What came without any weight was counted alike so far, in case nothing else comes.
            self._weighed = True
            for key, total in self._sums.items():
                total.fill(0.0)
                self._mass[key] = 0.0
        weight = float(weight) if self._weighed else 1.0
        for key, value in arrays.items():
            if key not in self._sums:
                self._sums[key], self._mass[key] = np.zeros(value.shape), 0.0
            self._accumulate(self._sums[key], value, weight)
            self._mass[key] += weight
            self._types[key] = value.dtype

    def _accumulate(self, total: np.ndarray, value: np.ndarray, weight: float) -> None:
        """Add ``weight * value`` in place, a block that fits into the cache at a time."""
        if value.shape != total.shape:
            raise ValueError(f"shapes to be averaged differ: {value.shape} and {total.shape}")
        if value.size > self._block.size < BLOCK:
            self._block = np.empty(min(value.size, BLOCK))
        sums, values = total.reshape(-1), value.reshape(-1)
        for start in range(0, value.size, BLOCK):
            part = values[start : start + BLOCK]
            scaled = self._block[: part.size]
            scaled[...] = part
            if weight != 1.0:
                scaled *= weight
            sums[start : start + BLOCK] += scaled

    def result(self) -> Arrays:
        """Return the mean of what was added; once."""
        return {
            key: np.divide(total, self._mass[key], out=total).astype(self._types[key])
            for key, total in self._sums.items()
        }


def loss_metrics(losses: dict[str, float]) -> Metrics:
    """Name the mean training losses of a fit as metrics: ``loss/supervised`` and so on."""
    return {f"loss/{name}": value for name, value in losses.items()}
