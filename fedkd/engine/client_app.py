"""The client's side of a run as a Flower ClientApp: what one message makes one client do."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import cached_property, partial, wraps

import numpy as np
import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedkd.clients.client import Client, Predictor
from fedkd.clients.judge import Verdict, Verdicts
from fedkd.clients.local import Fitter, fit
from fedkd.data.federated import ClientData, Split
from fedkd.engine.calibration import BINS, packed
from fedkd.engine.codec import Cache, decode, encode
from fedkd.engine.desk import Desk
from fedkd.engine.exact import explained
from fedkd.engine.flower_private import answer, filled
from fedkd.engine.moving import Mover
from fedkd.engine.partition_id import client_id
from fedkd.engine.placement import Placement, Work, placement
from fedkd.engine.setup import Prepared
from fedkd.errors import RunError
from fedkd.types import Arrays

SPENT = "privacy"
"""The record of a reply that says what a client's data paid: (noise, rate, steps) in a row."""
STATE = "fedkd"
"""The record of a node's Flower context that holds the client's memory."""
LOST = "lost"
"""In the configuration of a message: the simulator lets this upload get lost on its way."""
ATTEMPT = "attempt"
"""In the configuration of a message: that of :class:`~fedkd.engine.attempts.Attempts`, above 0."""
COPIES, INSIDE = 8, 64
"""First guess of what work takes on a GPU: so many times a network's weights, and a batch's inputs.

Gradients, an optimizer, what was received, a teacher; what layers keep for the way back.
"""
Reported = dict[str, float | list[float]]
OnFailure = Callable[[int, Client, Arrays, BaseException], None]
Handle = Callable[["ClientSide", Message, Context], Message]


def placed(handle: Handle) -> Handle:
    """Answer a message on a device with room for it, where there are devices to choose from."""

    @wraps(handle)
    def there(self: ClientSide, message: Message, context: Context) -> Message:
        if self.plain:
            return handle(self, message, context)
        before = dict(context.state)

        def undo() -> None:
            context.state.clear()
            context.state.update(before)

        with explained():
            if self.places is None:
                return handle(self, message, context)
            work = self.work(message, context)
            return self.places.run(work, lambda: handle(self, message, context), undo)

    return there


class ClientSide:
    """Handles the messages of all simulated clients; nothing of a client is kept here but verdicts.

    ``on_failure`` is told of a client whose local work raised, with what it was given; ``fitter``
    is what clients train through: the one loop, or an executor's. ``places`` gives each client a
    device; by default these are all GPUs where the run is on one, else there is nothing to give.
    """

    def __init__(
        self,
        prepared: Prepared,
        on_failure: OnFailure | None = None,
        fitter: Fitter = fit,
        places: Placement | None = None,
    ) -> None:
        self.prepared, self.on_failure, self.fitter = prepared, on_failure, fitter
        device, at_once = prepared.device, prepared.experiment.engine.clients_per_device
        # Clients that train as one wait for each other there, so none may wait for a device.
        self.places = placement(device, at_once) if places is None and fitter is fit else places
        self.plain = self.places is None and not prepared.experiment.engine.deterministic
        self.mover = Mover(torch.Tensor.pin_memory if device.type == "cuda" else None)
        self.desk = Desk(prepared)
        self.verdicts = Verdicts()
        self._lock = threading.Lock()
        self._exchange: tuple[int, str] = (0, "")
        self._decoded: Cache = {}

    def app(self) -> ClientApp:
        """Return the ClientApp with its ``train``, ``evaluate`` and ``query.describe`` actions."""
        app = ClientApp()
        app.train()(self.train)
        app.evaluate()(self.evaluate)
        app.query("describe")(self.describe)
        return app

    def describe(self, message: Message, context: Context) -> Message:
        """Say which client of the federation this node is."""
        metrics = MetricRecord({"client": client_id(context)})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    @placed
    def train(self, message: Message, context: Context) -> Message:
        """Do one client's local work of a round, keep its memory, judge it as ``own``."""
        config = message.content["config"]
        client = self.client(context, int(config["server-round"]))
        client.attempt = int(config.get(ATTEMPT, 0))
        self.desk.equip(client)
        received = decode(message.content["arrays"], self._cache(message))
        before = dict(client.state)
        try:
            update = self.prepared.strategy.local_update(client, received)
            check_finite(update.arrays)
            arrays = self.desk.hand_out(client, received, update.arrays)
        except Exception as error:
            if self.places is not None and self.places.again(error):
                # Nothing has happened yet: the next attempt pays what this one would have paid.
                raise
            if self.on_failure is not None:
                self.on_failure(client.round, _restored(client, before), received, error)
            if client.spent:
                # The data paid, whatever became of the round.
                client.state = before
                self.desk.book(client)
                remember(context, client.state)
            raise
        self.desk.book(client)
        remember(context, client.state)
        metrics: Reported = {
            f"fit|{key}": float(v) for key, v in (update.metrics | client.noted).items()
        }
        if config["judge"]:
            metrics |= self.judged(client, "own", update.predictor, bool(config["global"]))
        metrics["num-examples"] = float(client.info.examples)
        content = _report(dict(sorted(metrics.items())))
        if not config.get(LOST):
            content["arrays"] = encode(arrays, own=True)
        if client.spent:
            rows = [float(number) for event in client.spent for number in event]
            content[SPENT] = MetricRecord({"events": rows})
        return answer(message, content)

    @placed
    def evaluate(self, message: Message, context: Context) -> Message:
        """Judge a client after aggregation, as ``composite``."""
        config = message.content["config"]
        client = self.client(context, int(config["server-round"]))
        received = decode(message.content["arrays"], self._cache(message))
        predictor = self.prepared.strategy.predictor(client, received)
        metrics = self.judged(client, "composite", predictor, bool(config["global"]))
        metrics["num-examples"] = float(client.info.examples)
        return Message(_report(metrics), reply_to=message)

    def _cache(self, message: Message) -> Cache:
        """Return what this exchange has decoded already; the one before is let go of."""
        exchange = (int(message.content["config"]["server-round"]), message.metadata.message_type)
        with self._lock:
            if exchange != self._exchange:
                self._exchange, self._decoded = exchange, {}
            return self._decoded

    def client(self, context: Context, round_: int) -> Client:
        """Return the client that a node is, with its memory."""
        prepared, k = self.prepared, self._number(context)
        state = decode(context.state[STATE]) if STATE in context.state else {}
        return Client(
            info=prepared.setting.clients[k],
            data=self.data(k),
            state=state,
            book=prepared.setting.book,
            training=prepared.experiment.clients.training,
            seed=prepared.experiment.seed,
            round=round_,
            rounds=prepared.experiment.rounds,
            device=self._device,
            public=self._public,
            fitter=self.fitter,
        )

    def work(self, message: Message, context: Context) -> Work:
        """Return what is known of the work that a message asks for, before it is done."""
        prepared, k = self.prepared, self._number(context)
        setting, sizes = prepared.setting, prepared.federation.sizes(k)
        label = setting.clients[k].model
        weights = sum(value.nbytes for value in setting.book.initial(label).values())
        # Of images float32; of text two rows of int64.
        width = 16 if setting.task.sequence else 4
        example = math.prod(setting.task.input_shape) * width
        batch = prepared.experiment.clients.training.batch_size
        return Work(
            whose=f"client {k} ({label})",
            kind=(message.metadata.message_type, label),
            guess=COPIES * weights + INSIDE * batch * example,
            data=sum(sizes.values()) * example,
        )

    def _number(self, context: Context) -> int:
        k, clients = client_id(context), len(self.prepared.setting.clients)
        if not 0 <= k < clients:
            raise RunError(
                f"node {context.node_id} has partition-id {k}, but the federation has clients "
                f"0 to {clients - 1}; set clients.count"
            )
        return k

    def data(self, k: int) -> ClientData:
        """Return a client's data on the device; a pooled strategy trains on everybody's."""
        own = self.prepared.federation.client(k)
        if self.prepared.strategy.pooled and k == 0:
            kept = own
            own = ClientData(lambda: self._pool.train, lambda: kept.validation, lambda: kept.test)
        if self._device.type == "cpu":
            return own
        return own.mapped(partial(self.mover.moved, device=self._device))

    def judged(
        self, client: Client, readout: str, predict: Predictor, everywhere: bool
    ) -> Reported:
        """Judge predictors on the client's own splits, and on the global test set if asked."""
        classes, own = client.task.classes, readout == "own"
        found: Reported = {}
        splits = {"validation": client.data.validation, "test": client.data.test}
        judged = self.verdicts.judge(client.info.id, predict, splits, classes, likely=own)
        for split, verdicts in judged.items():
            for name, verdict in verdicts.items():
                found[f"{readout}|{name}|{split}|accuracy"] = verdict.accuracy
                found[f"{readout}|{name}|{split}|loss"] = verdict.loss
                found |= _calibrated(f"{readout}|{name}|{split}", verdict)
                if client.task.sequence:
                    bits = verdict.bits_per_character(client.task.class_names)
                    found[f"{readout}|{name}|{split}|bits_per_character"] = bits
        if everywhere:
            absent = self.prepared.federation.absent(client.info.id)
            # One place for all clients of an architecture: often they have the same weights.
            place, test = client.info.model, {"global": self._global_test}
            judged = self.verdicts.judge(place, predict, test, classes, likely=True)
            for name, verdict in judged["global"].items():
                found[f"{readout}|{name}|global|accuracy"] = verdict.accuracy
                found |= _calibrated(f"{readout}|{name}|global", verdict)
                if client.task.sequence:
                    bits = verdict.bits_per_character(client.task.class_names)
                    found[f"{readout}|{name}|global|bits_per_character"] = bits
                    continue
                held = int(verdict.total[absent].sum())
                if held:
                    hits = float(verdict.correct[absent].sum())
                    found[f"{readout}|{name}|absent|accuracy"] = hits / held
        return found

    @property
    def _device(self) -> torch.device:
        return self.prepared.device if self.places is None else self.places.device

    @property
    def _public(self) -> Split | None:
        """The public pool: the server's own, or a copy of it that stays on this device."""
        pool, device = self.prepared.setting.public, self._device
        if pool is None or device in (self.prepared.device, pool.y.device):
            return pool
        return self.mover.resident("public", device, lambda: pool)

    @cached_property
    def _pool(self) -> ClientData:
        return self.prepared.federation.pooled()

    @property
    def _global_test(self) -> Split:
        return self.mover.resident("global", self._device, self._every_test)

    def _every_test(self) -> Split:
        limit = self.prepared.experiment.evaluate.global_per_class
        return self.prepared.federation.global_test(limit)


def remember(context: Context, state: Arrays) -> None:
    """Put a client's memory into its node's state; one that never had any leaves none."""
    if state or STATE in context.state:
        context.state[STATE] = encode(state, own=True)


def _calibrated(place: str, verdict: Verdict) -> Reported:
    """Return how sure a predictor was, as sums that add over clients, where that was judged."""
    found = verdict.calibration
    return {} if found is None else {f"{place}|{BINS}": packed(found)}


def _report(metrics: Reported) -> RecordDict:
    """Return the content of a reply that says ``metrics``: plain floats, and lists of them."""
    return filled(RecordDict(), {"metrics": filled(MetricRecord(), metrics)})


def spent_in(reply: Message) -> list[tuple[float, float, int]]:
    """Return what a client says that it paid: (noise multiplier, sampling rate, steps)."""
    if SPENT not in reply.content:
        return []
    rows = list(reply.content[SPENT]["events"])
    return [
        (float(z), float(q), int(steps))
        for z, q, steps in zip(rows[::3], rows[1::3], rows[2::3], strict=True)
    ]


def check_finite(arrays: Arrays) -> None:
    """Refuse an upload that is not finite: one bad client must not ruin the average.

    Raises:
        RunError: names the array.
    """
    for key, value in arrays.items():
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise RunError(
                f"upload {key!r} holds values that are not finite; lower the learning rate"
            )


def turn(
    round_: int, judge_now: bool, everywhere: bool, lost: bool = False, attempt: int = 0
) -> ConfigRecord:
    """Return the record that tells a client which round it is and what to judge.

    ``lost``: its upload does not get through. The reply then has its metrics, which are the
    simulator's own view, but no arrays. ``attempt``: its draws are to be those of that attempt.
    """
    said: dict[str, int | bool]
    said = {"server-round": round_, "judge": judge_now, "global": everywhere}
    said |= {LOST: True} if lost else {}
    return ConfigRecord(said | ({ATTEMPT: attempt} if attempt else {}))


def _restored(client: Client, before: Arrays) -> Client:
    client.state = before
    return client
