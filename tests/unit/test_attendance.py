"""Lost uploads and the simulated clock: coins, deadlines, medians, and what a round leaves."""

import numpy as np
import pytest

from fedkd.clients.attendance import Attendance
from fedkd.clients.participation import Participation
from fedkd.engine.setup import prepare
from fedkd.engine.simulate import in_process
from fedkd.types import select

ROUNDS = range(1, 201)
LOSSY = {"clients.participation.dropout": 0.4, "rounds": 4}


def attendance(n=20, seed=0, examples=None, **options):
    return Attendance(Participation(**options), seed, tuple(examples or (10,) * n))


def test_dropouts_are_coins_of_their_own():
    part = attendance(dropout=0.2)
    share = sum(len(part.lost(t)) for t in ROUNDS) / (20 * len(ROUNDS))
    # 4,000 coins: four standard errors are 0.026.
    assert abs(share - 0.2) < 0.026
    few = attendance(scheme="poisson", ratio=0.3, dropout=0.2)
    for t in range(1, 30):
        assert few.lost(t) == [k for k in few.cohort(t) if k in part.lost(t)], "nested"
    assert set(attendance(dropout=0.1).lost(3)) <= set(attendance(dropout=0.5).lost(3))
    assert attendance(dropout=1.0).lost(1) == list(range(20))
    assert attendance(dropout=0.0).lost(1) == []


def test_the_median_client_takes_time_one():
    part = attendance(examples=[10, 20, 40], deadline=1.5)
    assert [part.time(t, k) for k in range(3) for t in (1, 2)] == [0.5, 0.5, 1, 1, 2, 2]
    assert part.lost(1) == [2]
    assert part.clock(1) == 1.5
    patient = attendance(examples=[10, 20, 40], deadline=2.0)
    assert patient.lost(1) == [] and patient.clock(1) == 2.0
    assert attendance(examples=[10, 20, 40]).clock(1) is None


def test_slowness_is_lognormal_over_clients_with_jitter_by_round():
    part = attendance(400, slowness=0.8)
    logs = np.log([part.time(1, k) for k in range(400)])
    # A client and a round: sigma^2 (1 + 1/4); the standard deviation of 400 is known to 15%.
    assert logs.std() == pytest.approx(0.8 * 1.25**0.5, rel=0.15)
    assert abs(np.median(logs)) < 0.2
    again = np.log([part.time(2, k) for k in range(400)])
    assert (logs - again).std() == pytest.approx(0.8 * 0.5 * 2**0.5, rel=0.15)
    assert part.clock(1) == pytest.approx(np.exp(logs.max()))
    assert part.lost(1) == [], "without a deadline everybody is waited for"


def test_a_deadline_cuts_the_clock_and_the_slow():
    patient, strict = attendance(slowness=1.0), attendance(slowness=1.0, deadline=1.5)
    for t in range(1, 20):
        slow = [k for k in range(20) if patient.time(t, k) > 1.5]
        assert strict.lost(t) == slow
        assert strict.clock(t) == min(1.5, patient.clock(t))
    assert any(strict.lost(t) for t in range(1, 20))
    assert len({tuple(strict.lost(t)) for t in range(1, 20)}) > 1, "jitter by round"


def test_nobody_takes_no_time_and_nobodys_examples_none():
    assert attendance(scheme="poisson", ratio=1e-9, slowness=1.0).clock(1) == 0.0
    assert attendance(examples=[0, 0, 5], slowness=1.0, deadline=1.0).clock(1) <= 1.0
    assert attendance(examples=[0, 0], deadline=1.0).clock(1) == 0.0


def test_a_pooled_strategy_is_always_there(tiny, play):
    changes = {**LOSSY, "clients.participation.slowness": 1.0, "rounds": 1}
    run = play(tiny("centralized", changes))
    attendance = run.prepared.attendance
    assert attendance.cohort(1) == [0] and attendance.lost(1) == []
    assert attendance.clock(1) is None and attendance.presence() == 1.0
    assert not [r for r in run.log.records if r.metric in ("lost", "clock")]


def test_lost_uploads_are_recorded_and_send_no_arrays(tiny, play):
    run = play(tiny("fedavg", LOSSY))
    part, log = run.prepared.attendance, run.log
    whole = play(tiny("fedavg", {"rounds": 1}))
    each = whole.ledger.totals(round=1, phase="train", direction="up").tensor / 4
    lost = {t: np.flatnonzero(log.by_client("lost", "train", t) == 1).tolist() for t in range(1, 5)}
    assert lost == {t: part.lost(t) for t in range(1, 5)}
    assert 0 < sum(map(len, lost.values())) < 16
    for t in range(1, 5):
        trained = np.flatnonzero(~np.isnan(log.by_client("loss/supervised", "train", t))).tolist()
        assert trained == part.cohort(t) == [0, 1, 2, 3], "all do their work"
        up = run.ledger.totals(round=t, phase="train", direction="up")
        assert up.tensor == each * (4 - len(lost[t]))
        down = run.ledger.totals(round=t, phase="train", direction="down")
        assert down.tensor == each * 4
    assert "failed" not in (run.folder.path / "events.log").read_text()


def test_clock_is_recorded_where_time_is_simulated(tiny, play):
    changes = {"clients.participation.slowness": 0.5, "clients.participation.deadline": 1.2}
    run = play(tiny("fedavg", {**changes, "rounds": 2}))
    part = run.prepared.attendance
    assert run.log.series("clock", "simulated") == {t: part.clock(t) for t in (1, 2)}
    plain = play(tiny("fedavg", {"rounds": 1}))
    assert run.log.series("clock", "simulated") and not plain.log.series("clock", "simulated")


def test_a_client_whose_upload_is_lost_keeps_what_it_learned(tiny, play, monkeypatch):
    experiment = tiny({"name": "fedper"}, {"rounds": 1})
    whole = play(experiment)
    monkeypatch.setattr(Attendance, "lost", lambda self, round_: [2])
    run = play(experiment)
    theirs, ours = (select(r.client_state(2), "model") for r in (whole, run))
    assert ours and ours.keys() == theirs.keys()
    assert all(ours[key].tobytes() == theirs[key].tobytes() for key in ours)
    assert any(run.state[key].tobytes() != whole.state[key].tobytes() for key in run.state)


def test_a_message_says_nothing_of_loss_where_there_is_none(tiny, play):
    run = play(tiny("fedavg"), rounds=0)
    with in_process():
        messages = list(run.strategy.train_messages(1, run.state, run.grid))
    said = [m.content["config"] for m in messages]
    assert len(said) == 4
    assert all(dict(config).keys() == {"server-round", "judge", "global"} for config in said)
    assert prepare(tiny("fedavg")).attendance.lossy is False
