"""A run that is killed and resumed ends with the bits of one that was never killed.

The process gets SIGKILL, which nothing can catch, in the moment in which a round shows up in
``metrics.jsonl``: in the middle of its checkpoint or just beside it.
"""

import json
import multiprocessing
import signal
import time

import pytest

from fedkd.config import experiment
from fedkd.engine.checkpoint import Checkpoint
from fedkd.engine.setup import resolve
from fedkd.engine.simulation import run

ROUNDS = 16
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


@pytest.fixture(scope="module")
def children():
    """Make processes that start at once: they are forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fedkd.engine.simulation", "sklearn.datasets"])
    return context


def kill_after(children, made, folder, round_):
    """Start a run in a process of its own and kill it when ``round_`` is written down."""
    child = children.Process(target=run, args=(made, folder), daemon=True)
    child.start()
    try:
        deadline = time.monotonic() + 120
        while rounds_in(folder / "metrics.jsonl") < round_:
            assert child.is_alive(), f"the run ended by itself: exit code {child.exitcode}"
            assert time.monotonic() < deadline, f"no round {round_} in two minutes"
            time.sleep(0.002)
    finally:
        child.kill()
        child.join()
    assert child.exitcode == -signal.SIGKILL, "it was killed too late"


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
def test_killed_and_resumed_equals_undisturbed(name, children, tmp_path):
    made, killed = small(*CASES[name]), tmp_path / "killed"
    kill_after(children, made, killed, 4)
    loaded = Checkpoint(killed / "checkpoint", resolve(made).digest()).load()
    done = loaded.round if loaded else 0
    assert 3 <= done < ROUNDS
    assert not (killed / "summary.json").exists()
    resumed = run(made, killed, resume=True)
    undisturbed = run(made, tmp_path / "whole")
    assert f"resumed after round {done}" in (killed / "events.log").read_text(encoding="utf-8")
    assert kept(killed) == kept(tmp_path / "whole")
    assert lines(killed) == lines(tmp_path / "whole")
    assert resumed["readouts"] == undisturbed["readouts"]
    assert resumed["bytes"] == undisturbed["bytes"]
    assert run(made, killed, resume=True) == resumed, "a finished run is not run again"
