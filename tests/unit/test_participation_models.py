"""Models of participation: turns, availability by rank and by label, and what a digest sees."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedkd.clients.attendance import Attendance
from fedkd.clients.availability import by_label, label_shares, power_law
from fedkd.clients.participation import Participation
from fedkd.config import Experiment, load
from fedkd.engine.setup import prepare
from fedkd.errors import ConfigError
from fedkd.presets import preset_names

seeds = st.integers(0, 10**6)
ratios = st.floats(0.001, 1.0)


def attendance(n=20, seed=0, shares=None, **options):
    return Attendance(Participation(**options), seed, (10,) * n, shares)


@given(ratio=ratios, seed=seeds, n=st.integers(1, 30), round_=st.integers(1, 100))
def test_cyclic_cohorts_have_a_fixed_size_without_repetition(ratio, seed, n, round_):
    cohort = Participation(scheme="cyclic", ratio=ratio).cohort(seed, round_, range(n))
    assert len(cohort) == max(1, round(ratio * n)) == len(set(cohort))
    assert cohort == sorted(cohort)


@given(ratio=ratios, seed=seeds, n=st.integers(1, 30), rounds=st.integers(1, 40))
def test_turns_come_equally_often(ratio, seed, n, rounds):
    part = attendance(n, seed, scheme="cyclic", ratio=ratio)
    turns = part.turns(range(1, rounds + 1))
    assert sum(turns) == rounds * max(1, round(ratio * n))
    assert max(turns) - min(turns) <= 1


def test_cohorts_of_a_cycle_are_disjoint_and_its_order_is_the_seeds():
    part = attendance(12, scheme="cyclic", ratio=0.25)
    cycle = [part.cohort(t) for t in range(1, 5)]
    assert sorted(k for cohort in cycle for k in cohort) == list(range(12))
    assert [part.cohort(t) for t in range(5, 9)] == cycle
    other = attendance(12, seed=1, scheme="cyclic", ratio=0.25)
    assert [other.cohort(t) for t in range(1, 5)] != cycle
    larger = attendance(12, scheme="cyclic", ratio=0.5)
    nested = [set(a) <= set(larger.cohort(t)) for t, a in enumerate(cycle, 1)]
    assert not all(nested), "documented: cyclic cohorts are not nested"


@given(
    scheme=st.sampled_from(["fixed", "poisson"]),
    pair=st.tuples(ratios, ratios),
    seed=seeds,
    round_=st.integers(1, 50),
)
def test_cohorts_are_nested_over_ratios_whoever_is_there(scheme, pair, seed, round_):
    small, large = (
        set(
            attendance(
                seed=seed, scheme=scheme, ratio=r, availability="power-law", exponent=0.4
            ).cohort(round_)
        )
        for r in sorted(pair)
    )
    everybody = attendance(seed=seed, scheme="full", availability="power-law", exponent=0.4)
    assert small <= large <= set(everybody.cohort(round_))


def test_power_law_frequencies():
    part = attendance(10, scheme="full", availability="power-law", exponent=1.0)
    chance = power_law(1.0, 0, range(10))
    assert sorted(1 / chance) == pytest.approx(range(1, 11))
    came = np.array(part.turns(range(1, 1001))) / 1000
    # 1,000 coins each: four standard errors are at most 0.063.
    assert abs(came - chance).max() < 0.063
    assert came[chance.argmax()] == 1
    assert part.presence() == pytest.approx(chance.mean())
    coins = attendance(10, scheme="poisson", ratio=0.5, availability="power-law", exponent=1.0)
    half = np.array(coins.turns(range(1, 1001))) / 1000
    assert abs(half - chance / 2).max() < 0.063, "coins of cohort and availability are independent"


def test_exponent_zero_and_strength_zero_are_the_plain_scheme():
    shares = np.eye(4)[np.arange(20) % 4]
    for scheme in ("full", "fixed", "poisson", "cyclic"):
        plain = attendance(scheme=scheme, ratio=0.3)
        rare = attendance(scheme=scheme, ratio=0.3, availability="power-law", exponent=0)
        label = attendance(
            scheme=scheme, ratio=0.3, shares=shares, availability="label", strength=0
        )
        for t in range(1, 6):
            assert plain.cohort(t) == rare.cohort(t) == label.cohort(t)
        assert plain.lost(1) == [] and plain.clock(1) is None and plain.presence() == 1.0


def test_fixed_fills_up_with_those_who_are_there():
    part = attendance(20, scheme="fixed", ratio=0.25, availability="power-law", exponent=0.5)
    everybody = attendance(20, scheme="full", availability="power-law", exponent=0.5)
    sizes = set()
    for t in range(1, 60):
        there = everybody.cohort(t)
        sizes.add(len(part.cohort(t)))
        assert set(part.cohort(t)) <= set(there)
        assert len(part.cohort(t)) == min(5, len(there))
    assert 5 in sizes and min(sizes) < 5


def test_turns_are_kept_by_those_who_are_away():
    part = attendance(12, scheme="cyclic", ratio=0.25, availability="power-law", exponent=1.0)
    plain = attendance(12, scheme="cyclic", ratio=0.25)
    rounds = range(1, 25)
    assert all(part.scheduled(t) == plain.cohort(t) for t in rounds)
    assert part.turns(rounds, scheduled=True) == plain.turns(rounds)
    assert sum(part.turns(rounds)) < sum(plain.turns(rounds))
    assert any(part.cohort(t) == [] for t in rounds), "an empty turn is played"


def test_the_window_over_classes_goes_round_in_a_period():
    one_class = np.eye(10)
    rows = np.array([by_label(one_class, 1.0, 10, t) for t in range(1, 21)])
    assert (rows.sum(1) == 5).all() and (rows[0] == [1] * 5 + [0] * 5).all()
    assert (rows[1] == [0] + [1] * 5 + [0] * 4).all()
    assert (rows[10:] == rows[:10]).all() and (rows[:10].sum(0) == 5).all()
    assert by_label(one_class, 0.4, 10, 1).tolist() == pytest.approx([1.0] * 5 + [0.6] * 5)
    even = np.full((3, 10), 0.1)
    assert by_label(even, 1.0, 7, 4) == pytest.approx([0.5] * 3)
    assert by_label(np.ones((1, 1)), 1.0, 3, 2).tolist() == [1.0]


def test_availability_follows_labels():
    counts = np.repeat(np.eye(4, dtype=int) * 9, 5, axis=0)
    counts[0] = 0
    part = attendance(
        20, shares=label_shares(counts), scheme="full", availability="label", period=4
    )
    assert part.cohort(1) == list(range(1, 10))
    assert part.cohort(3) == list(range(10, 20))
    assert part.presence() == 1.0, "what follows from data is in no public divisor"


def test_text_has_no_classes_to_follow(tiny):
    changes = {
        "model": {"name": "gpt-tiny", "width": 16, "depth": 1, "heads": 2, "hidden": 16},
        "data.source": {"name": "pydoc-topics", "topics": 3, "rows_per_topic": 8, "length": 16},
        "data.partition": "natural",
        "clients.count": 3,
        "clients.participation.availability": "power-law",
    }
    assert prepare(tiny("fedavg", changes)).attendance.shares is None
    with pytest.raises(ConfigError, match="a row of text"):
        prepare(tiny("fedavg", {**changes, "clients.participation.availability": "label"}))


@pytest.mark.parametrize(
    ("options", "key"),
    [({"exponent": 2.0}, "exponent"), ({"availability": "power-law", "period": 5}, "period")],
)
def test_options_of_another_model_are_refused(options, key, tiny):
    changes = {f"clients.participation.{k}": v for k, v in options.items()}
    with pytest.raises(ConfigError, match=rf"participation\.{key} = .* is for availability"):
        prepare(tiny("fedavg", changes))


def test_the_digest_of_every_experiment_is_what_it_was():
    assert Experiment().digest() == "ad7fcc0bfe08bed5"
    poisson = "clients.participation.scheme=poisson"
    plain = load(None, [poisson]).digest()
    same = ["availability=always", "exponent=3.0", "strength=0.2", "period=4", "dropout=0.0"]
    for text in same:
        other = load(
            None, ["clients.participation.scheme=poisson", f"clients.participation.{text}"]
        )
        assert other.digest() == plain, text
    seen = {plain}
    for text in ("scheme=cyclic", "availability=power-law", "dropout=0.1", "slowness=1.0"):
        seen.add(load(None, [f"clients.participation.{text}"]).digest())
    for text in ("deadline=2.0", "availability=label"):
        seen.add(load(None, [f"clients.participation.{text}"]).digest())
    assert len(seen) == 7
    table = Participation(availability="power-law", period=3).identity()
    assert table == {
        "scheme": "fixed",
        "ratio": 1.0,
        "availability": "power-law",
        "exponent": 1.0,
    }


@pytest.mark.parametrize("name", preset_names("clients"))
def test_presets_are_experiments(name):
    options = load(None, [f"clients={name}"]).clients.participation
    assert options.problems() == []
