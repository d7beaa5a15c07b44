"""A Flower Grid inside one process, which Flower itself has no supported way to do.

It answers messages by calling the ClientApp directly: deterministic node ids, state for each
node, replies in request order, errors as Flower's error replies.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedkd.engine import flower_private
from fedkd.engine.contexts import FIRST_NODE_ID, RUN_ID, Contexts, Task, marks, unchanged
from fedkd.engine.executors.base import Executor, Outcome, attempt
from fedkd.engine.executors.process import DeadWorkerError
from fedkd.engine.executors.serial import Serial
from fedkd.engine.held import shared
from fedkd.engine.ledger import Counted, Ledger
from fedkd.errors import ConfigError, RunError

log = logging.getLogger(__name__)

PATIENCE = 10
CHUNK = 64
"""Messages in memory at a time in a stream: enough to keep workers busy and stacks full."""

UserConfig = dict[str, bool | float | int | str]
Watch = Callable[[Sequence[Message], Sequence[Message], float], None]


@dataclass(frozen=True)
class Failure:
    """One message that got an error instead of an answer.

    ``traceback`` is empty where the client app itself answered with an error.
    """

    node_id: int
    partition_id: int
    message_type: str
    round: int
    error: str
    traceback: str


class LocalGrid(Grid):
    """Runs messages through ``client_app`` in this process.

    Args:
        client_app: a Flower ``ClientApp``, or any ``f(message, context) -> Message``.
        num_nodes: nodes; node ``1000 + p`` has ``partition-id`` p in its ``node_config``.
        run_config: given to every node.
        node_configs: extra ``node_config`` for each node, in partition order.
        executor: how the messages of one push are run; :class:`Serial` by default.
        ledger: counts bytes where given.
        costs: expected cost of a message, for the executor's order of starting.
        watch: told of every push: its messages, their replies, its seconds.
        copies: whether both sides get records of their own. An app that changes nothing of what it
            gets, and nothing more of what it has given, can do without.

    Messages to one node run in request order on one worker, since they share its ``Context``.
    Every message is answered before ``push_messages`` returns, so timeouts never strike.
    """

    def __init__(
        self,
        client_app: Callable[[Message, Context], Message],
        num_nodes: int,
        *,
        run_config: Mapping[str, Any] | None = None,
        node_configs: Sequence[Mapping[str, Any]] | None = None,
        executor: Executor | None = None,
        ledger: Ledger | None = None,
        costs: Callable[[Message], float] | None = None,
        watch: Watch | None = None,
        copies: bool = True,
    ) -> None:
        if node_configs is not None and len(node_configs) != num_nodes:
            raise ConfigError(
                f"node_configs has {len(node_configs)} entries for {num_nodes} nodes: give one each"
            )
        self.client_app, self.executor, self.ledger = client_app, executor or Serial(), ledger
        self.costs, self.watch, self.copies = costs, watch, copies
        self.failures: list[Failure] = []
        self.contexts = Contexts(num_nodes, dict(run_config or {}), node_configs)
        self._run = flower_private.empty_run(RUN_ID)
        self._sent = 0
        self._waiting_for_nodes = 0
        self._replies: dict[str, Message] = {}
        # Flower's legacy servers push from several threads at once.
        self._lock = threading.RLock()
        self._server_thread = threading.get_ident()

    def set_run(self, run: Any) -> None:
        """Replace the description of the run."""
        self._run = run

    @property
    def run(self) -> Any:
        """Flower's description of this run; only its ``run_id`` means something here."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a new message; apps of today call ``Message(...)`` instead."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Return the ids of all nodes in partition order.

        Raises:
            RunError: the server app keeps asking and sends nothing. It waits for more nodes than
                there are, and the number never changes here, so it would wait for ever.
        """
        if threading.get_ident() == self._server_thread:
            self._waiting_for_nodes += 1
            if self._waiting_for_nodes > PATIENCE:
                raise RunError(
                    f"the server app waits for more nodes than the {len(self.contexts)} there are:"
                    " lower its min_available_nodes, min_train_nodes and min_evaluate_nodes (2 by"
                    " default in Flower's strategies) or raise num_supernodes"
                )
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Run the messages and return their ids; the replies wait for :meth:`pull_messages`.

        Raises:
            TypeError: an item is not a message with content.
        """
        batch = list(messages)
        self._waiting_for_nodes = 0
        with self._lock:
            start = time.perf_counter()
            for message in batch:
                self._identify(message)
            outcomes = self._run_batch(batch)
            counted: Counted = {}
            replies = [
                self._settle(message, outcome, counted)
                for message, outcome in zip(batch, outcomes, strict=True)
            ]
            ids = [message.metadata.message_id for message in batch]
            self._replies.update(zip(ids, replies, strict=True))
            if self.watch is not None and batch:
                self.watch(batch, replies, time.perf_counter() - start)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return each reply once, in the order in which the messages were pushed."""
        with self._lock:
            wanted = set(message_ids)
            found = [known for known in self._replies if known in wanted]
            return [self._replies.pop(message_id) for message_id in found]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Run the messages and return one reply for each, in the same order."""
        return self.pull_messages(self.push_messages(messages))

    def stream(self, messages: Iterable[Message], chunk: int = CHUNK) -> Iterator[Message]:
        """Run the messages ``chunk`` at a time and yield one reply for each, in the same order.

        Messages are taken and replies given as the caller goes on, so memory does not grow with
        their number. Every message of a chunk is run before any of the next.

        Raises:
            TypeError: an item is not a message with content.
        """
        following = iter(messages)
        while batch := list(islice(following, chunk)):
            yield from self.send_and_receive(batch)

    def _identify(self, message: Message) -> None:
        if not isinstance(message, Message) or not message.has_content():
            raise TypeError(f"expected messages with content, got {message!r:.200}")
        self._sent += 1
        server = flower_private.SUPERLINK_NODE_ID
        flower_private.stamp(message, str(self._sent), self._run.run_id, server)

    def _run_batch(self, batch: list[Message]) -> list[Outcome[Message]]:
        by_node: dict[int, list[int]] = {}
        for index, message in enumerate(batch):
            by_node.setdefault(message.metadata.dst_node_id, []).append(index)
        given = self._readable(batch) if self.copies else batch
        tasks = [
            Task(node, tuple(given[index] for index in group), self.contexts.state(node))
            for node, group in by_node.items()
        ]
        cost = self.costs or (lambda _: 1.0)
        costs = [sum(cost(message) for message in task.messages) for task in tasks]
        done: dict[int, Outcome[Message]] = {}
        try:
            found = self.executor.map(self._serve, tasks, costs)
        except DeadWorkerError as error:
            raise RunError(_of_whom(tasks[error.index], error.how)) from None
        for (node, group), outcome in zip(by_node.items(), found, strict=True):
            answers, state = outcome.get()
            if state is not None:
                self.contexts.keep(node, state)
            done.update(zip(group, answers, strict=True))
        return [done[index] for index in range(len(batch))]

    def _readable(self, batch: list[Message]) -> list[Message]:
        """Return messages of which every array is cheap to read: one for all that are sent one."""
        made: dict[int, RecordDict] = {}
        for message in batch:
            if id(message.content) not in made:
                made[id(message.content)] = copied(message.content)
        return [flower_private.like(message, made[id(message.content)]) for message in batch]

    def _serve(self, task: Task) -> tuple[list[Outcome[Message]], RecordDict | None]:
        """Answer the messages of one node; what it returns is all that comes back of a worker.

        Returns the answers, and the state where it may have changed.
        """
        context, before = None, marks(task.state)
        if task.home in self.contexts:
            context = self.contexts.around(task.home, task.state)
        answers = [attempt(self._answer, message, context) for message in task.messages]
        if context is None or (context.state is task.state and unchanged(task.state, before)):
            return answers, None
        return answers, context.state

    def _answer(self, message: Message, context: Context | None) -> Message:
        """Call the client app; runs in a worker."""
        if context is None:
            raise _NoSuchNodeError(
                f"there is no node {message.metadata.dst_node_id}: the nodes are "
                f"{FIRST_NODE_ID} to {FIRST_NODE_ID + len(self.contexts) - 1}"
            )
        given = message
        if self.copies:
            given = flower_private.like(message, copied(message.content))
        reply = self.client_app(given, context)
        if not isinstance(reply, Message):
            raise TypeError(
                f"the client app returned {type(reply).__name__} for a {kind(message)!r} message; "
                "it must return a Message: `return Message(content, reply_to=message)`"
            )
        if reply.metadata.reply_to_message_id != message.metadata.message_id:
            raise ValueError(
                "the client app returned a message that answers none; make it with "
                "`Message(content, reply_to=message)`"
            )
        if self.copies and reply.has_content():
            reply.content = copied(reply.content)
        return reply

    def _settle(self, message: Message, outcome: Outcome[Message], counted: Counted) -> Message:
        """Turn an outcome into the reply, and write down what crossed the grid.

        ``counted``: what is known of the records of this batch, which many messages have in common.
        """
        metadata = message.metadata
        if outcome.error is None:
            reply = outcome.get()
            if reply.has_error():
                self._fail(message, f"error {reply.error.code}: {reply.error.reason}", "")
        else:
            missing = isinstance(outcome.error, _NoSuchNodeError)
            code = flower_private.NODE_UNAVAILABLE if missing else flower_private.CLIENT_APP_RAISED
            reply = Message(Error(code, repr(outcome.error)), reply_to=message)
            self._fail(message, repr(outcome.error), outcome.traceback)
        reply_id = f"{metadata.message_id}-reply"
        flower_private.stamp(reply, reply_id, self._run.run_id, metadata.dst_node_id)
        if self.ledger is not None and metadata.dst_node_id in self.contexts:
            round_, phase = round_of(message), kind(message)
            self.ledger.add(round_, phase, "down", message.content, counted)
            if reply.has_content():
                self.ledger.add(round_, phase, "up", reply.content)
        return reply

    def _fail(self, message: Message, error: str, trace: str) -> None:
        metadata = message.metadata
        failure = Failure(
            node_id=metadata.dst_node_id,
            partition_id=metadata.dst_node_id - FIRST_NODE_ID,
            message_type=kind(message),
            round=round_of(message),
            error=error,
            traceback=trace,
        )
        # A defect of the app fails every client in the same way: one traceback says it.
        known = any(f.traceback == trace for f in self.failures)
        self.failures.append(failure)
        log.error(
            "client %d failed in %r of round %d: %s%s",
            failure.partition_id,
            failure.message_type,
            failure.round,
            error,
            "" if known or not trace else f"\n{trace}",
        )


def _of_whom(task: Task, how: str) -> str:
    """Say what a worker died of, and whose work it did."""
    first = task.messages[0]
    return (
        f"a worker process {how} while {task.whose} answered "
        f"{kind(first)!r} of round {round_of(first)}; use engine.executor = 'thread', or fewer "
        "engine.workers where memory ran out"
    )


class _NoSuchNodeError(LookupError):
    """A message was sent to a node that does not exist."""


def kind(message: Message) -> str:
    """Return the message type, for instance ``train`` or ``query.logits``."""
    return str(message.metadata.message_type)


def round_of(message: Message) -> int:
    """Return the round that a message belongs to, or 0 where it belongs to none.

    That is its group id where it is a number (Flower's advice, and its legacy servers), else the
    ``server-round`` in its configuration (where Flower's strategies write it).
    """
    group = message.metadata.group_id
    if group.isdecimal():
        return int(group)
    for record in message.content.values():
        number = record.get("server-round") if isinstance(record, ConfigRecord) else None
        if isinstance(number, int):
            return number
    return 0


def copied(content: RecordDict) -> RecordDict:
    """Return new records with the same values, so that no side can change the other's.

    The bytes of arrays are immutable and stay shared: :func:`fedkd.engine.codec.decode` sees from
    that which arrays it has decoded before.
    """
    return flower_private.filled(
        RecordDict(), {name: _copied(record) for name, record in content.items()}
    )


def _copied(record: Any) -> ArrayRecord | MetricRecord | ConfigRecord:
    if isinstance(record, ArrayRecord):
        return flower_private.filled(ArrayRecord(), {k: shared(a) for k, a in record.items()})
    values = {k: list(v) if isinstance(v, list) else v for k, v in record.items()}
    empty = MetricRecord() if isinstance(record, MetricRecord) else ConfigRecord()
    return flower_private.filled(empty, values)
