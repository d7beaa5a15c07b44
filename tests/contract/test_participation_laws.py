"""Strategies under lost uploads, empty rounds and clients that are seldom there."""

import numpy as np
import pytest
from flwr.serverapp import ServerApp

from fedkd.clients.attendance import Attendance
from fedkd.engine.client_app import ClientSide
from fedkd.engine.codec import decode
from fedkd.engine.failures import replay
from fedkd.engine.flower_strategy import FlowerStrategy
from fedkd.engine.folder import RunFolder
from fedkd.engine.setup import prepare
from fedkd.engine.simulate import in_process, simulate
from fedkd.engine.simulation import Run

AT = "clients.participation."
STRATEGIES = [
    pytest.param({"name": "fedavg"}, id="fedavg"),
    pytest.param({"name": "fedd2s", "server_epochs": 1, "head_hidden": 8}, id="fedd2s"),
    pytest.param({"name": "fd"}, id="fd"),
    pytest.param({"name": "fedgen", "generator_steps": 4}, id="fedgen"),
    pytest.param({"name": "fedmd"}, id="fedmd"),
]
every = pytest.mark.parametrize("strategy", STRATEGIES)
ROUGH = {
    AT + "scheme": "poisson",
    AT + "ratio": 0.8,
    AT + "availability": "power-law",
    AT + "exponent": 0.3,
    AT + "dropout": 0.3,
    AT + "slowness": 0.6,
    AT + "deadline": 1.6,
    "rounds": 5,
    "seed": 3,
}


@pytest.fixture(scope="module")
def rough(tiny, play):
    """Return ``rough(strategy)``: an undisturbed serial run, played once."""
    played = {}

    def get(strategy):
        if strategy["name"] not in played:
            played[strategy["name"]] = play(tiny(strategy, ROUGH))
        return played[strategy["name"]]

    return get


def finite(run):
    for state in (run.state, *(run.client_state(k) for k in range(4))):
        assert all(np.isfinite(a).all() for a in state.values() if a.dtype.kind == "f")
    assert np.isfinite(run.log.table("accuracy", "test", "composite", "personal")).all()


@every
def test_rough_rounds_are_survived(strategy, rough):
    run, part = rough(strategy), rough(strategy).prepared.attendance
    rounds = range(1, 6)
    assert any(part.lost(t) for t in rounds), "choose a seed with lost uploads"
    assert any(not set(part.cohort(t)) - set(part.lost(t)) for t in rounds), "and a round of none"
    finite(run)
    for t in rounds:
        lost = np.flatnonzero(run.log.by_client("lost", "train", t) == 1).tolist()
        assert lost == part.lost(t)
        came = np.flatnonzero(~np.isnan(run.log.by_client("loss/supervised", "train", t)))
        assert came.tolist() == part.cohort(t)
    assert run.log.series("clock", "simulated").keys() == set(rounds)
    assert "failed" not in (run.folder.path / "events.log").read_text()


@every
def test_threads_and_resume_give_the_same_bits(strategy, rough, tiny, play, bits, values):
    serial = rough(strategy)
    threads = {"engine.executor": "thread", "engine.workers": 3, "engine.checkpoint_every": 1}
    part = play(tiny(strategy, {**ROUGH, **threads}), rounds=2)
    resumed = Run(prepare(tiny(strategy, {**ROUGH, **threads})), RunFolder(part.folder.path))
    play(tiny(strategy, {**ROUGH, **threads}), run=resumed)
    assert bits(resumed) == bits(serial)
    assert values(resumed) == values(serial)


@every
def test_a_lost_upload_is_absence_for_the_server_and_work_for_the_client(
    strategy, tiny, play, bits, monkeypatch
):
    experiment = tiny(strategy, {"rounds": 3})
    run, without, whole = (play(experiment, rounds=1) for _ in range(3))
    monkeypatch.setattr(Attendance, "lost", lambda self, round_: [1])
    with in_process():
        assert run.play(2) == []
    monkeypatch.undo()
    monkeypatch.setattr(Attendance, "cohort", lambda self, round_: [0, 2, 3])
    with in_process():
        assert without.play(2) == []
    monkeypatch.undo()
    with in_process():
        assert whole.play(2) == []
    found, absent, there = bits(run), bits(without), bits(whole)
    assert found["server"] == absent["server"] != there["server"]
    assert found["client 1"] == there["client 1"]
    assert all(found[f"client {k}"] == absent[f"client {k}"] for k in (0, 2, 3))


@every
def test_a_round_in_which_all_are_lost_changes_nothing_on_the_server(strategy, tiny, play, bits):
    all_lost = {AT + "dropout": 1.0, "rounds": 2}
    run = play(tiny(strategy, all_lost))
    fresh = Run(prepare(tiny(strategy, all_lost)), RunFolder(run.folder.path.with_name("fresh")))
    fresh.begin()
    assert bits(run)["server"] == bits(fresh)["server"]
    assert not run.ledger.totals(phase="train", direction="up").tensors
    assert (run.log.by_client("lost", "train", 2) == 1).all()
    finite(run)


@every
def test_cyclic_turns_are_played_to_the_end(strategy, tiny, play):
    run = play(tiny(strategy, {AT + "scheme": "cyclic", AT + "ratio": 0.25, "rounds": 5}))
    trained = [
        np.flatnonzero(~np.isnan(run.log.by_client("loss/supervised", "train", t))).tolist()
        for t in range(1, 6)
    ]
    assert sorted(k for cohort in trained[:4] for k in cohort) == [0, 1, 2, 3]
    assert trained[4] == trained[0]
    finite(run)


def test_flowers_start_loses_the_same_uploads(tiny, play):
    experiment = tiny("fedavg", ROUGH)
    ours, prepared, results = play(experiment), prepare(experiment), []
    server, strategy = ServerApp(), FlowerStrategy(prepared)

    @server.main()
    def main(grid, context):
        results.append(strategy.start(grid, strategy.initial_arrays(), num_rounds=5))

    assert simulate(server, ClientSide(prepared).app(), 4).failures == []
    final = decode(results[0].arrays)
    assert final.keys() == ours.state.keys()
    assert all(final[key].tobytes() == ours.state[key].tobytes() for key in final)


def test_a_failure_beside_lost_uploads_ends_nothing_and_is_replayed(tiny, play, monkeypatch):
    run = play(tiny("fedavg", {AT + "dropout": 0.5, "rounds": 2}), rounds=1)
    kind = type(run.prepared.strategy)
    work = kind.local_update

    def local_update(self, client, received):
        if client.info.id == 0:
            raise ZeroDivisionError("on purpose")
        return work(self, client, received)

    monkeypatch.setattr(kind, "local_update", local_update)
    monkeypatch.setattr(Attendance, "lost", lambda self, round_: [1, 2, 3])
    with in_process():
        (failure,) = run.play(2)
    assert "client 0" in failure
    kept = run.folder.path / "failures/round-2-client-0"
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        replay(kept)
    monkeypatch.undo()
    assert replay(kept)["client"] == 0
