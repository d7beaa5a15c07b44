"""Frozen results of the family's quick study: every method on digits, at its card's defaults.

Bytes have to be equal; accuracy and loss may differ as other processors round differently.
Regenerate after a change of results that is meant (and say so in the changelog):

    python -m tests.golden.test_family_golden
"""

import json
import tempfile
from pathlib import Path

import pytest

from experiments.family.study import METHODS, QUICK, quick_jobs
from experiments.harness import run_job
from fedkd.strategies.base import strategies

FILE = Path(__file__).with_name("family.json")
JOBS = {job.name: job for job in quick_jobs(Path("unused"))}
LOOSE = {"dense, one shot", "co-boosting, one shot", "dfrd", "fedftg", "feddf, generated"}
"""Methods with an adversary: rounding grows through alternating steps of Adam."""


def measure(label, folder):
    """Return user and global accuracy and loss of the headline predictor, and bytes."""
    job = JOBS[label]
    said = run_job(type(job)(job.name, job.base, job.changes, folder))
    assert "FAILED" not in said, said
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    last = summary["readouts"]["composite"][summary["headline"]["predict"]]["last"]
    return {
        "user_accuracy": round(last["user_accuracy"], 4),
        "global_accuracy": round(last["global_accuracy"], 4),
        "loss": round(last["loss"], 4),
        "bytes": {k: v for k, v in summary["bytes"].items() if "wire" not in k},
    }


@pytest.mark.parametrize("label", JOBS)
def test_results_are_as_they_were(label, tmp_path):
    expected = json.loads(FILE.read_text(encoding="utf-8"))[label]
    found = measure(label, tmp_path / "run")
    assert found["bytes"] == expected["bytes"]
    loss, accuracy = (0.1, 0.06) if label in LOOSE else (5e-3, 0.025)
    assert found["loss"] == pytest.approx(expected["loss"], rel=loss)
    for key in ("user_accuracy", "global_accuracy"):
        assert found[key] == pytest.approx(expected[key], abs=accuracy), key


def test_every_strategy_is_in_the_family():
    named = {m[0]["strategy"] for m in METHODS.values() if isinstance(m[0]["strategy"], str)}
    named |= {
        m[0]["strategy"]["name"] for m in METHODS.values() if isinstance(m[0]["strategy"], dict)
    }
    built_in = [n for n in strategies.names() if strategies.get(n).__module__.startswith("fedkd.")]
    assert named == set(built_in)
    assert json.loads(FILE.read_text(encoding="utf-8")).keys() == METHODS.keys()


def test_the_frozen_methods_differ():
    frozen = json.loads(FILE.read_text(encoding="utf-8"))
    assert QUICK["rounds"] > 1
    losses = {label: entry["loss"] for label, entry in frozen.items()}
    for i, (label, one) in enumerate(losses.items()):
        for other in list(losses)[:i]:
            assert one != losses[other], f"{label} and {other} cannot be told apart here"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as root:
        made = {label: measure(label, Path(root) / str(i)) for i, label in enumerate(JOBS)}
    FILE.write_text(json.dumps(made, indent=1, sort_keys=True) + "\n", encoding="utf-8")
