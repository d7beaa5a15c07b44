"""Bytes of class knowledge against closed forms, and the formulas that the literature gives.

C classes, C_k of them at client k, d features, M clients: FD sends ``sum_k C C_k`` numbers up and
``M C C`` down, FedProto ``sum_k d C_k`` up and ``M d C`` down; int32 labels come on top.
"""

import numpy as np
import pytest

CLASSES, D1, D2 = 10, 16, 12
FLOAT = INT = 4
CLIENTS = 4
PARAMS = (64 * D1 + D1) + (D1 * D2 + D2) + (D2 * CLASSES + CLASSES)
MODEL = CLIENTS * PARAMS * FLOAT
partitions = pytest.mark.parametrize(
    "partition", [{"name": "dirichlet", "alpha": 0.1}, "iid"], ids=["skewed", "iid"]
)


def moved(run, round_, direction, phase="train"):
    return run.ledger.totals(round=round_, phase=phase, direction=direction).tensors


def present(run):
    """Return which client trains on which class, (K, C)."""
    return run.prepared.federation.counts() > 0


def known_to_others(run):
    """Return by client how many classes somebody else holds: the rows of its lesson."""
    held = present(run)
    return [int(np.delete(held, k, 0).any(0).sum()) for k in range(CLIENTS)]


def of(rows, numbers, ints=1):
    return rows * (numbers * FLOAT + ints * INT)


@partitions
def test_fd(partition, tiny, play):
    run = play(tiny("fd", {"data.partition": partition}))
    rows, taught = int(present(run).sum()), known_to_others(run)
    assert moved(run, 1, "down") == {}
    for round_ in (1, 2, 3):
        assert moved(run, round_, "up") == {"soft_labels": of(rows, CLASSES)}
        assert moved(run, round_, "down", "evaluate") == {}
    for round_ in (2, 3):
        assert moved(run, round_, "down") == {"soft_labels": of(sum(taught), CLASSES)}
    if partition == "iid":
        held = [CLASSES] * CLIENTS
        up = sum(CLASSES * c for c in held) * FLOAT
        down = CLIENTS * CLASSES * CLASSES * FLOAT
        assert moved(run, 2, "up")["soft_labels"] - sum(held) * INT == up
        assert moved(run, 2, "down")["soft_labels"] - CLIENTS * CLASSES * INT == down
    else:
        assert rows < CLIENTS * CLASSES, "every client holds every class"


def test_fd_with_numbers_of_examples_and_with_weights(tiny, play):
    options = {"name": "fd", "label_weighting": "examples", "share_weights": True}
    run = play(tiny(options, {"evaluate.every": 1}))
    rows, taught = int(present(run).sum()), sum(known_to_others(run))
    assert moved(run, 2, "up") == {"soft_labels": of(rows, CLASSES, 2), "model": MODEL}
    assert moved(run, 2, "down") == {"soft_labels": of(taught, CLASSES), "model": MODEL}
    assert moved(run, 2, "down", "evaluate") == {"model": MODEL}


def test_fd_is_silent_without_its_weight(tiny, play):
    run = play(tiny({"name": "fd", "gamma": 0}))
    assert [moved(run, r, d) for r in (1, 2) for d in ("up", "down")] == [{}] * 4


def test_fd_sends_less_than_a_hundredth_of_fedavg(tiny, play):
    run = play(tiny("fd", {"model": "mlp", "rounds": 2}))
    parameters = 64 * 200 + 200 + 200 * 200 + 200 + 200 * CLASSES + CLASSES
    for direction in ("up", "down"):
        assert 0 < moved(run, 2, direction)["soft_labels"] < 0.01 * CLIENTS * parameters * FLOAT


@partitions
@pytest.mark.parametrize(("block", "d"), [(None, D2), ("fc1", D1)])
def test_fedproto(block, d, partition, tiny, play):
    options = {"block": block} if block else {}
    run = play(tiny({"name": "fedproto", **options}, {"data.partition": partition}))
    rows, classes = int(present(run).sum()), int(present(run).any(0).sum())
    assert moved(run, 1, "down") == {}
    for round_ in (1, 2, 3):
        assert moved(run, round_, "up") == {"prototypes": of(rows, d)}
        down = {"prototypes": of(CLIENTS * classes, d)}
        assert moved(run, round_, "down", "evaluate") == down
        assert round_ == 1 or moved(run, round_, "down") == down
    if partition == "iid":
        assert rows == classes * CLIENTS == CLASSES * CLIENTS
        assert moved(run, 2, "up")["prototypes"] - rows * INT == CLIENTS * d * CLASSES * FLOAT
        floats = moved(run, 2, "down")["prototypes"] - CLIENTS * CLASSES * INT
        assert floats == CLIENTS * d * CLASSES * FLOAT


@pytest.mark.parametrize("weighting", ["examples", "paper"])
def test_fedproto_with_numbers_of_examples(weighting, tiny, play):
    run = play(tiny({"name": "fedproto", "weighting": weighting}, {"rounds": 1}))
    assert moved(run, 1, "up") == {"prototypes": of(int(present(run).sum()), D2, 2)}


@pytest.mark.parametrize(
    ("options", "numbers", "ints"),
    [
        ({}, D2 + CLASSES, 2),
        ({"lam": 0}, D2, 2),
        ({"gamma": 0, "label_weighting": "uniform"}, D2 + CLASSES, 1),
    ],
    ids=str,
)
def test_fedhkd(options, numbers, ints, tiny, play):
    run = play(tiny({"name": "fedhkd", **options}, {"rounds": 2}))
    rows, classes = int(present(run).sum()), int(present(run).any(0).sum())
    assert moved(run, 1, "down") == {"model": MODEL}
    assert moved(run, 1, "up") == {"model": MODEL, "prototypes": of(rows, numbers, ints)}
    assert moved(run, 2, "down") == {
        "model": MODEL,
        "prototypes": of(CLIENTS * classes, numbers),
    }
    assert moved(run, 2, "down", "evaluate") == {"model": MODEL}
