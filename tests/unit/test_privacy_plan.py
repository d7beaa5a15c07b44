"""Plans: two of three give the third, the cost is what the accountant says, nonsense is refused."""

import math

import pytest

from fedkd.engine.setup import prepare
from fedkd.errors import ConfigError
from fedkd.options import build
from fedkd.privacy.accounting import History, epsilon
from fedkd.privacy.options import Privacy
from fedkd.privacy.plan import make_plan
from fedkd.privacy.population import Population


def population(**changes):
    facts = {
        "scheme": "poisson",
        "ratio": 0.1,
        "rounds": 100,
        "examples": (50,) * 40,
        "turns": (10,) * 40,
        "fits": (((0.2, 5),),) * 40,
    }
    return Population(**{**facts, **changes})


def privacy(**options):
    return build(Privacy, options)


CLIENT = {"unit": "client", "epsilon": 8.0, "delta": 1e-5}
EXAMPLE = {"unit": "example", "epsilon": 8.0, "delta": 1e-5}


def test_two_of_epsilon_noise_and_delta_give_the_third():
    plan = make_plan(privacy(**CLIENT), population())
    z = plan.noise_multiplier
    # The notes' table: q = .1, T = 100, epsilon 8 takes z = .994 at delta 1e-5 by RDP.
    assert z == pytest.approx(0.994, abs=0.01)
    spent = epsilon(History([(z, 0.1, 100)]), 1e-5, "rdp")
    assert 7.9 < spent <= 8
    back = make_plan(privacy(unit="client", epsilon=spent, noise_multiplier=z), population())
    assert back.delta == pytest.approx(1e-5, rel=0.05)
    other = make_plan(privacy(unit="client", delta=1e-5, noise_multiplier=z), population())
    assert other.delta == 1e-5 and other.noise_multiplier == z


ALONE = [{}, {"epsilon": 1.0}, {"delta": 1e-5}, {"noise_multiplier": 1.0}]


@pytest.mark.parametrize("given", ALONE)
def test_one_of_three_is_not_enough(given):
    with pytest.raises(ConfigError, match="two of"):
        make_plan(privacy(unit="client", **given), population())


def test_three_of_three_are_one_too_many():
    with pytest.raises(ConfigError, match="leave one out"):
        make_plan(privacy(**CLIENT, noise_multiplier=1.0), population())


REFUSED = {
    "no unit": (privacy(epsilon=8.0), {}, "claims nothing"),
    "budget without a unit": (privacy(max_epsilon=8.0), {}, "claims nothing"),
    "secure mode": (privacy(**CLIENT, secure_mode=True), {}, "torchcsprng"),
    "fixed cohorts under Poisson accounting": (
        privacy(**CLIENT),
        {"scheme": "fixed"},
        "displaces another",
    ),
    "replace-one under Poisson": (
        privacy(**CLIENT, adjacency="replace-one"),
        {},
        "Poisson participation",
    ),
    "replace-one under DP-SGD": (privacy(**EXAMPLE, adjacency="replace-one"), {}, "add-remove"),
    "presence in the local model": (privacy(**CLIENT, trust="local"), {}, "presence is not hidden"),
    "delta of a client": (privacy(unit="client", epsilon=1.0, delta=0.025), {}, "1 / 40"),
    "delta of an example": (privacy(unit="example", epsilon=1.0, delta=0.02), {}, "1 / 50"),
    "tables that nothing covers": (privacy(**EXAMPLE), {"tables": 1}, "dpsgd"),
    "tables without their noise": (
        privacy(**EXAMPLE, release={"mode": "dpsgd+release"}),
        {"tables": 1},
        "noise_multiplier is not set",
    ),
    "a frozen encoder without tables": (
        privacy(**EXAMPLE, release={"mode": "frozen-encoder"}),
        {},
        "leave it out",
    ),
    "tables that cost more than the target": (
        privacy(**EXAMPLE, release={"mode": "dpsgd+release", "noise_multiplier": 0.1}),
        {"tables": 1},
        "epsilon",
    ),
    "confident votes without a filter": (
        privacy(**CLIENT, release={"votes": "confident-gnmax"}),
        {},
        "filter",
    ),
    "a budget below one round": (
        privacy(unit="client", noise_multiplier=0.1, delta=1e-5, max_epsilon=1.0),
        {},
        "does not pay for one round",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_justified_is_refused(case):
    options, changes, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        make_plan(options, population(**changes))


def test_every_client_is_calibrated_for_its_own_data():
    facts = population(
        examples=(50, 200, 50, 0),
        turns=(10, 10, 0, 10),
        fits=(((0.2, 5),), ((0.05, 20),), ((0.2, 5),), ()),
    )
    plan = make_plan(privacy(**EXAMPLE), facts)
    costs = []
    for k in (0, 1):
        events = History([(z, q, steps * 10) for z, q, steps in plan.round_of(k)])
        costs.append(epsilon(events, 1e-5, "rdp"))
    assert all(7.9 < cost <= 8 for cost in costs)
    assert plan.noise[0] != plan.noise[1]
    # Who never takes part, or has no examples, needs no noise.
    assert plan.noise[2] == plan.noise[3] == 0


@pytest.mark.parametrize("target", [0.05, 0.11, 0.2, 0.5, 30.0, 300.0])
def test_every_target_is_calibrated_in_finite_time(target):
    plan = make_plan(privacy(unit="example", epsilon=target, delta=1e-5), population())
    events = History([(z, q, steps * 10) for z, q, steps in plan.round_of(0)])
    assert 0.9 * target < epsilon(events, 1e-5, "rdp") <= target


def test_a_cost_that_does_not_rest_on_the_noise_is_calibrated_too():
    release = {"mode": "frozen-encoder", "noise_multiplier": 20.0}
    plan = make_plan(privacy(**EXAMPLE, release=release), population(tables=1, weights=False))
    assert plan.round_of(0) == [(20.0, 1.0, 1)]


def test_zero_noise_is_worth_nothing_and_says_so():
    plan = make_plan(privacy(unit="client", noise_multiplier=0.0, delta=1e-5), population())
    assert "epsilon = inf" in plan.claim().sentence(math.inf)


def test_amplification_is_claimed_for_poisson_cohorts_only():
    poisson = make_plan(privacy(**CLIENT), population())
    assert poisson.rate == 0.1
    assert "Poisson sampling of clients at rate 0.1" in poisson.claim().sampling
    fixed = make_plan(privacy(**CLIENT, adjacency="zero-out"), population(scheme="fixed"))
    assert fixed.rate == 1 and "no amplification" in fixed.claim().sampling
    assert fixed.noise_multiplier > 3 * poisson.noise_multiplier
    local = make_plan(privacy(**CLIENT, trust="local", adjacency="zero-out"), population())
    assert local.rate == 1 and "no amplification" in local.claim().sampling


def test_replacing_one_client_takes_twice_the_noise():
    full = population(scheme="full", ratio=1.0, turns=(100,) * 40)
    one, two = (
        make_plan(privacy(**CLIENT, adjacency=a), full).noise_multiplier
        for a in ("zero-out", "replace-one")
    )
    assert two == pytest.approx(2 * one, rel=0.01)


def test_the_divisor_is_the_expected_cohort():
    for scheme, ratio, expected in (("full", 0.1, 40), ("poisson", 0.1, 4), ("fixed", 0.13, 5)):
        adjacency = "zero-out" if scheme == "fixed" else "add-remove"
        plan = make_plan(
            privacy(**CLIENT, adjacency=adjacency), population(scheme=scheme, ratio=ratio)
        )
        assert plan.expected() == pytest.approx(expected)


def test_what_is_not_covered_is_listed():
    listed = make_plan(privacy(**CLIENT), population(public=True)).claim().not_covered
    assert any("server" in text for text in listed)
    assert any("public pool" in text for text in listed)
    assert any("metrics" in text for text in listed)
    listed = make_plan(privacy(**EXAMPLE), population()).claim().not_covered
    assert any("treated as public" in text for text in listed)


UNFIT = {
    "weights by examples": ("fedavg", CLIENT, {}, "strategy.weighting = 'uniform'"),
    "leave-one-out": ("fd", CLIENT, {}, "strategy.share = 'mean'"),
    "single uploads": ("feddf", CLIENT, {}, "every client's network by itself"),
    "entropy of each": ({"name": "ds-fl", "fusion": "entropy"}, CLIENT, {}, "mean-probs"),
    "everybody's data": ("centralized", CLIENT, {}, "no client is apart"),
    "no sum of different networks": (
        {"name": "fedproto"},
        CLIENT,
        {
            "clients.models": [
                {"name": "mlp", "hidden": [8, 8]},
                {"name": "mlp", "hidden": [8, 6]},
            ]
        },
        "differ in size",
    ),
    "batch-coupled": (
        {"name": "fedkd-wu2022", "energy_start": 1, "energy_end": 1},
        EXAMPLE,
        {},
        "fml",
    ),
    "factors": ("fedkd-wu2022", CLIENT, {}, "no mechanism covers"),
    "features of single examples": ("fedgkt", EXAMPLE, {}, "no mechanism covers"),
    "an encoder that trains": (
        "fedproto",
        {**EXAMPLE, "release": {"mode": "frozen-encoder", "noise_multiplier": 20.0}},
        {},
        "clients.training.frozen",
    ),
    "soft labels of a frozen encoder": (
        "fd",
        {**EXAMPLE, "release": {"mode": "frozen-encoder", "noise_multiplier": 20.0}},
        {"clients.training.frozen": ["fc1", "fc2"]},
        "features only",
    ),
    "no teacher to swing": ("fedavg", {"swing": {"map": "adaptive"}}, {}, "no teacher"),
    "swing without a pool": ("fedgkd", {"swing": {"map": "adaptive"}}, {}, "data.public.size"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_strategies_that_do_not_fit_a_mechanism_are_refused(case, tiny):
    strategy, options, changes, message = UNFIT[case]
    full = {"clients.participation": {"scheme": "full"}}
    chosen = tiny(strategy, {**full, "privacy": options, **changes})
    with pytest.raises(ConfigError, match=message):
        prepare(chosen)


def test_features_of_a_frozen_encoder_are_released_without_dp_sgd(tiny, play):
    options = {**EXAMPLE, "release": {"mode": "frozen-encoder", "noise_multiplier": 3.0}}
    changes = {"privacy": options, "clients.training.frozen": ["fc1", "fc2"]}
    del options["epsilon"]
    options["noise_multiplier"] = 1.0
    done = play(tiny("fedproto", changes))
    spent = done.strategy.guard.ledger.client_epsilons()
    expected = epsilon(History([(3.0, 1.0, 3)]), 1e-5, "rdp")
    assert list(spent.values()) == pytest.approx([expected] * 4)
