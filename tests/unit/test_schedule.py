"""Layer schedules: deep to shallow, never back, at least one block left."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedkd.strategies.fedd2s import OUTPUT, FedD2S
from fedkd.strategies.schedule import LayerSchedule

BLOCKS = ("conv1", "conv2", "fc1", "head")
lists = st.integers(1, 6).map(lambda n: [f"b{i}" for i in range(n)])
settings = st.fixed_dictionaries(
    {
        "every": st.integers(0, 4),
        "first": st.integers(0, 6),
        "drops": st.one_of(st.none(), st.integers(0, 8)),
    }
)


@given(blocks=lists, options=settings)
def test_a_dropped_block_never_returns(blocks, options):
    schedule = LayerSchedule.deep_to_shallow(blocks, **options)
    assert schedule.monotone
    before = frozenset(blocks)
    for round_ in range(1, 40):
        now = schedule(round_)
        assert now <= before
        assert now == frozenset(blocks[: len(now)]), "what stays is the shallow end"
        assert now
        before = now


@given(blocks=lists, options=settings)
def test_dropped_at_agrees_with_the_rounds(blocks, options):
    schedule = LayerSchedule.deep_to_shallow(blocks, **options)
    for block in blocks:
        out = [r for r in range(1, 60) if block not in schedule(r)]
        assert schedule.dropped_at(block) == (out[0] if out else 0)
    assert schedule.ever == frozenset().union(*(schedule(r) for r in range(1, 60)))


@given(blocks=lists, every=st.integers(1, 4), first=st.integers(1, 6), drops=st.integers(0, 8))
def test_the_closed_form(blocks, every, first, drops):
    schedule = LayerSchedule.deep_to_shallow(blocks, every, first, drops)
    for round_ in range(1, 30):
        gone = max(0, (round_ - first) // every + 1) if round_ >= first else 0
        assert len(schedule(round_)) == len(blocks) - min(gone, drops, len(blocks) - 1)


def test_first_drop_defaults_to_every_rounds_with_all():
    schedule = LayerSchedule.deep_to_shallow(BLOCKS, every=3)
    assert [len(schedule(r)) for r in range(1, 12)] == [4, 4, 4, 3, 3, 3, 2, 2, 2, 1, 1]


def test_without_a_rate_one_block_leaves_at_most():
    assert LayerSchedule.deep_to_shallow(BLOCKS).dropped_at("head") == 0
    once = LayerSchedule.deep_to_shallow(BLOCKS, first=4, drops=3)
    assert [len(once(r)) for r in (1, 3, 4, 99)] == [4, 4, 3, 3]
    fedper = LayerSchedule.deep_to_shallow(BLOCKS, first=1, drops=1)
    assert fedper.stages == LayerSchedule.always(BLOCKS[:-1]).stages
    assert fedper.ever == frozenset(BLOCKS[:-1])
    assert fedper.dropped_at("head") == 1


def test_a_returning_block_is_not_monotone():
    stages = ((1, frozenset("ab")), (2, frozenset("a")), (3, frozenset("ab")))
    assert not LayerSchedule(stages).monotone


@given(options=settings, reading=st.sampled_from(["averaging", "up_to_cut"]))
def test_readings_that_drop_are_monotone(options, reading):
    strategy = made(reading, options)
    schedule = strategy.schedule if reading == "averaging" else strategy.points
    assert schedule(BLOCKS).monotone


@given(options=settings, output=st.booleans())
def test_the_active_cut_only_becomes_shallower(options, output):
    points = ("conv1", "conv2", "fc1", OUTPUT)
    cuts = (OUTPUT, "fc1", "conv1") if output else ()
    strategy = made("cut", options, cuts=cuts)
    depth = []
    for round_ in range(1, 40):
        (active,) = strategy.active(BLOCKS, round_)
        depth.append(points.index(active))
        assert active in (cuts or points[:-1])
    assert depth == sorted(depth, reverse=True)
    assert depth[0] == (3 if output else 2) or options["first"] == 1


def made(reading, options, **more):
    return FedD2S(
        reading=reading,
        drop_every=options["every"],
        first_drop=options["first"],
        drops=99 if options["drops"] is None else options["drops"],
        kd_weight=1.0,
        **more,
    )


def test_points_by_reading():
    averaging = FedD2S(reading="averaging", kd_weight=1.0)
    assert averaging.active(BLOCKS, 7) == [OUTPUT]
    assert FedD2S(reading="averaging", kd_weight=0.0).active(BLOCKS, 7) == []
    together = FedD2S(reading="up_to_cut", drop_every=1, first_drop=0, drops=2)
    assert together.active(BLOCKS, 1) == ["conv1", "conv2", "fc1", OUTPUT]
    assert together.active(BLOCKS, 2) == ["conv1", "conv2", "fc1"]
    assert together.active(BLOCKS, 9) == ["conv1", "conv2"]
    chosen = FedD2S(reading="up_to_cut", cuts=(OUTPUT, "conv2"), drop_every=0, first_drop=0)
    assert chosen.active(BLOCKS, 1) == ["conv2", OUTPUT]


@pytest.mark.parametrize("reading", ["cut", "up_to_cut"])
def test_the_cut_readings_average_no_weights(reading):
    schedule = FedD2S(reading=reading).schedule(BLOCKS)
    assert schedule(1) == schedule(99) == schedule.ever == frozenset()


def test_one_block_is_never_dropped():
    only = LayerSchedule.deep_to_shallow(["fc1"], every=1, first=1, drops=5)
    assert only(1) == only(50) == {"fc1"}
