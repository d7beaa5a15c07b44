"""Bytes of FedFTG and DFRD against closed forms: FedAvg's, and one label histogram a client."""

import pytest

CLASSES, D1, D2 = 10, 16, 12
FLOAT = INT = 4
PARAMS = (64 * D1 + D1) + (D1 * D2 + D2) + (D2 * CLASSES + CLASSES)
OTHER = (64 * 10 + 10) + (10 * CLASSES + CLASSES)
QUICK = {"server_steps": 2, "student_steps": 2, "generator_width": 2, "noise": 4}
each = pytest.mark.parametrize("name", ["fedftg", "dfrd"])


def moved(run, round_, direction, phase="train"):
    return run.ledger.totals(round=round_, phase=phase, direction=direction).tensors


@each
def test_weights_and_counts_and_never_a_generator(name, tiny, play):
    changes = {"clients.participation.ratio": 0.5, "rounds": 3, "evaluate.every": 3}
    run = play(tiny({"name": name, **QUICK}, changes))
    for round_ in (1, 2, 3):
        assert moved(run, round_, "down") == {"model": 2 * PARAMS * FLOAT}
        assert moved(run, round_, "up") == {
            "model": 2 * PARAMS * FLOAT,
            "counts": 2 * CLASSES * INT,
        }
    assert moved(run, 3, "down", "evaluate") == {"model": 4 * PARAMS * FLOAT}


@each
def test_each_client_moves_its_own_architecture(name, tiny, play):
    models = [{"name": "mlp", "hidden": [16, 12]}, {"name": "mlp", "hidden": [10]}]
    run = play(tiny({"name": name, **QUICK}, {"clients.models": models, "rounds": 1}))
    labels = [c.model for c in run.prepared.setting.clients]
    size = sum({"mlp": PARAMS, "mlp#2": OTHER}[label] for label in labels) * FLOAT
    assert len(set(labels)) == 2
    assert moved(run, 1, "down") == {"model": size}
    assert moved(run, 1, "up") == {"model": size, "counts": 4 * CLASSES * INT}
