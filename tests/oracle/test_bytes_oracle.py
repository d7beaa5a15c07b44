"""Bytes of a run against closed forms: what a paper would compute, and what the ledger counted."""

import numpy as np
import pytest

CLASSES, D1, D2 = 10, 16, 12
FLOAT = INT = 4
PARAMS = {"fc1": 64 * D1 + D1, "fc2": D1 * D2 + D2, "head": D2 * CLASSES + CLASSES}
HIDDEN = 8


def played(tiny, play, options, changes=None):
    strategy = {"name": "fedd2s", "head_hidden": HIDDEN, "server_epochs": 1, "kd_weight": 1.0}
    strategy |= {"first_drop": 0, "drop_every": 0, "drops": 0, **options}
    return play(tiny(strategy, {"rounds": 3, **(changes or {})}))


def moved(run, round_, direction, phase="train"):
    return run.ledger.totals(round=round_, phase=phase, direction=direction).tensors


def present(run):
    """Return which client trains on which class, (K, C)."""
    return run.prepared.federation.counts() > 0


def per_class(rows, d):
    return rows * (d + CLASSES + 2) * FLOAT


def of_head(d):
    return (d * HIDDEN + HIDDEN + HIDDEN * CLASSES + CLASSES) * FLOAT


def others(run, k):
    """Return how many of client k's classes somebody else holds too: its leave-one-out lesson."""
    held = present(run)
    return int((held[k] & (np.delete(held, k, 0).any(0))).sum())


def lesson(rows):
    return rows * (CLASSES * FLOAT + INT)


def test_weights_of_the_blocks_that_take_part(tiny, play):
    run = played(tiny, play, {"reading": "averaging", "drop_every": 1, "drops": 2, "kd_weight": 0})
    sizes = [sum(PARAMS.values()), PARAMS["fc1"] + PARAMS["fc2"], PARAMS["fc1"]]
    for round_, size in enumerate(sizes, start=1):
        assert moved(run, round_, "up") == {"model": 4 * size * FLOAT}
    # A block travels down once more in the round in which it is dropped.
    assert moved(run, 1, "down") == {"model": 4 * sizes[0] * FLOAT}
    assert moved(run, 2, "down") == {"model": 4 * sizes[0] * FLOAT}
    assert moved(run, 3, "down") == {"model": 4 * sizes[1] * FLOAT}


def test_weights_under_local_handover(tiny, play):
    options = {"reading": "averaging", "handover": "local", "kd_weight": 0, "first_drop": 2}
    run = played(tiny, play, {**options, "drops": 1})
    body = PARAMS["fc1"] + PARAMS["fc2"]
    assert moved(run, 2, "down") == {"model": 4 * body * FLOAT}


def test_soft_labels_of_the_output(tiny, play):
    options = {"reading": "averaging", "share": "leave_one_out"}
    run = played(tiny, play, options, {"data.partition.alpha": 0.1})
    weights = 4 * sum(PARAMS.values()) * FLOAT
    up = int(present(run).sum()) * (CLASSES + 2) * FLOAT
    down = sum(lesson(others(run, k)) for k in range(4))
    assert 0 < down < lesson(int(present(run).sum())), "some client holds a class alone"
    for round_ in (1, 2, 3):
        assert moved(run, round_, "up") == {"model": weights, "soft_labels": up}
    assert moved(run, 1, "down") == {"model": weights}
    assert moved(run, 2, "down") == {"model": weights, "soft_labels": down}


@pytest.mark.parametrize(("cut", "d"), [("fc1", D1), ("fc2", D2)])
def test_class_means_at_a_cut(cut, d, tiny, play):
    run = played(tiny, play, {"reading": "cut", "cuts": [cut], "share": "mean"})
    rows = int(present(run).sum())
    assert moved(run, 1, "down") == {}
    for round_ in (1, 2, 3):
        assert moved(run, round_, "up") == {"soft_labels": per_class(rows, d)}
    assert moved(run, 2, "down") == {"soft_labels": lesson(rows)}
    assert moved(run, 2, "down", "evaluate") == {"global_head": 4 * of_head(d)}


def test_every_example_at_a_cut(tiny, play):
    options = {"reading": "cut", "cuts": ["fc2"], "payload": "per_sample", "share": "own"}
    run = played(tiny, play, options)
    n = sum(c.examples for c in run.prepared.setting.clients)
    assert moved(run, 2, "up") == {"soft_labels": n * (D2 + CLASSES + 1) * FLOAT}
    assert moved(run, 2, "down") == {"soft_labels": n * CLASSES * FLOAT}


def test_a_head_sent_down(tiny, play):
    run = played(tiny, play, {"reading": "cut", "cuts": ["fc2"], "send": "head"})
    assert moved(run, 1, "down") == {}
    assert moved(run, 2, "down") == {"global_head": 4 * of_head(D2)}


def test_all_points_up_to_the_cut_and_the_moving_cut(tiny, play):
    options = {"reading": "up_to_cut", "drop_every": 1, "drops": 2, "share": "mean"}
    run = played(tiny, play, options)
    rows = int(present(run).sum())
    output, deep, shallow = rows * (CLASSES + 2) * FLOAT, per_class(rows, D2), per_class(rows, D1)
    ups = [moved(run, r, "up")["soft_labels"] for r in (1, 2, 3)]
    assert ups == [output + deep + shallow, deep + shallow, shallow]
    downs = [moved(run, r, "down").get("soft_labels", 0) for r in (1, 2, 3)]
    assert downs == [0, 2 * lesson(rows), lesson(rows)]


def test_no_distillation_means_no_lessons(tiny, play):
    run = played(tiny, play, {"reading": "cut", "cuts": ["fc2"], "kd_weight": 0})
    assert all(moved(run, r, "down") == {} for r in (1, 2, 3))


def test_the_records_are_the_ledger(tiny, play):
    run = played(tiny, play, {"reading": "averaging"})
    for round_ in (1, 2, 3):
        for direction in ("up", "down"):
            total = run.ledger.totals(round=round_, phase="train", direction=direction)
            series = run.log.series(f"bytes_{direction}", "train")
            assert series[round_] == total.tensor
            assert run.log.series(f"wire_bytes_{direction}", "train")[round_] == total.wire
            for kind, size in total.tensors.items():
                assert run.log.series(f"bytes_{direction}/{kind}", "train")[round_] == size


@pytest.mark.parametrize(
    ("strategy", "blocks"),
    [
        ("fedavg", ("fc1", "fc2", "head")),
        ("fedper", ("fc1", "fc2")),
        ({"name": "fedper", "personal_layers": 2}, ("fc1",)),
        ({"name": "lg-fedavg", "shared_layers": 1}, ("head",)),
        ("ditto", ("fc1", "fc2", "head")),
        ("local-only", ()),
    ],
)
def test_baselines(strategy, blocks, tiny, play):
    changes = {"clients.participation.ratio": 0.5, "evaluate.every": 3}
    run = play(tiny(strategy, changes))
    size = 2 * sum(PARAMS[b] for b in blocks) * FLOAT
    for round_ in (1, 2, 3):
        for direction in ("up", "down"):
            assert moved(run, round_, direction) == ({"model": size} if size else {})
