"""What a sweep varies: points of a grid, lists that move together, and what is no axis."""

import pytest

from fedkd.axes import Sweep, Tune, named, points
from fedkd.config import Experiment, experiment
from fedkd.errors import ConfigError
from fedkd.options import build


def test_a_grid_is_every_combination_and_zip_moves_together():
    sweep = Sweep(grid={"a": [1, 2], "b": ["x"]}, zip={"c": [3, 4], "d": [5, 6]})
    assert list(points(sweep)) == [
        {"a": 1, "b": "x", "c": 3, "d": 5},
        {"a": 1, "b": "x", "c": 4, "d": 6},
        {"a": 2, "b": "x", "c": 3, "d": 5},
        {"a": 2, "b": "x", "c": 4, "d": 6},
    ]
    assert list(points(Sweep())) == [{}]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"zip": {"a": [1], "b": [1, 2]}}, "a has 1, b has 2"),
        ({"grid": {"a": [1]}, "zip": {"a": [1]}}, "leave one out"),
        ({"grid": {"seed": [1, 2]}}, "give seeds"),
        ({"grid": {"engine.workers": [1, 2]}}, "changes no result"),
        ({"grid": {"compare.x": [1]}}, "changes no result"),
    ],
)
def test_what_is_no_axis_is_refused_with_the_reason(table, message):
    with pytest.raises(ConfigError, match=message):
        list(points(build(Sweep, table, "sweep")))


@pytest.mark.parametrize("grid", [{"a": []}, {"a": [1, 1]}, {"a": [{"b": 1}, {"b": 1}]}])
def test_an_axis_has_values_and_each_once(grid):
    with pytest.raises(ConfigError, match="sweep"):
        build(Sweep, {"grid": grid}, "sweep")


def test_one_value_is_a_list_of_one():
    assert build(Sweep, {"grid": {"rounds": 3}}, "sweep").grid == {"rounds": (3,)}


def test_values_are_named_briefly():
    assert named({"name": "fedd2s", "drop_every": 5, "drops": 9}) == "fedd2s drop_every=5 drops=9"
    assert [named(v) for v in (True, 1.0, 0.05, "x", [1, "y"])] == ["true", "1", "0.05", "x", "1,y"]


def test_the_sweep_is_not_part_of_what_a_run_is():
    plain = Experiment()
    swept = experiment({"sweep": {"grid": {"rounds": [1, 2]}, "tune": {"trials": 3}}})
    assert swept.digest() == plain.digest()
    assert swept.sweep.tune == Tune(trials=3)


def test_strategies_of_an_axis_are_the_labels():
    swept = experiment({"sweep": {"grid": {"strategy": ["fedavg", {"name": "fedprox", "mu": 1}]}}})
    assert swept.variants() == {
        "fedavg": {"strategy": "fedavg"},
        "fedprox mu=1": {"strategy": {"name": "fedprox", "mu": 1}},
    }
    both = {"compare": {"x": {"strategy": "fd"}}, "sweep": {"grid": {"strategy": ["fedavg"]}}}
    with pytest.raises(ConfigError, match="in one place"):
        experiment(both).variants()
