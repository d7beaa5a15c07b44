"""What every registered strategy promises; a new one is covered by its name alone."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from flwr.serverapp import ServerApp

from fedkd.clients.participation import Participation
from fedkd.engine.client_app import ClientSide
from fedkd.engine.codec import decode
from fedkd.engine.flower_strategy import FlowerStrategy
from fedkd.engine.folder import RunFolder
from fedkd.engine.setup import make_strategy, prepare
from fedkd.engine.simulate import in_process, simulate
from fedkd.engine.simulation import Run
from fedkd.errors import ConfigError, RunError
from fedkd.strategies.base import strategies

QUICK = {"server_epochs": 1, "head_hidden": 8}
BRIEF = {
    "synthesis_epochs": 2,
    "generator_steps": 2,
    "server_steps": 4,
    "generator_width": 2,
    "noise": 8,
    "generator_batch_size": 16,
}
VARIANTS = {
    "fedd2s": {
        "averaging": {"reading": "averaging", "drop_every": 2, "drops": 2, "handover": "local"},
        "cut": {"reading": "cut", "drop_every": 2, "drops": 1, **QUICK},
        "cut-head": {"reading": "cut", "send": "head", "payload": "per_sample", **QUICK},
        "cut-own": {"reading": "cut", "share": "own", "payload": "per_sample", **QUICK},
        "up_to_cut": {"reading": "up_to_cut", "fuse_points": True, "drops": 0, **QUICK},
        "ratio": {"policies": ["tgeo"]},
    },
    "lg-fedavg": {"input-end": {"shared": "input-end"}},
    "fd": {"plus": {"share_weights": True, "label_weighting": "examples"}},
    "fedproto": {"paper": {"weighting": "paper", "block": "fc1", "predict": "prototype"}},
    "fedhkd": {"features": {"lam": 0.0, "gamma": 1.0}},
    "fedmd": {
        "kl-entropy": {
            "digest_loss": "kl",
            "temperature": 2.0,
            "fusion": "entropy",
            "subset": 16,
            "pretrain_epochs": 1,
        },
        "reinforced": {"digest_loss": "kl", "top_k": 3, "cached_rounds": 2, "subset": 16},
    },
    "ds-fl": {
        "class-counts": {"fusion": "class-counts", "aggregation": "sa", "subset": 16},
        "clients-only": {"server_epochs": 0},
    },
    "fedgkt": {"deep": {"cut": "fc2", "head_hidden": 8, "alpha": 0, "server_epochs": 1}},
    "fedcache": {"all": {"search": "all", "neighbours": 2, "bits": 12}},
    "fedgkd": {
        "mse": {"objective": "mse", "coefficient": 1.0, "models": 2},
        "branches": {"objective": {"name": "ofa", "branches": ["all"]}},
    },
    "fml": {"meme": {"alpha": 1, "beta": 0}, "moving": {"policies": ["taid"]}},
    "dho": {
        "averaged": {"supervised_head": "averaged", "subset": 16, "pool_batch_size": 8},
        "composite": {"teacher": "composite", "labelled_weight": 0.5},
    },
    "fedkd-wu2022": {
        "plain": {"energy_start": 1, "energy_end": 1, "detach_divisor": False},
        "rank-one": {
            "energy_start": 0.1,
            "energy_end": 0.1,
            "divisor": "example",
            "hidden_weight": 0,
        },
    },
    "dense": {
        "statistics": {
            **BRIEF,
            "statistics_weight": 1.0,
            "bank_size": 1,
            "student_start": "fresh",
        }
    },
    "dfrd": {"no-copy": {"ema_share": 0.0, "server_steps": 10, "generator_width": 2}},
    "fedgen": {
        "head": {"share": "head", "beta": 1.0, "fidelity": "teachers", "generator_steps": 2}
    },
    "feddf": {
        "generator": {
            "inputs": "generator",
            "generator_steps": 2,
            "generated": 16,
            "server_steps": 2,
            "generator_width": 2,
        },
        "class-counts": {"fusion": "class-counts", "server_steps": 2},
        "routed": {"policies": ["mst"], "server_steps": 4},
    },
}
"""Options beside the defaults under which a strategy has other code to run."""

SMALL = {
    "dense": BRIEF,
    "co-boosting": BRIEF,
    "fedftg": {"server_steps": 10, "generator_width": 2},
    "dfrd": {"server_steps": 10, "generator_width": 2},
    "feddf": {"server_steps": 10},
    "fedgen": {"generator_steps": 10},
}
"""The default case with less work on the server, which changes no code path."""

KINDS = {
    "counts",
    "factors",
    "features",
    "generator",
    "global_head",
    "hashes",
    "logits",
    "model",
    "prototypes",
    "soft_labels",
    "statistics",
    "teacher",
}
"""Every kind of knowledge that travels; a new one is a new release and has to be named here."""

CASES = [pytest.param({"name": n, **SMALL.get(n, {})}, id=n) for n in strategies.names()]
CASES += [
    pytest.param({"name": name, **options}, id=f"{name}-{label}")
    for name, variants in VARIANTS.items()
    for label, options in variants.items()
]
every = pytest.mark.parametrize("strategy", CASES)
HALF = {"rounds": 3, "clients.participation.ratio": 0.5}


def pooled(run):
    """A pooled strategy has one pseudo-client that always takes part: no cohort to speak of."""
    return run.prepared.strategy.pooled


@pytest.fixture(scope="module")
def half(tiny, play):
    """Three rounds of two clients each, played once for each strategy."""
    known = {}

    def get(strategy):
        key = json.dumps(strategy)
        if key not in known:
            known[key] = play(tiny(strategy, HALF))
        return known[key]

    return get


def cohorts(monkeypatch, plan):
    """Let ``plan[round]`` take part, whatever the experiment says."""
    monkeypatch.setattr(Participation, "cohort", lambda self, seed, round_, clients: plan[round_])


@every
def test_is_frozen_and_documented(strategy, tiny):
    made = make_strategy(tiny(strategy).strategy)
    assert dataclasses.is_dataclass(made)
    for field in dataclasses.fields(made):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, field.name, getattr(made, field.name))
    name = strategy if isinstance(strategy, str) else strategy["name"]
    assert strategies.summary(name).endswith(".")
    assert made.source
    assert made.evidence in ("paper", "reconstruction")


@every
def test_learns_without_the_global_generators(strategy, tiny, play):
    torch_before = torch.get_rng_state()
    numpy_before = np.random.get_state()[1].copy()  # noqa: NPY002 that it does not move
    run = play(tiny(strategy, {"rounds": 6, "clients.training.lr": 0.1, "evaluate.every": 3}))
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002
    losses = [run.log.by_client("loss/supervised", "train", r) for r in (1, 6)]
    assert np.nanmean(losses[1]) < np.nanmean(losses[0])
    accuracy = run.log.table("accuracy", "test", "composite", "personal")
    assert np.isfinite(accuracy).all()
    assert accuracy.shape == (2, 4)


@every
def test_state_holds_arrays_and_only_knowledge_travels(strategy, half):
    run = half(strategy)
    states = [run.state, *(run.client_state(k) for k in range(4))]
    for state in states:
        for key, value in state.items():
            assert isinstance(value, np.ndarray), key
            assert value.dtype.kind in "fiu", key
    travelled = set(run.ledger.totals().tensors)
    assert travelled <= KINDS


QUIET = (
    {"name": "fedgen", **SMALL["fedgen"]},
    {"name": "fedhkd", **VARIANTS["fedhkd"]["features"]},
    # A cut that is new in the last round has no teacher yet.
    {"name": "fedd2s", **VARIANTS["fedd2s"]["cut"]},
)
"""Where an objective is named that teaches nobody, by default or with these options."""


@every
def test_who_is_taught_is_compared_with_its_teacher(strategy, half):
    run = half(strategy)
    found = [r for r in run.log.records if "agreement/" in r.metric]
    made = run.prepared.strategy
    teaches = hasattr(made, "objective") or hasattr(made, "digest_loss")
    assert bool(found) == (teaches and strategy not in QUIET)
    for r in found:
        assert r.round == 3 and math.isfinite(r.value)
        assert r.split == ("train" if r.client >= 0 else "")
        least = -1 if "/tau" in r.metric else 0
        assert r.value >= least and (r.value <= 1 + 1e-9 or "/kl" in r.metric)


@every
def test_threads_give_the_same_bits(strategy, tiny, play, bits, values, half):
    changes = {**HALF, "engine.executor": "thread", "engine.workers": 3}
    threads = play(tiny(strategy, changes))
    assert bits(threads) == bits(half(strategy))
    assert values(threads) == values(half(strategy))


@every
def test_order_of_replies_does_not_matter(strategy, tiny, play):
    run = play(tiny(strategy, {"rounds": 2}), rounds=1)
    with in_process():
        replies = run.grid.send_and_receive(run.strategy.train_messages(2, run.state, run.grid))
    assert pooled(run) or len(replies) == 4
    folds = [run.strategy.fold_train(2, run.state, r) for r in (replies, replies[::-1])]
    folds.append(run.strategy.fold_train(2, run.state, replies[2:] + replies[:2]))
    for other in folds[1:]:
        assert list(other.state) == list(folds[0].state)
        for key, value in folds[0].state.items():
            assert value.tobytes() == other.state[key].tobytes(), key


@every
def test_resume_gives_the_same_bits(strategy, tiny, play, bits, values, half):
    experiment = tiny(strategy, {**HALF, "engine.checkpoint_every": 1})
    first = play(experiment, rounds=2)
    resumed = Run(prepare(experiment), RunFolder(first.folder.path))
    play(experiment, run=resumed)
    assert bits(resumed) == bits(half(strategy))
    assert values(resumed) == values(half(strategy))


@every
def test_memory_is_bounded(strategy, tiny, play):
    few = {"clients.count": 2, "data.source.limit": 60, "rounds": 15, "evaluate.every": 15}
    run = play(tiny(strategy, few), rounds=5)
    sizes = [shapes(run)]
    with in_process():
        for round_ in range(6, 16):
            run.play(round_)
    assert [*sizes, shapes(run)] == sizes * 2


def shapes(run):
    """The shapes of all arrays; what is kept of the pool's examples may be of all of them."""
    found = [run.state, *(run.client_state(k) for k in range(2))]
    kept = [array for state in found for key, array in state.items() if of_pool(run, key)]
    assert all(len(array) <= len(run.prepared.setting.public) for array in kept)
    return [
        {key: array.shape[of_pool(run, key) :] for key, array in state.items()} for state in found
    ]


def of_pool(run, key):
    return key.startswith("cache/") and run.prepared.setting.public is not None


@every
def test_a_late_client_joins(strategy, tiny, play, monkeypatch):
    cohorts(monkeypatch, {1: [0, 1], 2: [2], 3: [0, 3]})
    run = play(tiny(strategy))
    judged = run.log.table("accuracy", "test", "composite", "personal")
    assert np.isfinite(judged).all()
    trained = [run.log.by_client("loss/supervised", "train", r) for r in (1, 2, 3)]
    expected = [[0]] * 3 if pooled(run) else [[0, 1], [2], [0, 3]]
    assert [np.flatnonzero(~np.isnan(t)).tolist() for t in trained] == expected


@every
def test_an_empty_cohort_changes_nothing(strategy, tiny, play, bits):
    nobody = {"clients.participation": {"scheme": "poisson", "ratio": 1e-9}, "rounds": 2}
    run = play(tiny(strategy, nobody))
    fresh = Run(prepare(tiny(strategy, nobody)), RunFolder(run.folder.path.with_name("fresh")))
    fresh.begin()
    assert (bits(run) == bits(fresh)) is not pooled(run)
    assert np.isfinite(run.log.table("accuracy", "test", "composite", "personal")).all()


def break_clients(monkeypatch, run, broken):
    """Let local work of some clients fail after they have begun to change their memory."""
    kind = type(run.prepared.strategy)
    work = kind.local_update

    def local_update(self, client, received):
        if client.info.id in broken:
            client.state["model/spoilt"] = np.zeros(1)
            raise ZeroDivisionError("on purpose")
        return work(self, client, received)

    monkeypatch.setattr(kind, "local_update", local_update)


@every
def test_a_failing_client_counts_as_absent(strategy, tiny, play, bits, monkeypatch):
    experiment = tiny(strategy, {"rounds": 2})
    run = play(experiment, rounds=1)
    without = play(experiment, rounds=1)
    break_clients(monkeypatch, run, {1})
    with in_process():
        failures = run.play(2)
    monkeypatch.undo()
    cohorts(monkeypatch, {2: [0, 2, 3]})
    with in_process():
        assert without.play(2) == []
    assert bits(run) == bits(without)
    if not pooled(run):
        assert len(failures) == 1
        assert "client 1" in failures[0]
        assert "on purpose" in failures[0]
        assert (run.folder.path / "failures/round-2-client-1/failure.json").is_file()


@every
def test_all_failing_ends_the_run(strategy, tiny, play, monkeypatch):
    run = play(tiny(strategy), rounds=1)
    break_clients(monkeypatch, run, {0, 1, 2, 3})
    with in_process(), pytest.raises(RunError, match="all participants of round 2 failed"):
        run.play(2)


@every
def test_clients_with_one_class_only(strategy, tiny, play):
    changes = {
        "rounds": 2,
        "evaluate.every": 2,
        "clients.count": 10,
        "data.partition": {"name": "pathological", "classes_per_client": 1},
    }
    run = play(tiny(strategy, changes))
    counts = run.prepared.federation.counts()
    assert ((counts > 0).sum(1) == 1).all()
    assert "failed" not in (run.folder.path / "events.log").read_text()
    assert np.isfinite(run.log.table("loss", "test", "composite", "personal")).all()


@every
def test_clients_without_examples_do_no_harm(strategy, tiny, play):
    changes = {
        "clients.count": 12,
        "data.partition": {"name": "dirichlet", "alpha": 0.01, "allow_empty": True},
        "clients.participation.ratio": 0.1,
        "rounds": 6,
        "evaluate.every": 6,
    }
    experiment = tiny(strategy, changes)
    prepared = prepare(experiment)
    empty = {c.id for c in prepared.setting.clients if c.examples == 0}
    alone = [r for r in range(1, 7) if set(FlowerStrategy(prepared).cohort(r)) <= empty]
    assert prepared.strategy.pooled or alone, "choose a seed with a cohort of empty clients only"
    run = play(experiment)
    for key, value in run.state.items():
        assert np.isfinite(value).all(), key


@every
def test_mixed_models_work_or_are_refused_before_round_one(strategy, tiny, play):
    models = [{"name": "mlp", "hidden": [16, 12]}, {"name": "mlp", "hidden": [10]}]
    experiment = tiny(strategy, {"clients.models": models, "rounds": 2})
    try:
        prepare(experiment)
    except ConfigError as error:
        # Or an option names a block that one of them does not have, and the message says which.
        assert "different architectures" in str(error) or "'mlp#2'" in str(error)
        return
    run = play(experiment)
    assert {c.model for c in run.prepared.setting.clients} == {"mlp", "mlp#2"}
    assert "failed" not in (run.folder.path / "events.log").read_text()
    assert np.isfinite(run.log.table("accuracy", "test", "composite", "personal")).all()


@every
def test_runs_under_flowers_own_start(strategy, tiny, play):
    experiment = tiny(strategy, {"rounds": 2})
    prepared = prepare(experiment)
    server, results = ServerApp(), []

    @server.main()
    def main(grid, context):
        flower = FlowerStrategy(prepared)
        initial = flower.initial_arrays()
        results.append(flower.start(grid, initial_arrays=initial, num_rounds=2))

    done = simulate(server, ClientSide(prepared).app(), 4)
    assert done.failures == []
    ours, theirs = play(experiment).state, decode(results[0].arrays)
    assert list(theirs) == list(ours)
    for key, value in ours.items():
        assert value.tobytes() == theirs[key].tobytes(), key
    assert set(results[0].train_metrics_clientapp) == {1, 2}
    assert set(results[0].evaluate_metrics_clientapp) == {1, 2}
