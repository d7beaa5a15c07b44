"""Three privacy curves: they meet where they should, and part as the closed forms say."""

import dataclasses

import pytest

from fedkd.axes import Sweep
from fedkd.engine.setup import prepare
from fedkd.errors import ConfigError
from fedkd.privacy.accounting import History, epsilon
from fedkd.privacy.plan import planned
from fedkd.sweep.plan import plan
from fedkd.sweep.privacy_curves import CURVES, variants

RATIO = "clients.participation.ratio"
CLIENTS = 20


@pytest.fixture
def federation(tiny):
    """Return ``federation(privacy)``: 20 clients in 100 rounds of FedAvg."""

    def make(**privacy):
        return tiny(
            "fedavg",
            {
                "rounds": 100,
                "strategy.weighting": "uniform",
                "clients.count": CLIENTS,
                "data.source.limit": 400,
                "data.partition": "iid",
                "clients.participation": {"scheme": "poisson", "ratio": 0.3},
                "privacy": {"unit": "client", "delta": 1e-5, **privacy},
            },
        )

    return make


def at_ratio(experiment, changes, ratio, out):
    """Return (noise multiplier, epsilon, noise on the mean) of a curve at a ratio."""
    alone = dataclasses.replace(experiment, sweep=Sweep())
    [run] = plan(alone, out, variants={"curve": {**changes, RATIO: ratio}})
    made = prepare(run.experiment).plan
    z = made.noise_multiplier
    return z, epsilon(planned(made, 0, z), made.delta), z / made.expected()


def curves(experiment, at, ratios, out):
    changes = variants(experiment, at)
    assert tuple(changes) == CURVES
    return {
        name: {q: at_ratio(experiment, changes[name], q, out) for q in ratios} for name in CURVES
    }


# The notes' table: T = 100, z = 1, delta 1e-5, RDP.
KNOWN = {0.05: 4.04, 0.1: 7.90, 1.0: 96.12}


@pytest.mark.parametrize("at", KNOWN)
def test_all_three_meet_at_the_ratio_and_cost_what_is_known(federation, tmp_path, at):
    found = curves(federation(noise_multiplier=1.0), at, [at], tmp_path)
    for name in CURVES:
        z, spent, mean = found[name][at]
        assert z == pytest.approx(1.0, rel=0.01), name
        assert spent == pytest.approx(KNOWN[at], rel=0.01), name
        assert mean == pytest.approx(1 / (at * CLIENTS), rel=0.01), name


def test_they_part_as_the_closed_forms_say(federation, tmp_path):
    at, small = 0.2, 0.05
    found = curves(federation(noise_multiplier=2.0), at, [small, at], tmp_path)
    fixed, same_epsilon, same_mean = (found[name] for name in CURVES)
    # The same multiplier: cheaper at the smaller ratio, with 4 times the noise on the mean.
    assert fixed[small][0] == 2.0
    assert fixed[small][1] == pytest.approx(1.22, rel=0.01)
    assert fixed[at][1] == pytest.approx(5.50, rel=0.01)
    assert fixed[small][2] / fixed[at][2] == pytest.approx(at / small)
    # The same epsilon: less noise is needed, though still more of it on the mean.
    assert same_epsilon[small][1] == pytest.approx(same_epsilon[at][1], rel=0.01)
    assert same_epsilon[small][0] < fixed[small][0]
    assert same_epsilon[at][2] < same_epsilon[small][2] < fixed[small][2]
    # The same noise on the mean: a quarter of the multiplier, at a higher price.
    assert same_mean[small][2] == pytest.approx(same_mean[at][2])
    assert same_mean[small][0] == pytest.approx(2.0 * small / at)
    assert same_mean[small][1] > same_epsilon[small][1] > fixed[small][1]


def test_a_given_epsilon_is_kept_and_its_noise_is_that_of_the_others(federation, tmp_path):
    experiment = federation(epsilon=4.0)
    changes = variants(experiment, 0.2)
    assert changes["fixed epsilon"]["privacy.epsilon"] == 4.0
    z = changes["fixed noise multiplier"]["privacy.noise_multiplier"]
    # The notes' table: q = .2, T = 100: epsilon 4 takes z = 2.549.
    assert z == pytest.approx(2.549, rel=0.01)
    assert changes["fixed noise on the mean"]["privacy.mean_noise"] == z / (0.2 * CLIENTS)
    for name in CURVES:
        assert at_ratio(experiment, changes[name], 0.2, tmp_path)[0] == pytest.approx(z, rel=1e-9)


def test_the_epsilon_is_short_and_each_curve_sets_one_option(federation):
    changes = variants(federation(noise_multiplier=1.0), 0.1)
    assert len(f"{changes['fixed epsilon']['privacy.epsilon']:g}") <= 4
    for one in changes.values():
        assert sum(value is not None for value in one.values()) == 1


def test_fewer_rounds_cost_less(federation):
    half = dataclasses.replace(federation(noise_multiplier=1.0), rounds=50)
    whole = federation(noise_multiplier=1.0)
    spent = [variants(e, 0.1)["fixed epsilon"]["privacy.epsilon"] for e in (half, whole)]
    assert spent[0] < 0.9 * spent[1]


def test_cyclic_turns_are_paid_by_the_client_with_most(federation):
    experiment = federation(noise_multiplier=4.0)
    participation = dataclasses.replace(experiment.clients.participation, scheme="cyclic")
    experiment = dataclasses.replace(
        experiment,
        clients=dataclasses.replace(experiment.clients, participation=participation),
        privacy=dataclasses.replace(experiment.privacy, adjacency="zero-out"),
    )
    found = variants(experiment, 0.25)["fixed epsilon"]["privacy.epsilon"]
    # A quarter of 100 rounds, each at rate 1: the same as one release with z = 4 / sqrt(25).
    assert found == pytest.approx(epsilon(History([(4.0, 1.0, 25)]), 1e-5), rel=0.01)


def changed(experiment, **privacy):
    return dataclasses.replace(
        experiment, privacy=dataclasses.replace(experiment.privacy, **privacy)
    )


def test_what_has_no_such_curves_is_refused(federation):
    experiment = federation(noise_multiplier=1.0)
    everybody = dataclasses.replace(experiment.clients.participation, scheme="full")
    full = dataclasses.replace(
        experiment, clients=dataclasses.replace(experiment.clients, participation=everybody)
    )
    refused = {
        "privacy.unit = 'client'": changed(experiment, unit="none"),
        "privacy.trust = 'central'": changed(experiment, trust="local"),
        "privacy.delta": changed(experiment, delta=None, epsilon=8.0),
        "'poisson'": full,
        "noise_multiplier > 0": changed(experiment, noise_multiplier=0.0),
    }
    for words, one in refused.items():
        with pytest.raises(ConfigError, match=words):
            variants(one, 0.1)
    with pytest.raises(ConfigError, match="at most 1"):
        variants(experiment, 0.0)
