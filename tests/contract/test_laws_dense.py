"""Laws of the data-free one-shot methods: what DENSE and Co-Boosting are with parts off."""

import dataclasses

import numpy as np
import pytest

from fedkd.engine.folder import RunFolder
from fedkd.engine.setup import make_strategy, prepare
from fedkd.engine.simulation import Run
from fedkd.errors import ConfigError, RunError
from fedkd.strategies.dense import Dense
from fedkd.types import select

FULL, HALF = {"rounds": 2}, {"rounds": 2, "clients.participation.ratio": 0.5}
ONCE = {"rounds": 1, "clients.training.epochs": 2}
QUICK = {
    "synthesis_epochs": 2,
    "generator_steps": 3,
    "server_steps": 4,
    "generator_width": 2,
    "generator_batch_size": 16,
    "noise": 8,
}
DENSE = {"name": "dense", **QUICK}
BOOSTING = {"name": "co-boosting", **QUICK}
cohorts = pytest.mark.parametrize("cohort", [FULL, HALF], ids=["full", "half"])


def judged(run):
    return run.log.table("loss", "test", "composite", "personal").tobytes()


def differs(one, other):
    return all(one[key].tobytes() != other[key].tobytes() for key in other)


@pytest.fixture(scope="module")
def plain(tiny, play):
    """The server's weights after one round of DENSE."""
    return select(play(tiny(DENSE, ONCE)).state, "model")


@cohorts
@pytest.mark.parametrize("strategy", [DENSE, BOOSTING], ids=lambda s: s["name"])
def test_without_steps_of_the_student_it_is_fedavg(strategy, cohort, tiny, play, bits):
    run = play(tiny({**strategy, "server_steps": 0}, cohort))
    fedavg = play(tiny("fedavg", cohort))
    assert bits(run) == bits(fedavg)
    assert judged(run) == judged(fedavg)
    assert run.ledger.by_round() == fedavg.ledger.by_round()


@cohorts
def test_co_boosting_with_all_parts_off_is_dense(cohort, tiny, play, bits):
    off = play(tiny({**BOOSTING, "hard": 0, "eta": 0, "mu": 0}, cohort))
    dense = play(tiny(DENSE, cohort))
    assert bits(off) == bits(dense)
    assert judged(off) == judged(dense)
    assert off.ledger.by_round() == dense.ledger.by_round()


@pytest.mark.parametrize("part", [{"hard": 1.0}, {"eta": 0.03}, {"mu": 0.01}], ids=str)
def test_each_part_of_co_boosting_matters(part, tiny, play, plain):
    strategy = {**BOOSTING, "hard": 0, "eta": 0, "mu": 0, **part}
    other = select(play(tiny(strategy, ONCE)).state, "model")
    assert differs(other, plain)


@pytest.mark.parametrize(
    "part",
    [
        {"fidelity_weight": 0},
        {"statistics_weight": 1},
        {"bank_size": 1},
        {"student_start": "fresh"},
        {"fusion": "class-counts"},
    ],
    ids=str,
)
def test_each_option_of_dense_matters(part, tiny, play, plain):
    other = select(play(tiny({**DENSE, **part}, ONCE)).state, "model")
    assert differs(other, plain)


def test_the_boundary_matters_where_student_and_ensemble_differ(tiny, play):
    """An averaged student agrees with the ensemble on the few samples made here."""
    strategy = {**DENSE, "student_start": "fresh", "generator_lr": 0.05}
    on, off = (
        select(play(tiny({**strategy, "boundary_weight": b}, ONCE)).state, "model") for b in (1, 0)
    )
    assert differs(on, off)


def test_one_client_teaches_the_average_what_it_already_is(tiny, play):
    alone = {"rounds": 1, "clients.count": 1, "data.partition": "iid"}
    student = {"server_optimizer": "sgd", "server_lr": 0.1, "server_steps": 40}
    taught = play(tiny({**DENSE, **student}, alone)).state
    for key, value in play(tiny("fedavg", alone)).state.items():
        np.testing.assert_allclose(taught[key], value, rtol=0, atol=1e-5)


def test_a_fresh_student_forgets_the_average(tiny, play):
    """With a rate of almost 0 the student stays what it started as: initial weights."""
    run = play(tiny({**DENSE, "student_start": "fresh", "server_lr": 1e-12}, ONCE))
    initial = run.prepared.setting.book.initial("mlp")
    for key, value in select(run.state, "model").items():
        np.testing.assert_allclose(value, initial[key], rtol=0, atol=1e-9)


def test_every_architecture_has_a_student(tiny, play):
    models = [{"name": "mlp", "hidden": [16, 12]}, {"name": "mlp", "hidden": [10]}]
    changes = {"clients.models": models, "rounds": 1}
    for strategy in ({**BOOSTING, "statistics_weight": 1.0}, DENSE):
        run, averaged = (
            play(tiny(s, changes)) for s in (strategy, {**strategy, "server_steps": 0})
        )
        assert "models/mlp#2/head.weight" in run.state
        for key, value in averaged.state.items():
            if key.startswith("model"):
                assert np.isfinite(run.state[key]).all()
                assert run.state[key].tobytes() != value.tobytes()


def test_a_generator_without_any_loss_is_refused(tiny):
    silent = {**DENSE, "fidelity_weight": 0, "boundary_weight": 0}
    with pytest.raises(ConfigError, match="generator has nothing to learn"):
        prepare(tiny(silent))
    prepare(tiny({**silent, "statistics_weight": 1}))


@pytest.mark.parametrize("strategy", [DENSE, BOOSTING], ids=lambda s: s["name"])
def test_a_generator_that_diverges_names_the_option(strategy, tiny, play):
    with pytest.raises(RunError, match=r"generator diverged.*lower strategy\.generator_lr"):
        play(tiny({**strategy, "generator_lr": 1e38}))


def test_a_student_that_diverges_names_the_option(tiny, play):
    wild = {**DENSE, "server_optimizer": "sgd", "server_lr": 1e38}
    with pytest.raises(RunError, match=r"lower strategy\.server_lr"):
        play(tiny(wild))


def test_earlier_rounds_are_kept_when_a_generator_diverges(tiny, play, bits, monkeypatch):
    experiment = tiny(DENSE, {"rounds": 2, "engine.checkpoint_every": 1})
    run = play(experiment, rounds=1)
    before = bits(run)
    calm = Dense.generator_training
    monkeypatch.setattr(
        Dense,
        "generator_training",
        lambda self, steps: dataclasses.replace(calm(self, steps), lr=1e38),
    )
    with pytest.raises(RunError, match="generator diverged"):
        play(experiment, run=run)
    monkeypatch.undo()
    again = play(experiment, 1, Run(prepare(experiment), RunFolder(run.folder.path)))
    assert bits(again) == before


def test_options_are_those_of_the_family_and_four_more(tiny):
    dense, boosting = (make_strategy(tiny(s).strategy) for s in (DENSE, BOOSTING))
    names = [{f.name: f.default for f in dataclasses.fields(s)} for s in (dense, boosting)]
    assert {k: v for k, v in names[1].items() if k in names[0]} == names[0]
    assert set(names[1]) - set(names[0]) == {"hard", "eta", "mu", "decay"}
