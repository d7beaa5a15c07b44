"""Our accounting against dp-accounting, numerical integrals and Flower's own strategy."""

import inspect
import json
import logging
import math

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import (
    GaussianPrivacyEvent,
    NeighboringRelation,
    PrivacyAccountant,
    PrivacyConfig,
    SamplingMethod,
)
from flwr.serverapp.exception import PrivacyBudgetExhausted
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg

from fedkd.engine.accountant import FlowerAccountant
from fedkd.engine.flower_private import task_identity
from fedkd.errors import CheckpointError, ConfigError
from fedkd.privacy.accounting import (
    LARGE_ORDERS,
    SMALL_ORDERS,
    History,
    delta_of,
    effective,
    epsilon,
    gaussian_delta,
)

DELTA = 1e-5
GRID = [(1.0, 0.05, 100), (0.6, 0.01, 300), (2.0, 0.5, 20), (4.0, 0.9, 50), (1.0, 1.0, 3)]


def event(z, q):
    from dp_accounting import dp_event

    release = dp_event.GaussianDpEvent(z)
    return dp_event.PoissonSampledDpEvent(q, release) if q < 1 else release


@pytest.fixture(autouse=True)
def _quiet():
    # dp-accounting and Flower report through absl and logging; neither is what is tested here.
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("events", [[e] for e in GRID] + [GRID[:2], GRID[::2]])
@pytest.mark.parametrize("delta", [1e-5, 1e-3])
def test_renyi_agrees_with_dp_accounting(events, delta):
    rdp = pytest.importorskip("dp_accounting.rdp")
    theirs = rdp.RdpAccountant(
        orders=[*(1 + x / 10 for x in range(1, 100)), *SMALL_ORDERS[9:], *LARGE_ORDERS]
    )
    for z, q, n in events:
        theirs.compose(event(z, q), n)
    # It leaves out orders whose series it does not finish, so it may lie above, not below.
    ours = epsilon(History(events), delta)
    assert ours <= theirs.get_epsilon(delta) * (1 + 1e-6)
    assert ours == pytest.approx(theirs.get_epsilon(delta), rel=0.03)


@pytest.mark.parametrize("events", [[GRID[0]], [GRID[2]], [GRID[4]], [GRID[0], (3.0, 1.0, 2)]])
def test_numerical_composition_bounds_the_loss_distribution_of_dp_accounting(events):
    pld = pytest.importorskip("dp_accounting.pld")
    # Both directions of add and remove; pessimistic by less than its mesh of 1e-3 a release.
    theirs = pld.PLDAccountant(value_discretization_interval=1e-3)
    for z, q, n in events:
        theirs.compose(event(z, q), n)
    ours, other = epsilon(History(events), DELTA, "prv"), theirs.get_epsilon(DELTA)
    assert other - 0.005 <= ours <= other + 0.02
    assert epsilon(History(events), DELTA) >= ours
    eps = ours / 2
    assert delta_of(History(events), eps, "prv") >= theirs.get_delta(eps) * 0.98


def log_density(x, std, shift, q):
    """The log density, up to a constant, of the output with one unit sampled at rate q."""
    return np.logaddexp(
        math.log1p(-q) - x**2 / (2 * std**2), math.log(q) - (x - shift) ** 2 / (2 * std**2)
    )


@pytest.mark.parametrize("z", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("q", [0.01, 0.3, 0.9])
def test_half_the_multiplier_covers_replacing_one_sampled_unit(z, q):
    # The worst neighbours: contributions of length 1 that point in opposite directions.
    x = np.linspace(-1 - 60 * z, 1 + 60 * z, 200_001)
    here, there = log_density(x, z, 1.0, q), log_density(x, z, -1.0, q)
    scale = z * math.sqrt(2 * math.pi)
    for order in (2, 4, 16):
        moment = np.trapezoid(np.exp(order * here - (order - 1) * there), x) / scale
        true = math.log(moment) / (order - 1)
        from opacus.accountants.analysis.rdp import compute_rdp

        half = effective(z, "replace-one")
        bound = compute_rdp(q=q, noise_multiplier=half, steps=1, orders=float(order))
        naive = compute_rdp(q=q, noise_multiplier=z, steps=1, orders=float(order))
        assert naive < true <= bound


@pytest.mark.parametrize(("mu", "eps"), [(0.3, 0.5), (1.0, 1.0), (2.0, 0.0), (3.0, 8.0)])
def test_the_exact_gaussian_is_the_integral_it_stands_for(mu, eps):
    x = np.linspace(-40, 40, 400_001)
    gap = np.exp(-((x - mu) ** 2) / 2) - math.exp(eps) * np.exp(-(x**2) / 2)
    integral = np.trapezoid(np.maximum(gap, 0), x) / math.sqrt(2 * math.pi)
    assert gaussian_delta(mu, eps) == pytest.approx(integral, rel=1e-5)


# Flower.


def config(sampling="NO_AMPLIFICATION", neighbours="ADD_OR_REMOVE_ONE", **changes):
    values = {"target_delta": DELTA, "population_size": 20, **changes}
    return PrivacyConfig(
        neighboring_relation=NeighboringRelation[neighbours],
        sampling_method=SamplingMethod[sampling],
        **values,
    )


def release(z=2.0, sample=4, population=20):
    return GaussianPrivacyEvent(noise_multiplier=z, sample_size=sample, population_size=population)


def test_our_accountant_has_all_that_the_protocol_asks_for():
    accountant: PrivacyAccountant = FlowerAccountant(config())
    asked = {name for name in vars(PrivacyAccountant) if not name.startswith("_")}
    assert len(asked) >= 9
    assert asked <= set(dir(accountant))
    for name in asked:
        theirs, ours = vars(PrivacyAccountant)[name], vars(FlowerAccountant)[name]
        if inspect.isfunction(theirs):
            wanted, given = (inspect.signature(f).parameters for f in (theirs, ours))
            assert list(given) == list(wanted)
            assert [p.default for p in given.values()] == [p.default for p in wanted.values()]
        else:
            assert isinstance(theirs, property) and isinstance(ours, property)


@pytest.mark.parametrize(
    ("sampling", "neighbours", "counted"),
    [
        ("POISSON", "ADD_OR_REMOVE_ONE", (2.0, 0.2, 30)),
        ("NO_AMPLIFICATION", "ADD_OR_REMOVE_ONE", (2.0, 1.0, 30)),
        ("WITHOUT_REPLACEMENT", "REPLACE_ONE", (1.0, 1.0, 30)),
    ],
)
def test_every_sampling_is_accounted_as_it_can_be_justified(sampling, neighbours, counted):
    accountant = FlowerAccountant(config(sampling, neighbours))
    assert accountant.get_privacy_spent().epsilon == 0.0
    accountant.compose(release(), 29)
    accountant.compose(release())
    expected = History([counted])
    assert accountant.get_epsilon(1e-4) == epsilon(expected, 1e-4)
    assert accountant.get_delta(3.0) == delta_of(expected, 3.0)
    spent = accountant.get_privacy_spent()
    assert (spent.epsilon, spent.delta) == (epsilon(expected, DELTA), DELTA)
    assert spent.num_releases == accountant.num_releases == 30
    assert spent.accounting_method == "rdp"


@pytest.mark.parametrize(
    ("sampling", "neighbours"),
    [
        ("POISSON", "ADD_OR_REMOVE_ONE"),
        ("NO_AMPLIFICATION", "ADD_OR_REMOVE_ONE"),
        ("WITHOUT_REPLACEMENT", "REPLACE_ONE"),
    ],
)
def test_our_accountant_stands_beside_that_of_flower(sampling, neighbours):
    pytest.importorskip("dp_accounting")
    from flwr.serverapp import RdpAccountant

    ours = FlowerAccountant(config(sampling, neighbours))
    theirs = RdpAccountant(config(sampling, neighbours))
    for accountant in (ours, theirs):
        accountant.compose(release(4.0), 20)
    if sampling == "WITHOUT_REPLACEMENT":
        # Theirs takes the norm for the sensitivity of replacing one, which is twice the norm.
        assert ours.get_epsilon(DELTA) > 2 * theirs.get_epsilon(DELTA)
    else:
        assert ours.get_epsilon(DELTA) == pytest.approx(theirs.get_epsilon(DELTA), rel=0.01)


def test_what_does_not_fit_the_configuration_is_refused():
    accountant = FlowerAccountant(config())
    with pytest.raises(ConfigError, match="population_size"):
        accountant.compose(release(population=21))
    for count in (0, -1, True):
        with pytest.raises(ConfigError, match="count"):
            accountant.compose(release(), count)
    with pytest.raises(ConfigError, match="max_epsilon"):
        accountant.would_exceed(release())
    with pytest.raises(ConfigError, match="unknown accountant"):
        FlowerAccountant(config(), "gdp")
    assert accountant.num_releases == 0 and accountant.get_epsilon(DELTA) == 0.0


def test_the_state_survives_json_and_shares_nothing():
    first = FlowerAccountant(config("POISSON"), "prv")
    first.compose(release(), 10)
    state = json.loads(json.dumps(first.state_dict()))
    second = FlowerAccountant(config("POISSON"), "prv")
    second.load_state_dict(state)
    second.compose(release())
    assert state == first.state_dict() and second.num_releases == 11
    for other in (FlowerAccountant(config("POISSON")), FlowerAccountant(config(), "prv")):
        with pytest.raises(CheckpointError, match="belongs to"):
            other.load_state_dict(state)
    for damage in ({"history": [[1, 2, 3]]}, {"releases": 9}, {"config": None}, {"version": 0}):
        with pytest.raises(CheckpointError):
            second.load_state_dict({**state, **damage})
    assert second.num_releases == 11


class Nodes:
    """As much of a grid as FedAvg asks for."""

    def get_node_ids(self):
        return [11, 12]


def reply(message: Message, value: float) -> Message:
    arrays = ArrayRecord({"w": Array(np.full(3, value, dtype=np.float32))})
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 5})})
    return Message(content, reply_to=message)


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
def test_a_strategy_of_flower_accounts_with_it_and_stops_before_the_budget(accountant):
    one = epsilon(History([(2.0, 1.0, 1)]), DELTA, accountant)
    two = epsilon(History([(2.0, 1.0, 2)]), DELTA, accountant)
    settings = config(population_size=2, max_epsilon=(one + two) / 2)
    strategy = DifferentialPrivacyServerSideFixedClipping(
        FedAvg(min_train_nodes=2, min_available_nodes=2),
        noise_multiplier=2.0,
        clipping_norm=1.0,
        num_sampled_clients=2,
        accountant=FlowerAccountant(settings, accountant),
    )
    start = ArrayRecord({"w": Array(np.zeros(3, dtype=np.float32))})
    with task_identity(run_id=1):
        messages = list(strategy.configure_train(1, start, ConfigRecord(), Nodes()))
        replies = [reply(m, value) for m, value in zip(messages, (1.0, 2.0), strict=True)]
        arrays, _ = strategy.aggregate_train(1, replies)
        assert arrays is not None
        spent = strategy.privacy_spent()
        assert spent.epsilon == one and spent.num_releases == 1
        with pytest.raises(PrivacyBudgetExhausted, match="would exceed"):
            strategy.configure_train(2, arrays, ConfigRecord(), Nodes())
    assert strategy.privacy_spent() == spent
