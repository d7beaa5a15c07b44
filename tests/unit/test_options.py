"""Options: checked when made, frozen, told to the user as they are."""

import dataclasses
from typing import Annotated, Literal

import pydantic
import pytest
from pydantic import Field

from fedkd.errors import ConfigError
from fedkd.options import (
    Count,
    Fraction,
    Names,
    NonNegative,
    Numbers,
    Positive,
    Ratio,
    build,
    describe,
    explain,
    options,
)


@options
class Inner:
    depth: Count = 2


@options
class Example:
    """An example."""

    lr: Annotated[Positive, Field(description="learning rate")] = 0.1
    kind: Annotated[Literal["a", "b"], Field(description="which")] = "a"
    steps: Annotated[int, Field(ge=0, le=9, description="how many")] = 3
    names: Names = ()
    numbers: Numbers = ()
    on: bool = True
    maybe: Annotated[int | None, Field(ge=1)] = None
    inner: Inner = Inner()


def test_frozen_and_keyword_only():
    made = build(Example, {"lr": 1})
    assert made == Example(lr=1.0)
    assert isinstance(made.lr, float)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.lr = 2.0
    with pytest.raises(pydantic.ValidationError, match="positional"):
        Example(0.1)
    with pytest.raises(pydantic.ValidationError):
        Example(lr=-1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": 0}, r"here\.lr = 0: .*greater than 0"),
        ({"lr": "x"}, r"here\.lr = 'x': .*number"),
        ({"kind": "c"}, r"here\.kind = 'c': .*'a' or 'b'"),
        ({"steps": 10}, r"here\.steps = 10: .*less than or equal to 9"),
        ({"steps": 1.5}, r"here\.steps = 1\.5: .*integer"),
        ({"inner": {"depth": 0}}, r"here\.inner\.depth = 0"),
        ({"maybe": 0}, r"here\.maybe"),
    ],
)
def test_errors_name_key_value_and_rule(values, message):
    with pytest.raises(ConfigError, match=message):
        build(Example, values, "here")


def test_all_problems_are_listed_at_once():
    with pytest.raises(ConfigError) as caught:
        build(Example, {"lr": -1, "steps": 99}, "here")
    assert "here.lr" in str(caught.value)
    assert "here.steps" in str(caught.value)
    assert caught.value.exit_code == 2


def test_unknown_keys_get_the_nearest_match():
    with pytest.raises(ConfigError, match=r"unknown key 'here\.step'; did you mean 'steps'\?"):
        build(Example, {"step": 1}, "here")
    with pytest.raises(ConfigError, match="allowed: lr, kind, steps"):
        build(Example, {"zzzzz": 1})


def test_a_single_name_or_number_needs_no_brackets():
    made = build(Example, {"names": "fc1", "numbers": 3})
    assert (made.names, made.numbers) == (("fc1",), (3,))
    assert build(Example, {"names": ["a", "b"], "numbers": [1, 2]}).numbers == (1, 2)


@pytest.mark.parametrize("kind", [Positive, NonNegative, Fraction, Ratio])
def test_no_range_lets_nan_or_infinity_through(kind):
    @options
    class One:
        value: kind = 1.0

    for bad in (float("nan"), float("inf"), -float("inf"), -1):
        with pytest.raises(ConfigError, match="value"):
            build(One, {"value": bad})


def test_describe_tells_types_defaults_ranges():
    docs = {doc.name: doc for doc in describe(Example)}
    assert docs["lr"].description == "learning rate"
    assert (docs["lr"].type, docs["lr"].default, docs["lr"].allowed) == ("number", "0.1", "> 0")
    assert (docs["kind"].type, docs["kind"].allowed) == ("choice", "a | b")
    assert docs["steps"].allowed == ">= 0, <= 9"
    assert docs["on"].default == "true"
    assert docs["maybe"].type == "integer or none"
    assert docs["maybe"].default == "none"
    assert docs["names"].type == "list of string"


def test_every_registered_component_can_be_described():
    from fedkd.strategies.base import strategies

    for name in strategies.names():
        for doc in describe(strategies.get(name)):
            assert doc.description, f"{name}.{doc.name} has no description"
            assert doc.default != "required"


def test_what_is_wrong_with_no_place_has_no_colon_before_it():
    class Whole(pydantic.BaseModel):
        @pydantic.model_validator(mode="after")
        def refuse(self):
            raise ValueError("a and b: not together")

    for where, told in (("", "a and b: not together"), ("x", "x: a and b: not together")):
        with pytest.raises(pydantic.ValidationError) as caught:
            Whole()
        assert explain(caught.value, where) == told
