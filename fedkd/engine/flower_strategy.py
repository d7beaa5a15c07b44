"""A fedkd strategy as a Flower strategy: our own rounds and Flower's ``start()`` both use it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy as FlowerBase

from fedkd.engine.client_app import spent_in, turn
from fedkd.engine.codec import Encoded, decode, encode
from fedkd.engine.flower_private import filled, like
from fedkd.engine.guard import Guard
from fedkd.engine.intake import Intake
from fedkd.engine.rhythm import rhythm_of
from fedkd.engine.setup import Prepared
from fedkd.errors import RunError
from fedkd.rng import stream
from fedkd.strategies.base import Reducer
from fedkd.types import Arrays, ClientInfo, Metrics, Record, Upload

ASKED = 64
"""Nodes that are asked at a time who they are."""


class Nodes:
    """Which node serves which client, and the other way round."""

    def __init__(self, pairs: Iterable[tuple[int, int]]) -> None:
        self._node_of = dict(pairs)
        self._client_of = {node: k for k, node in self._node_of.items()}
        self._range, self._shift = range(0), 0
        first = min(self._node_of, default=0)
        shift = self._node_of.get(first, 0) - first
        clients = range(first, first + len(self._node_of))
        if all(self._node_of.get(k) == k + shift for k in clients):
            # As a rule they are numbered alike, which takes no memory for each client.
            self._range, self._shift = clients, shift
            self._node_of, self._client_of = {}, {}

    def __len__(self) -> int:
        return len(self._range) + len(self._node_of)

    def __contains__(self, client: int) -> bool:
        return client in self._range or client in self._node_of

    def __getitem__(self, client: int) -> int:
        """Return the node of a client."""
        return client + self._shift if client in self._range else self._node_of[client]

    def client(self, node: int) -> int:
        """Return the client of a node."""
        client = node - self._shift
        return client if client in self._range else self._client_of[node]


@dataclass(frozen=True)
class Folded:
    """What the replies of one exchange came to."""

    state: Arrays
    records: list[Record]
    failures: list[str] = field(default_factory=list)


class FlowerStrategy(FlowerBase):
    """Runs any fedkd strategy under Flower's interface.

    The server's state is the one ``ArrayRecord`` that Flower carries from round to round.
    """

    def __init__(self, prepared: Prepared) -> None:
        self.prepared, self.guard = prepared, Guard(prepared)
        self.rhythm = rhythm_of(prepared)
        self._nodes = Nodes([])
        self._state: Arrays = {}

    # The engine's side: plain arrays and records.

    def initial(self) -> Arrays:
        """Return the server's state before round 1."""
        rng = stream(self.prepared.experiment.seed, "server", "init")
        return self.prepared.strategy.init(self.prepared.setting, rng)

    def nodes(self, grid: Grid) -> Nodes:
        """Return the node id of each client, asked once over the grid.

        Raises:
            RunError: a client of the federation has no node.
        """
        if not self._nodes:
            found, ids = [], iter(grid.get_node_ids())
            while some := list(islice(ids, ASKED)):
                asks = messages("query.describe", 0, ((node, RecordDict()) for node in some))
                for reply in grid.send_and_receive(asks):
                    if reply.has_content():
                        k = int(reply.content["metrics"]["client"])
                        found.append((k, reply.metadata.src_node_id))
            self._nodes = Nodes(found)
            missing = [k.id for k in self.prepared.setting.clients if k.id not in self._nodes]
            if missing:
                raise RunError(
                    f"no node serves client {missing[0]} ({len(missing)} of "
                    f"{len(self.prepared.setting.clients)} clients are missing)"
                )
        return self._nodes

    def cohort(self, round_: int) -> list[int]:
        """Return the clients that take part in a round."""
        return self.prepared.attendance.cohort(round_)

    def judges(self, round_: int) -> tuple[bool, bool]:
        """Return whether everybody is judged, and whether on the global test set too."""
        everywhere = self.rhythm.everywhere(round_)
        return everywhere or round_ in self.rhythm, everywhere

    def train_messages(self, round_: int, state: Arrays, grid: Grid) -> Iterator[Message]:
        """Return one message for each participant, in ascending order, made when it is asked for.

        What is broadcast to many is encoded once.
        """
        nodes, encoded = self.nodes(grid), Encoded()
        setting, strategy = self.prepared.setting, self.prepared.strategy
        own, everywhere = self.rhythm.named(round_), self.rhythm.everywhere(round_)
        said = {lost: turn(round_, own, everywhere, lost) for lost in (False, True)}
        lost = set(self.prepared.attendance.lost(round_))

        def content(k: int) -> tuple[int, RecordDict]:
            arrays = strategy.broadcast(state, setting.clients[k], round_, setting)
            records = {"arrays": encode(arrays, encoded), "config": said[k in lost]}
            return nodes[k], filled(RecordDict(), records)

        return messages("train", round_, (content(k) for k in self.cohort(round_)))

    def fold_train(self, round_: int, state: Arrays, replies: Iterable[Message]) -> Folded:
        """Fuse the replies of participants, in ascending order of clients, into the next state.

        Where the strategy has a reducer no upload is kept. A reply without arrays is a lost upload:
        no failure, and as nothing for the server; where all are lost the state stays as it is.

        Raises:
            RunError: every participant failed.
        """
        uploads, spent, failures = list[Upload](), {}, list[str]()
        reducer = self._reducer(round_, state)
        intake = Intake(self.cohort(round_), uploads.append if reducer is None else reducer.add)
        records = self._clock(round_)
        for reply in replies:
            k = self._nodes.client(reply.metadata.src_node_id)
            upload = None
            if reply.has_error():
                failures.append(f"client {k}: {reply.error.reason}")
            else:
                records += unpack(round_, k, reply.content["metrics"])
                spent[k] = spent_in(reply)
                upload = self._upload(k, reply)
                if upload is None:
                    records.append(
                        Record(round=round_, client=k, split="train", metric="lost", value=1.0)
                    )
            intake.answered(k, upload)
        intake.close()
        # Under central noise a round without uploads is a release as any other: it must not show.
        if failures and not spent and not self.guard.plan.central:
            raise RunError(f"all participants of round {round_} failed; {failures[0]}")
        self.guard.charge(round_, spent)
        metrics: Metrics = {}
        if reducer is None:
            uploads, refused = self.guard.fold(round_, uploads, state)
            failures += refused
            if uploads:
                setting = self.prepared.setting
                state, metrics = self.prepared.strategy.aggregate(state, uploads, round_, setting)
        elif intake.taken:
            state, metrics = reducer.finish()
        records += [Record(round=round_, metric=m, value=float(v)) for m, v in metrics.items()]
        return Folded(state, records + self.guard.records(round_), failures)

    def _reducer(self, round_: int, state: Arrays) -> Reducer | None:
        """Return what fuses uploads as they come; central noise needs all of them at once."""
        if self.guard.plan.central:
            return None
        return self.prepared.strategy.reducer(state, round_, self.prepared.setting)

    def _upload(self, k: int, reply: Message) -> Upload | None:
        """Return what a client sent; None where it got lost."""
        if "arrays" not in reply.content:
            return None
        arrays = decode(reply.content["arrays"])
        return Upload(client=self.prepared.setting.clients[k], arrays=arrays)

    def _clock(self, round_: int) -> list[Record]:
        """Return the simulated duration of a round, in median times of a round."""
        clock = self.prepared.attendance.clock(round_)
        if clock is None:
            return []
        return [Record(round=round_, split="simulated", metric="clock", value=clock)]

    def evaluate_messages(
        self, round_: int, state: Arrays, grid: Grid, last: bool = False
    ) -> Iterator[Message]:
        """Return one message for each client of the federation, if the round is judged.

        The ``last`` round is, and on everything. A message is made when it is asked for.
        """
        now, everywhere = (True, True) if last else self.judges(round_)
        nodes, encoded = self.nodes(grid), Encoded()
        setting, strategy = self.prepared.setting, self.prepared.strategy
        said = turn(round_, True, everywhere)

        def content(client: ClientInfo) -> tuple[int, RecordDict]:
            arrays = strategy.judging(state, client, round_, setting)
            records = {"arrays": encode(arrays, encoded), "config": said}
            return nodes[client.id], filled(RecordDict(), records)

        return messages("evaluate", round_, (content(c) for c in (setting.clients if now else ())))

    def fold_evaluate(self, round_: int, replies: Iterable[Message]) -> Folded:
        """Return the records of a judged round."""
        records, failures = [], []
        for reply in replies:
            k = self._nodes.client(reply.metadata.src_node_id)
            if reply.has_error():
                failures.append(f"client {k}: {reply.error.reason}")
            else:
                records += unpack(round_, k, reply.content["metrics"])
        return Folded({}, records, failures)

    # Flower's side.

    def initial_arrays(self) -> ArrayRecord:
        """Return the ``initial_arrays`` for ``start()``."""
        return encode(self.initial())

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return this round's messages to participants."""
        self._state = decode(arrays)
        reason = self.guard.exhausted(server_round, self.cohort(server_round), self._state)
        if reason is not None:
            raise RunError(f"stopped before the privacy budget is exceeded: {reason}")
        return self.train_messages(server_round, self._state, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the next state and the mean of every metric over participants."""
        folded = self.fold_train(server_round, self._state, replies)
        return encode(folded.state), means(folded.records)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the messages that ask every client to be judged."""
        return self.evaluate_messages(server_round, decode(arrays), grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return the unweighted mean of every metric over clients."""
        return means(self.fold_evaluate(server_round, replies).records)

    def summary(self) -> None:
        """Print nothing: the run folder and the table say more."""


def messages(
    kind: str, round_: int, contents: Iterable[tuple[int, RecordDict]]
) -> Iterator[Message]:
    """Yield a message to each node; what they have in common is checked once."""
    first: Message | None = None
    for node, content in contents:
        if first is None:
            first = Message(content, node, kind, group_id=str(round_))
            yield like(first, content)
        else:
            yield like(first, content, dst_node_id=node, created_at=time.time())


def unpack(round_: int, client: int, metrics: MetricRecord) -> list[Record]:
    """Return a client's metrics as records; keys are ``readout|predictor|split|metric``."""
    records = []
    for key, value in metrics.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            continue
        match key.split("|"):
            case ["fit", name]:
                made = Record(
                    round=round_, client=client, split="train", metric=name, value=float(value)
                )
            case [readout, predict, split, name]:
                made = Record(
                    round=round_,
                    client=client,
                    split=split,
                    readout=readout,
                    predict=predict,
                    metric=name,
                    value=float(value),
                )
            case _:
                continue
        records.append(made)
    return records


def means(records: list[Record]) -> MetricRecord:
    """Return the unweighted mean over clients of every metric, under one name each."""
    groups: dict[str, list[float]] = {}
    for r in records:
        name = "/".join(p for p in (r.readout, r.predict, r.split, r.metric) if p)
        groups.setdefault(name, []).append(r.value)
    return MetricRecord({name: float(np.mean(values)) for name, values in groups.items()})
