from __future__ import annotations

import logging
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity

from fedkd.engine.codec import decode, encode
from fedkd.engine.executors import Executor, Serial, Threads
from fedkd.engine.flower_private import CLIENT_APP_RAISED, NODE_UNAVAILABLE, task_identity
from fedkd.engine.grid import FIRST_NODE_ID, LocalGrid, copied, round_of
from fedkd.engine.ledger import Ledger
from fedkd.errors import ConfigError, RunError

BOTH = pytest.mark.parametrize("executor", [Serial(), Threads(workers=3)], ids=["serial", "thread"])


@pytest.fixture(autouse=True)
def identity() -> Iterator[None]:
    with task_identity(1):
        yield


def echo(message: Message, context: Context) -> Message:
    return Message(message.content, reply_to=message)


def ask(node: int, kind: str = "train", group: str = "1", **metrics: float) -> Message:
    content = RecordDict({"m": MetricRecord(dict(metrics)), "a": encode({"model/w": np.ones(2)})})
    return Message(content, FIRST_NODE_ID + node, kind, group_id=group)


def count_calls(message: Message, context: Context) -> Message:
    calls = int(context.state["calls"]["n"]) + 1 if "calls" in context.state else 1
    context.state["calls"] = MetricRecord({"n": calls})
    content = RecordDict(
        {"m": MetricRecord({"n": calls, "p": context.node_config["partition-id"]})}
    )
    return Message(content, reply_to=message)


def told(replies: list[Message]) -> list[tuple[int, ...]]:
    return [tuple(reply.content["m"].values()) for reply in replies]


def test_nodes_are_in_partition_order_with_their_configs() -> None:
    extra = [{"model": "cnn"}, {"model": "mlp", "partition-id": 7}]
    grid = LocalGrid(echo, 2, run_config={"lr": 0.1}, node_configs=extra)
    assert grid.get_node_ids() == [1000, 1001]
    assert [node.node_id for node in grid.get_nodes()] == [1000, 1001]
    first, second = grid.contexts.values()
    assert first.node_config == {"partition-id": 0, "num-partitions": 2, "model": "cnn"}
    assert second.node_config["partition-id"] == 7
    assert first.run_config == {"lr": 0.1}
    assert first.run_config is not second.run_config
    with pytest.raises(ConfigError, match="3 nodes"):
        LocalGrid(echo, 3, node_configs=extra)


@BOTH
def test_replies_come_in_request_order(executor: Executor) -> None:
    grid = LocalGrid(count_calls, 4, executor=executor, costs=lambda m: m.metadata.dst_node_id)
    replies = grid.send_and_receive([ask(n) for n in (2, 0, 3)])
    assert told(replies) == [(1, 2), (1, 0), (1, 3)]
    assert [r.metadata.src_node_id for r in replies] == [1002, 1000, 1003]
    assert {(r.metadata.message_type, r.metadata.group_id) for r in replies} == {("train", "1")}


@BOTH
def test_messages_to_one_node_run_in_order_on_its_state(executor: Executor) -> None:
    grid = LocalGrid(count_calls, 2, executor=executor)
    replies = grid.send_and_receive([ask(n) for n in (1, 0, 1, 1, 0)])
    assert told(replies) == [(1, 1), (1, 0), (2, 1), (3, 1), (2, 0)]
    assert int(grid.contexts[1001].state["calls"]["n"]) == 3


def test_replies_are_pulled_once_and_only_for_known_ids() -> None:
    grid = LocalGrid(count_calls, 3)
    ids = grid.push_messages(ask(n) for n in range(3))
    assert len(set(ids)) == 3
    late_first = grid.pull_messages([ids[2], "unknown", ids[1]])
    assert [r.metadata.reply_to_message_id for r in late_first] == [ids[1], ids[2]]
    assert len(grid.pull_messages(ids)) == 1
    assert grid.pull_messages(ids) == []
    assert grid.send_and_receive([]) == []


@BOTH
def test_a_failing_client_becomes_an_error_reply(
    executor: Executor, caplog: pytest.LogCaptureFixture
) -> None:
    def work(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] in (1, 2):
            raise ValueError("no data here")
        return echo(message, context)

    grid = LocalGrid(work, 4, executor=executor)
    with caplog.at_level(logging.ERROR):
        replies = grid.send_and_receive([ask(n, group="5") for n in range(4)])
    assert [r.has_error() for r in replies] == [False, True, True, False]
    assert replies[1].error.code == CLIENT_APP_RAISED
    assert replies[1].error.reason == "ValueError('no data here')"
    assert replies[1].metadata.src_node_id == 1001
    failure = grid.failures[0]
    assert (failure.partition_id, failure.message_type, failure.round) == (1, "train", 5)
    assert 'raise ValueError("no data here")' in failure.traceback
    assert [f.partition_id for f in grid.failures] == [1, 2]
    assert "client 1 failed in 'train' of round 5: ValueError" in caplog.text
    assert caplog.text.count("Traceback") == 1


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (None, "returned NoneType for a 'train' message"),
        ({"loss": 1}, "return Message\\(content, reply_to=message\\)"),
        ("fresh", "answers none"),
    ],
)
def test_what_is_no_reply_becomes_an_error_reply(answer: object, says: str) -> None:
    def work(message: Message, context: Context) -> object:
        return ask(0) if answer == "fresh" else answer

    grid = LocalGrid(work, 1)  # type: ignore[arg-type]
    (reply,) = grid.send_and_receive([ask(0)])
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(reply.error.reason)
    assert len(grid.failures) == 1


def test_an_error_that_the_app_answers_is_listed_too() -> None:
    def refuse(message: Message, context: Context) -> Message:
        return Message(Error(6, "clip first"), reply_to=message)

    grid = LocalGrid(refuse, 1)
    (reply,) = grid.send_and_receive([ask(0)])
    assert (reply.error.code, grid.failures[0].error) == (6, "error 6: clip first")


def test_an_unknown_node_is_answered_with_an_error() -> None:
    ledger = Ledger()
    grid = LocalGrid(echo, 2, ledger=ledger)
    replies = grid.send_and_receive([ask(0), ask(9)])
    assert replies[1].error.code == NODE_UNAVAILABLE
    assert "no node 1009: the nodes are 1000 to 1001" in str(replies[1].error.reason)
    assert ledger.totals(direction="down").messages == 1


@pytest.mark.parametrize("item", [None, "message", RecordDict()])
def test_what_is_no_message_is_refused(item: object) -> None:
    with pytest.raises(TypeError, match="expected messages with content"):
        LocalGrid(echo, 1).push_messages([item])  # type: ignore[list-item]


def test_neither_side_can_change_what_the_other_holds() -> None:
    def vandal(message: Message, context: Context) -> Message:
        seen = [float(np.sum(a)) for a in decode(message.content["a"]).values()]
        seen += list(message.content["c"]["list"])
        message.content["a"]["model/w"].data = b""
        del message.content["a"]["model/w"]
        message.content["c"]["list"].append(9.0)
        context.state["kept"] = MetricRecord({"seen": seen})
        content = RecordDict({"kept": context.state["kept"]})
        return Message(content, reply_to=message)

    shared = RecordDict({"a": encode({"model/w": np.ones(2)}), "c": ConfigRecord({"list": [1.0]})})
    grid = LocalGrid(vandal, 2)
    replies = grid.send_and_receive(
        [Message(shared, node, "train") for node in grid.get_node_ids()]
    )
    assert [r.content["kept"]["seen"] for r in replies] == [[2.0, 1.0], [2.0, 1.0]]
    replies[0].content["kept"]["seen"] = [0.0]
    del replies[1].content["kept"]
    for context in grid.contexts.values():
        assert context.state["kept"]["seen"] == [2.0, 1.0]


def test_copies_share_the_bytes_so_that_a_broadcast_is_decoded_once() -> None:
    content = RecordDict({"a": encode({"model/w": np.ones(2)})})
    cache: dict = {}
    views = [decode(copied(content)["a"], cache)["model/w"] for _ in range(3)]
    assert views[0] is views[1] is views[2]


def test_copies_keep_every_kind_of_record() -> None:
    content = RecordDict(
        {
            "c": ConfigRecord({"b": True, "s": "x", "raw": b"1", "l": ["a"]}),
            "m": MetricRecord({"i": 1, "f": [1.0]}),
            "a": ArrayRecord({"x": Array(np.zeros(2))}),
        }
    )
    assert copied(content) == content
    assert copied(content)["c"]["l"] is not content["c"]["l"]


@BOTH
def test_ledger_counts_in_request_order(executor: Executor) -> None:
    ledger = Ledger()
    grid = LocalGrid(echo, 3, executor=executor, ledger=ledger)
    grid.send_and_receive([ask(n, "query.logits", "2", x=float(n)) for n in range(3)])
    grid.send_and_receive([ask(0, "evaluate", "")])
    rows = [(r["round"], r["phase"], r["direction"], r["messages"]) for r in ledger.state_dict()]
    assert rows == [
        (2, "query.logits", "down", 3),
        (2, "query.logits", "up", 3),
        (0, "evaluate", "down", 1),
        (0, "evaluate", "up", 1),
    ]
    assert ledger.totals(round=2, direction="up").tensors == {"model": 48}


@pytest.mark.parametrize(
    ("group", "config", "round"),
    [("7", {}, 7), ("", {"server-round": 4}, 4), ("3", {"server-round": 4}, 3), ("x", {}, 0)],
)
def test_the_round_is_found_where_flower_writes_it(group: str, config: dict, round: int) -> None:
    content = RecordDict({"arrays": encode({"w": np.ones(1)}), "config": ConfigRecord(config)})
    assert round_of(Message(content, 1000, "train", group_id=group)) == round


def test_a_server_that_waits_for_more_nodes_is_told_so() -> None:
    grid = LocalGrid(echo, 1)
    for _ in range(50):
        grid.get_node_ids()
        grid.send_and_receive([])
    polls: list[list[int]] = []
    with pytest.raises(RunError, match=r"more nodes than the 1 .* min_available_nodes"):
        while len(grid.get_node_ids()) < 2:
            polls.append([])
    assert 3 < len(polls) < 30


def test_background_threads_may_ask_for_nodes_for_ever() -> None:
    grid, counted = LocalGrid(echo, 2), []
    thread = threading.Thread(target=lambda: counted.extend(grid.get_node_ids() for _ in range(99)))
    thread.start()
    thread.join()
    assert len(counted) == 99


def test_messages_may_be_pushed_from_several_threads() -> None:
    grid = LocalGrid(count_calls, 4)
    seen: list[tuple[int, ...]] = []
    threads = [
        threading.Thread(target=lambda n=n: seen.extend(told(grid.send_and_receive([ask(n)] * 5))))
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 4
    assert all(context.state["calls"]["n"] == 5 for context in grid.contexts.values())


def test_run_and_create_message() -> None:
    grid = LocalGrid(ClientApp(), 1)
    assert grid.run.run_id == 1
    message = grid.create_message(RecordDict(), "query", 1000, "3")
    assert (message.metadata.message_type, message.metadata.group_id) == ("query", "3")
    other = type(grid.run).create_empty(7)
    grid.set_run(other)
    grid.push_messages([message])
    assert (grid.run.run_id, message.metadata.run_id) == (7, 7)


def test_identity_is_exclusive_and_put_back() -> None:
    assert TaskIdentity.run_id == 1
    with pytest.raises(RunError, match="another simulation"), task_identity(2):
        pass
    assert TaskIdentity.run_id == 1
