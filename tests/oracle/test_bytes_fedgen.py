"""Bytes of FedGen against closed forms: weights and counts up; weights, generator, labels down."""

import pytest

CLASSES, LATENT, FLOAT = 10, 12, 4
HEAD = LATENT * CLASSES + CLASSES
MODEL = 64 * 16 + 16 + 16 * LATENT + LATENT + HEAD


def generator(noise, hidden):
    """Linear from noise and one-hot label, LayerNorm, ReLU, linear to the latent features."""
    return (noise + CLASSES) * hidden + hidden + 2 * hidden + hidden * LATENT + LATENT


@pytest.mark.parametrize(("share", "params"), [("model", MODEL), ("head", HEAD)])
@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_up_and_down(share, params, ratio, tiny, play):
    strategy = {"name": "fedgen", "share": share, "noise": 6, "generator_hidden": 9}
    strategy["generator_steps"] = 2
    changes = {"rounds": 3, "evaluate.every": 3, "clients.participation.ratio": ratio}
    run = play(tiny(strategy, changes))
    k = int(4 * ratio)

    def moved(round_, direction):
        return run.ledger.totals(round=round_, phase="train", direction=direction).tensors

    for round_ in (1, 2, 3):
        assert moved(round_, "up") == {
            "model": k * params * FLOAT,
            "counts": k * CLASSES * FLOAT,
        }
    assert moved(1, "down") == {"model": k * params * FLOAT}
    for round_ in (2, 3):
        assert moved(round_, "down") == {
            "model": k * params * FLOAT,
            "generator": k * generator(6, 9) * FLOAT,
            "counts": k * CLASSES * FLOAT,
        }
    judged = run.ledger.totals(round=3, phase="evaluate", direction="down").tensors
    assert judged == {"model": 4 * params * FLOAT}
