"""Frozen results of the privacy study's quick runs: every method under every plan, on digits.

Noise multipliers and epsilon have to agree closely; accuracy and loss may differ as other
processors round differently. Regenerate after a change of results that is meant (and say so in the
changelog):

    python -m tests.golden.test_privacy_golden
"""

import json
import tempfile
from pathlib import Path

import pytest

from experiments.harness import run_job
from experiments.privacy.study import ALONE, HEURISTIC, TUNING_EPSILON, quick_jobs

FILE = Path(__file__).with_name("privacy.json")
JOBS = {job.name: job for job in quick_jobs(Path("unused"))}


def measure(name, folder):
    """Return accuracies and loss of the headline predictor, and what the ledger says was spent."""
    job = JOBS[name]
    said = run_job(type(job)(job.name, job.base, job.changes, folder))
    assert "FAILED" not in said, said
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    last = summary["readouts"]["composite"][summary["headline"]["predict"]]["last"]
    file, histories, epsilon = folder / "privacy.json", [], None
    if file.exists():
        report = json.loads(file.read_text(encoding="utf-8"))
        epsilon = report["epsilon"]
        histories = [c["history"] for c in report["clients"].values()]
    return {
        "user_accuracy": round(last["user_accuracy"], 4),
        "global_accuracy": round(last["global_accuracy"], 4),
        "loss": round(last["loss"], 4),
        "epsilon": epsilon,
        "noise": sorted({round(row[0], 4) for history in histories for row in history}),
    }


@pytest.mark.parametrize("name", JOBS)
def test_results_are_as_they_were(name, tmp_path):
    expected = json.loads(FILE.read_text(encoding="utf-8"))[name]
    found = measure(name, tmp_path / "run")
    assert found["noise"] == pytest.approx(expected["noise"], rel=1e-3)
    if expected["epsilon"] is None:
        assert found["epsilon"] is None
    else:
        assert found["epsilon"] == pytest.approx(expected["epsilon"], rel=1e-3)
    assert found["loss"] == pytest.approx(expected["loss"], rel=0.01)
    for key in ("user_accuracy", "global_accuracy"):
        assert found[key] == pytest.approx(expected[key], abs=0.03), key


def test_everything_that_is_released_was_paid_for():
    frozen = json.loads(FILE.read_text(encoding="utf-8"))
    assert frozen.keys() == JOBS.keys()
    for name, entry in frozen.items():
        label = name.split(" / ")[1]
        if label == ALONE or label in HEURISTIC:
            assert entry["epsilon"] is None and entry["noise"] == []
        else:
            assert 0 < entry["epsilon"] <= TUNING_EPSILON and min(entry["noise"]) > 0.5


def test_the_frozen_runs_differ():
    losses = [entry["loss"] for entry in json.loads(FILE.read_text(encoding="utf-8")).values()]
    assert len(set(losses)) == len(losses)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as root:
        made = {name: measure(name, Path(root) / str(i)) for i, name in enumerate(JOBS)}
    FILE.write_text(json.dumps(made, indent=1, sort_keys=True) + "\n", encoding="utf-8")
