"""A run that is killed and resumed ends with the bits of one that was never killed.

The process gets SIGKILL, which nothing can catch, in the moment in which a round shows up in
``metrics.jsonl``: in the middle of its checkpoint or just beside it.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fedkd
from fedkd.config import experiment
from fedkd.engine.checkpoint import Checkpoint
from fedkd.engine.simulation import run

ROUNDS = 16
CHILD = """
import sys, tomllib
from pathlib import Path
from fedkd.config import experiment
from fedkd.engine.simulation import run
folder = Path(sys.argv[1])
run(experiment(tomllib.loads((folder / "experiment.toml").read_text())), folder / "run")
"""
QUICK = {"server_epochs": 1, "head_hidden": 16}
CASES = {
    "averaging": (
        {"name": "fedd2s", "reading": "averaging", "drop_every": 4, "drops": 2, "kd_weight": 1.0},
        {"checkpoint_every": 1},
    ),
    "cut": ({"name": "fedd2s", "reading": "cut", "drop_every": 4, "drops": 1, **QUICK}, {}),
    "up_to_cut": (
        {"name": "fedd2s", "reading": "up_to_cut", "send": "head", "buffer_rounds": 3, **QUICK},
        {"checkpoint_every": 3},
    ),
    "ditto": ({"name": "ditto"}, {"executor": "thread", "workers": 2}),
}


def small(strategy, engine):
    return experiment(
        {
            "rounds": ROUNDS,
            "strategy": strategy,
            "model": {"name": "mlp", "hidden": [16, 12]},
            "data": {
                "source": {"name": "digits", "limit": 120, "test_limit": 40},
                "partition": {"name": "dirichlet", "alpha": 0.5},
            },
            "clients": {
                "count": 4,
                "participation": {"ratio": 0.5},
                "training": {"lr": 0.2, "batch_size": 16},
            },
            "engine": {"device": "cpu", "executor": "serial", **engine},
        }
    )


def rounds_in(file):
    """Return the last round that is written down completely."""
    if not file.exists():
        return 0
    lines = file.read_text(encoding="utf-8").split("\n")[:-1]
    return json.loads(lines[-1])["round"] if lines else 0


def kill_after(made, folder, round_):
    """Start a run in a process of its own and kill it when ``round_`` is written down."""
    folder.mkdir()
    (folder / "experiment.toml").write_text(made.toml(), encoding="utf-8")
    root = Path(fedkd.__file__).parent.parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", CHILD, str(folder)]
    with (folder / "child.log").open("wb") as log:
        child = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 120
            while rounds_in(folder / "run/metrics.jsonl") < round_:
                text = (folder / "child.log").read_text(errors="replace")
                assert child.poll() is None, f"the run ended by itself:\n{text}"
                assert time.monotonic() < deadline, f"no round {round_} in two minutes:\n{text}"
                time.sleep(0.002)
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
    return folder / "run"


def kept(folder):
    """Return the bytes of the state on disk and what the manifest says about them."""
    files = {f.name: f.read_bytes() for f in sorted((folder / "checkpoint").glob("*.safetensors"))}
    manifest = json.loads((folder / "checkpoint/checkpoint.json").read_text(encoding="utf-8"))
    body = manifest["body"]
    return files, body["files"], body["round"], body["experiment"]


def lines(folder):
    """Return the lines of ``metrics.jsonl`` without those that say how long something took."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [line for line in text.split("\n") if '"metric": "seconds"' not in line]


@pytest.mark.parametrize("name", CASES)
def test_killed_and_resumed_equals_undisturbed(name, tmp_path):
    made = small(*CASES[name])
    killed = kill_after(made, tmp_path / "killed", 4)
    loaded = Checkpoint(killed / "checkpoint", made.digest()).load()
    done = loaded.round if loaded else 0
    assert not (killed / "summary.json").exists(), "it was killed too late"
    assert done < ROUNDS
    resumed = run(made, killed, resume=True)
    undisturbed = run(made, tmp_path / "whole")
    assert f"resumed after round {done}" in (killed / "events.log").read_text(encoding="utf-8")
    assert kept(killed) == kept(tmp_path / "whole")
    assert lines(killed) == lines(tmp_path / "whole")
    assert resumed["readouts"] == undisturbed["readouts"]
    assert resumed["bytes"] == undisturbed["bytes"]
    assert run(made, killed, resume=True) == resumed, "a finished run is not run again"
