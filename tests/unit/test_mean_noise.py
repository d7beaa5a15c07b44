"""Noise on the mean: one number that means the same at every participation ratio, or is refused."""

import math

import numpy as np
import pytest

from fedkd.cli.privacy_check import findings
from fedkd.config import Experiment
from fedkd.engine.setup import prepare
from fedkd.errors import ConfigError
from fedkd.options import build
from fedkd.privacy.accounting import History, epsilon
from fedkd.privacy.client_level import ClientLevel
from fedkd.privacy.options import Privacy
from fedkd.privacy.payload import Scores, Weights
from fedkd.privacy.plan import make_plan
from fedkd.privacy.population import Population
from fedkd.rng import stream


def population(ratio, clients=40, **changes):
    facts = {
        "scheme": "poisson",
        "ratio": ratio,
        "rounds": 100,
        "examples": (50,) * clients,
        "turns": (10,) * clients,
        "fits": (((0.2, 5),),) * clients,
    }
    return Population(**{**facts, **changes})


def privacy(**options):
    return build(Privacy, {"unit": "client", "mean_noise": 0.05, "delta": 1e-5, **options})


def test_the_default_changes_no_digest():
    assert Experiment().digest() == "ad7fcc0bfe08bed5"


@pytest.mark.parametrize("ratio", [0.05, 0.25, 1.0])
def test_the_multiplier_is_mean_noise_times_the_expected_cohort(ratio):
    plan = make_plan(privacy(), population(ratio))
    assert plan.noise_multiplier == pytest.approx(0.05 * ratio * 40, rel=1e-12)
    same = make_plan(
        privacy(mean_noise=None, noise_multiplier=plan.noise_multiplier), population(ratio)
    )
    assert (same.noise, same.rate, same.delta) == (plan.noise, plan.rate, plan.delta)


def test_a_fixed_cohort_is_divided_by_its_own_size():
    options = privacy(adjacency="zero-out")
    assert make_plan(options, population(0.06, scheme="fixed")).noise_multiplier == 0.05 * 2


def test_mean_noise_with_epsilon_gives_delta():
    spent = epsilon(History([(0.5, 0.25, 100)]), 1e-5)
    plan = make_plan(privacy(delta=None, epsilon=spent), population(0.25))
    assert plan.delta == pytest.approx(1e-5, rel=1e-6)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0])
def test_the_noise_on_the_released_mean_is_mean_noise_times_the_norm(ratio):
    clients, norm = 200, 3.0
    plan = make_plan(privacy(clipping={"norm": norm}), population(ratio, clients))
    reference = {"w": np.zeros(4000, np.float32)}
    level = ClientLevel(plan.options, plan.noise_multiplier)
    released = level.release(
        [], (Weights(reference),), plan.expected(), norm, stream(0, "noise", str(ratio))
    )
    # 4,000 draws: the standard deviation is known to 1.1 %.
    assert released.arrays["w"].std() == pytest.approx(0.05 * norm, rel=0.05)


@pytest.mark.parametrize("clipping", [{"mode": "flat"}, {"mode": "adaptive"}])
def test_parts_share_it_in_the_same_way_at_every_ratio(clipping):
    payload = (
        Weights({"w": np.zeros(3, np.float32)}),
        Scores(key="s", rows=5, classes=3, space="probs"),
    )

    def on_the_mean(ratio):
        plan = make_plan(privacy(clipping=clipping), population(ratio))
        level = ClientLevel(plan.options, plan.noise_multiplier)
        return [z / plan.expected() for z in level.multipliers(payload, plan.expected())]

    assert on_the_mean(0.1) == pytest.approx(on_the_mean(1.0), rel=1e-9)
    share = privacy().release.share
    if clipping["mode"] == "flat":
        assert on_the_mean(0.1)[0] == pytest.approx(0.05 / math.sqrt(1 - share))


REFUSED = {
    "both noises": ({"noise_multiplier": 1.0}, "leave one out"),
    "all three": ({"epsilon": 8.0}, "epsilon, mean_noise and delta are all given"),
    "alone": ({"delta": None}, "only privacy.mean_noise is set"),
    "local trust": ({"trust": "local", "adjacency": "zero-out"}, "privacy.mean_noise with trust"),
    "example level": ({"unit": "example"}, "privacy.mean_noise with unit 'example'"),
    "nothing hidden": ({"unit": "none", "delta": None}, "privacy.mean_noise given, but"),
    "a count of its own": (
        {"clipping": {"mode": "adaptive", "count_noise": 2.0}},
        "leave count_noise out",
    ),
    "no cover for a round": ({"max_epsilon": 1.0}, "or privacy.mean_noise"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_mean_is_refused(case):
    changes, words = REFUSED[case]
    with pytest.raises(ConfigError, match=words):
        make_plan(privacy(**changes), population(0.25))


STRATEGIES = {
    "fedavg": {"strategy.weighting": "uniform"},
    "fedd2s": {"strategy.share": "mean", "strategy.weighting": "uniform"},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_doctor_says_where_the_multiplier_comes_from(tiny, strategy):
    made = tiny(
        strategy,
        {
            **STRATEGIES[strategy],
            "privacy": {"unit": "client", "mean_noise": 0.5, "delta": 1e-5},
            "clients.participation": {"scheme": "poisson", "ratio": 0.5},
        },
    )
    noise = dict(findings(prepare(made)))["noise"]
    assert noise.startswith("multiplier 1 (mean_noise 0.5 x 2 expected clients)")
