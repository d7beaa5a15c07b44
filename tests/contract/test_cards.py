"""Cards and presets: every strategy has a page that says what the code does, and keeps to it."""

from __future__ import annotations

import re

import pytest

from fedkd.config import load
from fedkd.engine.setup import make_strategy
from fedkd.engine.study import check
from fedkd.options import describe
from fedkd.presets import card, preset, preset_names, shared
from fedkd.registry import Registry
from fedkd.strategies.base import Strategy, strategies

SECTIONS = [
    "What it is",
    "Source and evidence",
    "What travels",
    "Options",
    "Logged metrics",
    "Implementation notes",
    "Measured results",
]
BUILT_IN = [n for n in strategies.names() if strategies.get(n).__module__.startswith("fedkd.")]


def sections(text: str) -> dict[str, str]:
    """The text of a card by the title of its second-level sections."""
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], (p.strip() for p in parts[2::2]), strict=True))


def options_table(cls: type[Strategy]) -> str:
    """What the table of options of a card has to be, word for word."""
    rows = [
        "| option | type | default | allowed | meaning |",
        "|---|---|---|---|---|",
        *(
            f"| `{o.name}` | {o.type} | {o.default} | {o.allowed.replace(' | ', ', ')} "
            f"| {o.description} |"
            for o in describe(cls)
        ),
    ]
    return "\n".join(rows)


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_strategy_has_a_card_with_all_sections_in_order(name):
    text = card("strategy", name)
    assert text.splitlines()[0].startswith(f"# {name}"), f"strategies/{name}.md is missing"
    found = sections(text)
    assert list(found) == SECTIONS
    assert all(found.values()), "an empty section"


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_card_cites_what_the_class_cites(name):
    cls = strategies.get(name)
    found = sections(card("strategy", name))["Source and evidence"]
    assert cls.source and f"- Source: {cls.source}." in found
    assert f"- Evidence: {cls.evidence}." in found


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_card_lists_the_options_of_the_class(name):
    expected = options_table(strategies.get(name))
    found = sections(card("strategy", name))["Options"]
    assert expected in found, f"the table in strategies/{name}.md has to be:\n{expected}"


def test_the_reconstruction_says_so_first_and_names_a_default_for_every_unknown():
    text = card("strategy", "fedd2s")
    assert "reconstruction" in text.splitlines()[0]
    rows = re.findall(
        r"^\| [^|]+ \| `(\w+)` \| ([^|]*) \| [^|]+ \|$", sections(text)["Source and evidence"], re.M
    )
    defaults = {o.name: o.default for o in describe(strategies.get("fedd2s"))}
    assert {option: default.strip() for option, default in rows} == defaults
    assert len(rows) == len(defaults)


@pytest.mark.parametrize("name", BUILT_IN)
def test_no_card_is_without_its_strategy_and_the_readme_lists_all(name):
    cards = {f.stem for f in shared("strategies").glob("*.md")}
    assert cards == set(BUILT_IN)
    readme = (shared("strategies").parent / "README.md").read_text(encoding="utf-8")
    assert f"[`{name}`](strategies/{name}.md)" in readme


@pytest.mark.parametrize("name", preset_names("strategy"))
def test_a_strategy_preset_builds_and_is_explained(name):
    made = load(None, [f"strategy={name}"])
    table = preset("strategy", name)
    assert table is not None and made.strategy.name == table["name"] != name
    strategy = make_strategy(made.strategy)
    assert {k: getattr(strategy, k) for k in table if k != "name"} == {
        k: tuple(v) if isinstance(v, list) else v for k, v in table.items() if k != "name"
    }
    assert f"`{name}`" in card("strategy", table["name"])


@pytest.mark.parametrize("name", preset_names("clients"))
def test_a_clients_preset_makes_a_federation_and_is_explained(name):
    made = load(None, [f"clients={name}", "strategy=fedavg", "data.partition=iid"])
    check(list(made.cells()))
    assert f"`{name}`" in (shared("clients") / "README.md").read_text(encoding="utf-8")


def test_the_table_says_what_the_class_says():
    registry: Registry[type[Strategy]] = strategies
    table = options_table(registry.get("fedprox"))
    assert "| `mu` | number | 0.01 | >= 0 | weight of the proximal term; 0 is FedAvg |" in table
    assert len(table.splitlines()) == 2 + len(describe(registry.get("fedprox")))
