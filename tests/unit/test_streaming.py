"""Uploads are fused as they come: to the bits of ``aggregate``, in memory that knows no cohort."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from itertools import permutations

import numpy as np
import pytest
from flwr.app import Error, Message, MetricRecord, RecordDict

from fedkd.engine.codec import encode
from fedkd.engine.flower_strategy import FlowerStrategy
from fedkd.engine.intake import Intake
from fedkd.engine.setup import prepare
from fedkd.engine.simulate import in_process
from fedkd.rng import Rng
from fedkd.strategies.averaging import LAST_ROUND, Mean, average
from fedkd.strategies.fedavg import FedAvg
from fedkd.types import ClientInfo, Upload

CLIENTS = 300
LARGE = 5_000


def items(n=7):
    rng = Rng(3).numpy()
    shapes = {"w": (5, 40_000), "b": (3,), "n": ()}
    return [
        {k: np.asarray(rng.normal(size=s), np.float32) for k, s in shapes.items()} for _ in range(n)
    ]


def by_hand(arrays, weights):
    sums = {key: np.zeros(value.shape) for key, value in arrays[0].items()}
    for item, weight in zip(arrays, weights, strict=True):
        for key, value in item.items():
            sums[key] = sums[key] + value.astype(np.float64) * weight
    return {k: np.asarray(total / sum(weights)).astype(np.float32) for k, total in sums.items()}


@pytest.mark.parametrize(
    "weights", [[3, 1, 0, 12, 7, 1, 2], [1] * 7, [0, 0, 5, 0, 1, 2, 3], [0.3, 1.7, 2, 1, 1, 4, 9]]
)
def test_the_mean_is_the_sum_in_the_given_order_in_double_precision(weights):
    got, expected = average(items(), weights), by_hand(items(), weights)
    assert all(got[key].tobytes() == expected[key].tobytes() for key in expected)
    assert all(type(value) is np.ndarray for value in got.values())


def test_items_without_any_weight_count_alike_until_one_has_some():
    mean = Mean()
    mean.add({"w": np.float32([1.0])}, 0)
    mean.add({"w": np.float32([3.0])}, 0)
    assert average([{"w": np.float32([k])} for k in (1, 3)], [0, 0])["w"].tolist() == [2.0]
    mean.add({"w": np.float32([8.0])}, 2)
    assert mean.result()["w"].tolist() == [8.0]


def test_other_types_orders_and_keys_are_kept():
    first = {"f": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))}
    second = {"f": np.zeros((2, 3), np.float32), "i": np.array([1, 4])}
    mean = average([first, second], [1, 3])
    assert mean["f"].tolist() == [[0.0, 0.25, 0.5], [0.75, 1.0, 1.25]]
    assert mean["i"].tolist() == [1, 4] and mean["i"].dtype == np.int64
    with pytest.raises(ValueError, match="shapes to be averaged differ"):
        average([first, {"f": np.zeros((1, 3), np.float32)}], [1, 1])


@pytest.mark.parametrize("order", list(permutations([1, 4, 6])))
def test_uploads_are_handed_on_in_ascending_order_as_soon_as_that_is_known(order):
    taken = []
    intake = Intake([6, 1, 4, 9], taken.append)
    for k in order:
        intake.answered(k, upload(k))
    assert [u.client.id for u in taken] == [1, 4, 6], "9 comes last, it holds up nobody"
    intake.close()
    assert intake.taken == 3


def test_who_never_answers_holds_up_the_others_until_the_end():
    taken = []
    intake = Intake([1, 4, 6, 9], taken.append)
    intake.answered(9, upload(9))
    intake.answered(4, None)
    intake.answered(6, upload(6))
    assert taken == []
    intake.close()
    assert [u.client.id for u in taken] == [6, 9]


def upload(k, arrays=None):
    return Upload(client=ClientInfo(id=k, examples=k + 1, model="mlp"), arrays=arrays or {})


@pytest.fixture(scope="module")
def many(tiny):
    """A federation of 300 clients whose uploads have one large layer."""
    changes = {"clients.count": CLIENTS, "data.source.limit": 900, "data.validation": 0.0}
    changes |= {
        "data.source.test_limit": 330,
        "data.partition": "iid",
        "model": {"name": "mlp", "hidden": [4]},
    }
    return prepare(tiny("fedavg", changes))


def answers(prepared, strategy, round_, alive=None):
    """Yield a reply with a large upload for each message; client 7 fails, 8's upload is lost."""
    rng = Rng(0)
    state = strategy.initial() | {"model/large": np.zeros(LARGE, np.float32)}
    grid = Nodes(prepared)
    for message in strategy.train_messages(round_, state, grid):
        k = grid.client(message)
        message.metadata.__dict__.update(_message_id=str(k), _run_id=1, _src_node_id=1)
        if k == 7:
            reply = Message(Error(2, "broken"), reply_to=message)
        else:
            large = rng.child(k).numpy().normal(size=LARGE).astype(np.float32)
            content = RecordDict({"metrics": MetricRecord({"fit|loss": 1.0})})
            if k != 8:
                content["arrays"] = encode({"model/large": large}, own=True)
                if alive is not None:
                    alive.append(weakref.ref(content["arrays"]["model/large"].held))
            reply = Message(content, reply_to=message)
        reply.metadata.__dict__.update(_src_node_id=message.metadata.dst_node_id)
        yield reply


class Nodes:
    """As much of a grid as the server's side asks of it."""

    def __init__(self, prepared):
        self.ids = {1000 + c.id: c.id for c in prepared.setting.clients}

    def get_node_ids(self):
        return list(self.ids)

    def client(self, message):
        return self.ids[message.metadata.dst_node_id]

    def send_and_receive(self, messages):
        for message in messages:
            message.metadata.__dict__.update(_message_id="1", _run_id=1, _src_node_id=1)
            content = RecordDict({"metrics": MetricRecord({"client": self.client(message)})})
            reply = Message(content, reply_to=message)
            reply.metadata.__dict__.update(_src_node_id=message.metadata.dst_node_id)
            yield reply


def folded(prepared, reverse=False, alive=None):
    strategy = FlowerStrategy(prepared)
    with in_process():
        strategy.nodes(Nodes(prepared))
        replies = answers(prepared, strategy, 1, alive)
        state = strategy.initial() | {"model/large": np.zeros(LARGE, np.float32)}
        return strategy.fold_train(1, state, reversed(list(replies)) if reverse else replies)


def test_memory_of_a_round_does_not_depend_on_the_cohort(many):
    alive, most = [], 0

    class Watched(list):
        def append(self, ref):
            nonlocal most
            super().append(ref)
            most = max(most, sum(r() is not None for r in self))

    gc.disable()
    try:
        folded(many)
        tracemalloc.start()
        result = folded(many, alive=(alive := Watched()))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        gc.enable()
    assert len(alive) == CLIENTS - 2
    assert most <= 3, "only the upload that is being added, and the next"
    assert peak < 20 * 8 * LARGE, "a few sums in double precision, not 298 uploads"
    assert result.failures == ["client 7: broken"]
    assert [r.client for r in result.records if r.metric == "lost"] == [8]


def test_streamed_and_aggregated_at_once_are_the_same_bits(many, monkeypatch):
    streamed = folded(many)
    backwards = folded(many, reverse=True)
    monkeypatch.setattr(FedAvg, "reducer", lambda *_: None)
    at_once = folded(many)
    assert len(set(streamed.state["model/large"].tolist())) > 1
    for other in (backwards, at_once):
        assert list(other.state) == list(streamed.state)
        for key, value in streamed.state.items():
            assert value.tobytes() == other.state[key].tobytes(), key
    assert streamed.records == at_once.records
    assert streamed.failures == at_once.failures
    took = streamed.state[LAST_ROUND]
    assert np.flatnonzero(took == 0).tolist() == [7, 8]


def test_a_method_that_does_more_with_uploads_is_not_streamed_past(many):
    class More(FedAvg):
        def aggregate(self, state, uploads, round_, setting):
            return super().aggregate(state, uploads, round_, setting)

    assert FedAvg().reducer({}, 1, many.setting) is not None
    assert More().reducer({}, 1, many.setting) is None


def test_messages_are_made_when_they_are_asked_for(many, monkeypatch):
    made = []
    broadcast = FedAvg.broadcast
    monkeypatch.setattr(
        FedAvg, "broadcast", lambda self, *rest: made.append(rest[1].id) or broadcast(self, *rest)
    )
    strategy = FlowerStrategy(many)
    with in_process():
        messages = strategy.train_messages(1, strategy.initial(), Nodes(many))
        assert made == []
        first, second = next(messages), next(messages)
        assert made == [0, 1]
    one, other = (m.content["arrays"]["model/head.weight"] for m in (first, second))
    assert one is other, "what is broadcast to many is encoded once"
