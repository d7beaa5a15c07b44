"""Registries: look-up by name, refusal of duplicates, drop-in files."""

import pytest

from fedkd.errors import ConfigError
from fedkd.registry import Registry


@pytest.fixture
def things():
    return Registry("thing", "fedkd.distill", "things")


def test_names_are_sorted_and_summaries_are_first_lines(things):
    @things.register("b")
    class B:
        """Second.

        More.
        """

    @things.register("a")
    class A:
        pass

    assert things.names() == ["a", "b"]
    assert things.get("b") is B
    assert (things.summary("b"), things.summary("a")) == ("Second.", "")
    assert things.get("a") is A


def test_an_unknown_name_says_what_there_is(things):
    things.register("fedavg")(object())
    with pytest.raises(ConfigError, match=r"unknown thing 'fedavgg'; did you mean 'fedavg'\?"):
        things.get("fedavgg")
    with pytest.raises(ConfigError, match=r"\(allowed: fedavg\)"):
        things.get("zzz")


def test_two_components_cannot_share_a_name(things):
    things.register("x")(test_names_are_sorted_and_summaries_are_first_lines)
    with pytest.raises(ConfigError, match="two thing components are named 'x'"):
        things.register("x")(test_an_unknown_name_says_what_there_is)
    # The same one again is what a reload of its module does.
    things.register("x")(test_names_are_sorted_and_summaries_are_first_lines)


def drop_in(folder, name, text):
    (folder / "strategies").mkdir(exist_ok=True)
    (folder / "strategies" / f"{name}.py").write_text(text)


DROP_IN = '''
"""A drop-in."""
from fedkd.options import options
from fedkd.strategies.averaging import ModelAveraging
from fedkd.strategies.base import strategies

@strategies.register("{name}")
@options
class Mine(ModelAveraging):
    """Mine."""
'''


def test_drop_in_files_are_found_and_run(tmp_path, monkeypatch, tiny, play):
    from fedkd.strategies.base import strategies

    monkeypatch.setattr(strategies, "_items", dict(strategies._items))
    drop_in(tmp_path, "mine_one", DROP_IN.format(name="mine-one"))
    strategies.load_workspace(tmp_path)
    strategies.load_workspace(tmp_path)
    assert "mine-one" in strategies.names()
    assert play(tiny("mine-one", {"rounds": 1})).log.rounds() == [1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nothing_of_that_name", "cannot import the drop-in .*mine_two.py.*nothing_of"),
        ("1 +", "cannot import the drop-in .*mine_two.py.*SyntaxError"),
        (DROP_IN.format(name="fedavg"), "two strategy components are named 'fedavg'"),
    ],
)
def test_a_broken_drop_in_is_named(text, message, tmp_path, monkeypatch):
    from fedkd.strategies.base import strategies

    monkeypatch.setattr(strategies, "_items", dict(strategies._items))
    drop_in(tmp_path, "mine_two", text)
    with pytest.raises(ConfigError, match=message):
        strategies.load_workspace(tmp_path)


def test_a_workspace_without_drop_ins_is_fine(tmp_path, things):
    before = things.names()
    things.load_workspace(tmp_path)
    assert things.names() == before
