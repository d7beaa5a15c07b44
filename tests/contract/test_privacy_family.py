"""Laws of privacy plans over every registered strategy: covered or refused, never in between."""

import itertools
import json

import numpy as np
import pytest
from flwr.serverapp import ServerApp

from fedkd.engine.client_app import ClientSide
from fedkd.engine.codec import decode
from fedkd.engine.flower_strategy import FlowerStrategy
from fedkd.engine.folder import RunFolder
from fedkd.engine.guard import Guard, check_covered
from fedkd.engine.setup import prepare
from fedkd.engine.simulate import in_process, simulate
from fedkd.engine.simulation import Run, run
from fedkd.errors import ConfigError
from fedkd.rng import stream
from fedkd.strategies.base import strategies
from fedkd.types import FEDERATION, ClientInfo, Upload, select

QUICK = {"generator_steps": 2, "server_steps": 2, "generator_width": 2, "generator_batch_size": 8}
OPTIONS = {
    "dense": {"synthesis_epochs": 2, "noise": 8, **QUICK},
    "co-boosting": {"synthesis_epochs": 2, "noise": 8, **QUICK},
    "fedftg": {"server_steps": 10, "generator_width": 2},
    "dfrd": {"server_steps": 10, "generator_width": 2},
    "feddf": {"server_steps": 4},
    "fedgen": {"generator_steps": 4},
    "fedmd": {"digest_loss": "kl", "fusion": "mean-probs", "temperature": 2.0},
}
SUMMED = {
    "fedavg": {"weighting": "uniform"},
    "fedavg-ft": {"weighting": "uniform"},
    "fedprox": {"weighting": "uniform"},
    "fedper": {"weighting": "uniform"},
    "lg-fedavg": {"weighting": "uniform"},
    "ditto": {"weighting": "uniform"},
    "fedgkd": {"weighting": "uniform"},
    "fedntd": {"weighting": "uniform"},
    "fml": {"weighting": "uniform"},
    "dho": {"weighting": "uniform"},
    "fedhkd": {"weighting": "uniform"},
    "fedd2s": {"weighting": "uniform", "share": "mean"},
    "fd": {"share": "mean"},
    "fedproto": {},
    "fedmd": OPTIONS["fedmd"],
    "ds-fl": {},
}
"""Strategies whose server reads sums over clients only, with the options that this takes."""
AVERAGED = [
    name
    for name, o in SUMMED.items()
    if o == {"weighting": "uniform"} and name not in ("fedhkd", "dho")
]
UNDECLARED = {"fedgkt", "fedcache", "fedkd-wu2022"}
"""Strategies that upload what no mechanism covers."""
CENTRAL = {
    "privacy.unit": "client",
    "privacy.noise_multiplier": 1.0,
    "privacy.delta": 1e-3,
    "clients.participation": {"scheme": "poisson", "ratio": 0.5},
}
LOCAL = {
    "privacy.unit": "client",
    "privacy.trust": "local",
    "privacy.adjacency": "replace-one",
    "privacy.noise_multiplier": 0.5,
    "privacy.delta": 1e-3,
}
EXAMPLE = {
    "privacy.unit": "example",
    "privacy.noise_multiplier": 1.0,
    "privacy.delta": 1e-4,
    "privacy.release.mode": "dpsgd+release",
    "privacy.release.noise_multiplier": 2.0,
}
EVERY = strategies.names()


def named(name, options=None):
    return {"name": name, **(OPTIONS.get(name, {}) if options is None else options)}


def finite(run):
    """Whether everything that the server and the clients keep is finite."""
    clients = range(run.prepared.federation.clients)
    for state in (run.state, *(run.client_state(k) for k in clients)):
        for key, value in state.items():
            assert np.isfinite(np.asarray(value, dtype=np.float64)).all(), key


@pytest.mark.parametrize("name", EVERY)
def test_what_is_uploaded_is_what_was_declared(name, tiny, play, monkeypatch):
    seen = []

    def spy(self, round_, uploads, state):
        seen.append(len(uploads))
        for upload in uploads:
            strategy, setting = self.prepared.strategy, self.prepared.setting
            received = strategy.broadcast(state, upload.client, round_, setting)
            payload = strategy.declare(received, upload.client, round_, setting)
            if payload is None:
                assert name in UNDECLARED
                continue
            check_covered(upload.arrays, payload, name)
        return uploads, []

    monkeypatch.setattr(Guard, "fold", spy)
    # What is summed as it comes has to be seen too.
    monkeypatch.setattr(FlowerStrategy, "_reducer", lambda self, round_, state: None)
    play(tiny(named(name)), rounds=2)
    assert sum(seen) > 0


def test_the_strategies_that_sums_are_enough_for():
    assert set(SUMMED) <= set(EVERY)


@pytest.mark.parametrize("name", EVERY)
def test_central_noise_covers_or_is_refused(name, tiny, play):
    chosen = tiny(named(name, SUMMED.get(name)), CENTRAL)
    if name not in SUMMED and name != "local-only":
        with pytest.raises(ConfigError, match="privacy"):
            prepare(chosen)
        return
    done = play(chosen)
    finite(done)
    spent = done.strategy.guard.ledger.epsilon()
    assert spent == 0 if name == "local-only" else 0 < spent < np.inf


@pytest.mark.parametrize("name", EVERY)
def test_local_noise_covers_or_is_refused(name, tiny, play):
    chosen = tiny(named(name), LOCAL)
    if name in UNDECLARED or name == "centralized":
        with pytest.raises(ConfigError, match="privacy"):
            prepare(chosen)
        return
    done = play(chosen, rounds=2)
    finite(done)
    of_clients = done.strategy.guard.ledger.client_epsilons()
    if name != "local-only":
        assert len(of_clients) == 4 and len(set(of_clients.values())) == 1


@pytest.mark.parametrize("name", EVERY)
def test_example_level_covers_or_is_refused(name, tiny, play):
    chosen = tiny(named(name), EXAMPLE)
    if name in UNDECLARED:
        with pytest.raises(ConfigError, match="privacy"):
            prepare(chosen)
        return
    done = play(chosen, rounds=2)
    finite(done)
    plan, ledger = done.prepared.plan, done.strategy.guard.ledger
    spent = ledger.client_epsilons()
    assert set(spent) == set(done.prepared.cohort_of)
    # What was planned is what was spent: two rounds of it.
    from fedkd.privacy.accounting import History, epsilon

    for k, value in spent.items():
        events = History([(z, q, 2 * steps) for z, q, steps in plan.round_of(k)])
        assert value == pytest.approx(epsilon(events, plan.delta, "rdp"))
        kept = History.from_rows(done.client_state(k)["privacy/history"])
        assert kept == events


COUNTED = {
    "ds-fl": {"fusion": "class-counts"},
    "fedmd": {"digest_loss": "kl", "fusion": "class-counts"},
    "fd": {"share_weights": True, "label_weighting": "examples"},
    "fedgen": {"generator_steps": 4},
}


@pytest.mark.parametrize("name", COUNTED)
def test_label_counts_leave_a_client_with_noise_only(name, tiny, play, monkeypatch):
    uploads = []

    def spy(self, round_, given, state):
        uploads.extend(given)
        return given, []

    monkeypatch.setattr(Guard, "fold", spy)
    done = play(tiny({"name": name, **COUNTED[name]}, EXAMPLE), rounds=1)
    for upload in uploads:
        held = np.bincount(done.prepared.federation.client(upload.client.id).train.y, minlength=10)
        for key, value in upload.arrays.items():
            if key.split("/")[-1] in ("counts", "labels") and value.shape == held.shape:
                assert not np.array_equal(value, held), key
    assert len(uploads) == 4


@pytest.mark.parametrize("name", SUMMED)
def test_what_one_client_is_sent_does_not_show_who_else_came(name, tiny, play):
    chosen = tiny(named(name, SUMMED[name]), CENTRAL)
    done = play(chosen, rounds=1)
    strategy, setting = done.prepared.strategy, done.prepared.setting
    guard, states = done.strategy.guard, []
    # The same release, made of the cohort of client 0 and of nobody but client 0.
    for members in ((0,), (0, 1, 2)):
        state = strategy.init(setting, stream(setting.seed, "server", "init"))
        for round_ in (1, 2, 3):
            payload = guard.payload(state, round_)
            if payload:
                released = guard.level.release(
                    [], payload, 2.0, guard.norm, stream(0, "same", round_)
                )
                everybody = ClientInfo(id=FEDERATION, examples=1, model=setting.clients[0].model)
                upload = Upload(
                    client=everybody,
                    arrays=released.arrays,
                    members=() if members == (0,) and round_ == 1 else members,
                )
                state, _ = strategy.aggregate(state, [upload], round_, setting)
        states.append(state)
    for client in (setting.clients[0], setting.clients[3]):
        one, two = (strategy.broadcast(s, client, 4, setting) for s in states)
        assert {k: v.tobytes() for k, v in one.items()} == {k: v.tobytes() for k, v in two.items()}


def test_two_runs_of_one_seed_share_no_noise(tiny, play):
    still = {"clients.training.lr": 1e-12, "clients.participation": {"scheme": "full"}}
    steps = []
    for z in (1.0, 2.0):
        changes = {**CENTRAL, **still, "privacy.noise_multiplier": z}
        done = play(tiny(named("fedavg", SUMMED["fedavg"]), changes), rounds=0)
        before = select(done.state, "model")
        play(done.experiment, rounds=1, run=done)
        after = select(done.state, "model")
        steps.append(np.concatenate([(after[k] - before[k]).ravel() for k in sorted(after)]))
    assert abs(np.corrcoef(*steps)[0, 1]) < 4 / np.sqrt(steps[0].size)


def test_a_client_that_cannot_be_bounded_is_silent_and_the_round_goes_on(tiny, play, monkeypatch):
    chosen = tiny(named("fedavg", SUMMED["fedavg"]), CENTRAL)
    kind = type(prepare(chosen).strategy)
    honest = kind.local_update

    def broken(self, client, received):
        update = honest(self, client, received)
        key = next(iter(update.arrays))
        update.arrays[key] = update.arrays[key].ravel()[:1]
        return update

    monkeypatch.setattr(kind, "local_update", broken)
    done = play(chosen, rounds=2)
    assert done.strategy.guard.ledger.epsilon() > 0
    finite(done)


@pytest.mark.parametrize("name", AVERAGED)
def test_no_noise_and_no_clipping_is_no_plan(name, tiny, play, bits):
    off = {"privacy.noise_multiplier": 0.0, "privacy.clipping.norm": float("inf")}
    full = {"clients.participation": {"scheme": "full"}}
    plain = play(tiny(named(name, SUMMED[name]), full))
    under = play(tiny(named(name, SUMMED[name]), {**CENTRAL, **off, **full}))
    assert bits(under) == bits(plain)
    assert under.strategy.guard.ledger.epsilon() == np.inf
    assert "inf" in under.strategy.guard.sentence()


@pytest.mark.parametrize("name", ["fedavg", "fedmd", "fd", "fedproto"])
def test_nobody_there_releases_noise_all_the_same(name, tiny, play):
    rare = {"clients.participation": {"scheme": "poisson", "ratio": 1e-6}}
    done = play(tiny(named(name, SUMMED[name]), {**CENTRAL, **rare}), rounds=0)
    before = dict(done.state)
    done = play(done.experiment, rounds=1, run=done)
    assert done.ledger.totals(phase="train").messages == 0
    assert 0 < done.strategy.guard.ledger.epsilon() < 1
    if name in ("fedavg", "fedmd"):
        assert any(
            key not in before or done.state[key].tobytes() != before[key].tobytes()
            for key in done.state
        )


def test_the_server_sees_one_noised_mean_and_no_upload(tiny, play, monkeypatch):
    seen = []
    chosen = tiny(named("fedavg", SUMMED["fedavg"]), CENTRAL)
    kind = type(prepare(chosen).strategy)
    plain = kind.aggregate

    def spy(self, state, uploads, round_, setting):
        seen.append(uploads)
        return plain(self, state, uploads, round_, setting)

    monkeypatch.setattr(kind, "aggregate", spy)
    done = play(chosen)
    assert [len(uploads) for uploads in seen] == [1, 1, 1]
    assert {u.client.id for uploads in seen for u in uploads} == {FEDERATION}
    cohorts = [done.strategy.cohort(r) for r in (1, 2, 3)]
    assert [list(u[0].members) for u in seen] == cohorts


@pytest.mark.parametrize("plan", [CENTRAL, LOCAL, EXAMPLE], ids=["central", "local", "example"])
def test_resume_and_threads_change_no_bit(plan, tiny, tmp_path, bits):
    changes = {**plan, "engine.checkpoint_every": 1, "rounds": 4}
    chosen = tiny(named("fedavg", SUMMED["fedavg"]), changes)
    whole = tmp_path / "whole"
    run(chosen, whole)
    part = Run(prepare(chosen), RunFolder(tmp_path / "part"))
    with in_process():
        part.restore()
        for round_ in (1, 2):
            part.play(round_)
    run(chosen, tmp_path / "part", resume=True)
    threaded = {**changes, "engine.executor": "thread", "engine.workers": 3}
    run(tiny(named("fedavg", SUMMED["fedavg"]), threaded), tmp_path / "threads")
    for other in ("part", "threads"):
        for file in ("metrics.jsonl", "privacy.json"):
            one, two = ((p / file).read_text() for p in (whole, tmp_path / other))
            if file == "metrics.jsonl":
                one, two = (
                    [line for line in text.splitlines() if '"seconds"' not in line]
                    for text in (one, two)
                )
            assert one == two, (other, file)


def test_the_noise_is_fresh_every_round_and_has_the_promised_scale(tiny, play):
    still = {"clients.training.lr": 1e-12, "privacy.clipping.norm": 0.5, "rounds": 2}
    full = {"clients.participation": {"scheme": "full"}}
    done = play(tiny(named("fedavg", SUMMED["fedavg"]), {**CENTRAL, **still, **full}), rounds=0)
    states = [select(done.state, "model")]
    for round_ in (1, 2):
        play(done.experiment, rounds=round_, run=done)
        states.append(select(done.state, "model"))
    steps = [
        np.concatenate([(b[k] - a[k]).ravel() for k in sorted(a)])
        for a, b in itertools.pairwise(states)
    ]
    n = steps[0].size
    # z C / n of 4 clients; the interval is four standard errors of a standard deviation wide.
    for step in steps:
        assert abs(step.std() / (1.0 * 0.5 / 4) - 1) < 4 / np.sqrt(2 * n)
    assert abs(np.corrcoef(*steps)[0, 1]) < 4 / np.sqrt(n)


def test_the_run_stops_before_the_round_that_would_exceed_the_budget(tiny, tmp_path):
    changes = {**CENTRAL, "rounds": 9, "privacy.max_epsilon": 4.5, "evaluate.every": 5}
    summary = run(tiny(named("fedavg", SUMMED["fedavg"]), changes), tmp_path / "run")
    assert "stopped after round" in summary["stopped"]
    report = json.loads((tmp_path / "run" / "privacy.json").read_text())
    spent = report["global"]["epsilon"]
    assert 0 < spent <= 4.5
    again = run(tiny(named("fedavg", SUMMED["fedavg"]), changes), tmp_path / "run", resume=True)
    assert again == summary
    # The last round that was paid for is judged, on everything.
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    records = [json.loads(line) for line in text.splitlines()]
    last = max(r["round"] for r in records)
    assert {"test", "validation", "global"} <= {
        r.get("split") for r in records if r["round"] == last
    }


@pytest.mark.parametrize("plan", [CENTRAL, LOCAL, EXAMPLE], ids=["central", "local", "example"])
def test_a_plan_holds_under_flowers_own_start(plan, tiny, play):
    chosen = tiny(named("fedavg", SUMMED["fedavg"]), {**plan, "rounds": 2})
    prepared = prepare(chosen)
    server, results, ledgers = ServerApp(), [], []

    @server.main()
    def main(grid, context):
        flower = FlowerStrategy(prepared)
        initial = flower.initial_arrays()
        results.append(flower.start(grid, initial_arrays=initial, num_rounds=2))
        ledgers.append(flower.guard.ledger)

    assert simulate(server, ClientSide(prepared).app(), 4).failures == []
    ours = play(chosen)
    theirs = decode(results[0].arrays)
    assert {k: v.tobytes() for k, v in ours.state.items()} == {
        k: v.tobytes() for k, v in theirs.items()
    }
    assert ledgers[0].state_dict() == ours.strategy.guard.ledger.state_dict()
