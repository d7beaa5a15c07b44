"""Presets of privacy: each is whole, runs with what its card names; its card says what holds."""

import re
from pathlib import Path

import pytest

from fedkd.config import load
from fedkd.engine.setup import prepare
from fedkd.errors import ConfigError
from fedkd.presets import card, preset, preset_names, shared
from fedkd.privacy.ledger import Claim
from fedkd.privacy.options import Privacy
from fedkd.privacy.swing import statement
from fedkd.strategies.base import strategies

NAMES = preset_names("privacy")
SECTIONS = [
    "What it does",
    "What is claimed",
    "Threat model",
    "What it needs",
    "Options",
    "Sources",
]
POISSON = {"clients.participation": {"scheme": "poisson", "ratio": 0.1}}
KL = {"name": "fedmd", "digest_loss": "kl", "fusion": "mean-probs"}
UNIFORM = {"name": "fedavg", "weighting": "uniform"}
FITTING = {
    "none": ("fedavg", {}),
    "client-eps8": (UNIFORM, POISSON),
    "client-eps1": (UNIFORM, POISSON),
    "example-eps8": ("fedavg", {}),
    "swing": (KL, {}),
    "swing-noise": (KL, POISSON),
    "votes-gnmax": (KL, POISSON),
}
UNFIT = {
    "client-eps8": ("fedavg", POISSON, "strategy.weighting = 'uniform'"),
    "client-eps1": (UNIFORM, {"clients.participation": {"scheme": "fixed", "ratio": 0.5}},
                    "'poisson'"),
    "example-eps8": ("fedd2s", {}, "privacy.release.mode = 'dpsgd+release'"),
    "swing": ("fedavg", {}, "use one of: "),
    "swing-noise": ("feddf", POISSON, "privacy.trust = 'local'"),
    "votes-gnmax": ("fedgkt", {}, "use a strategy whose uploads are"),
}  # fmt: skip


def one_line(text: str) -> str:
    """Text without line breaks and the marks of a quotation."""
    return " ".join(re.sub(r"^> ?", "", text, flags=re.MULTILINE).split())


def sections(name: str) -> dict[str, str]:
    """The text of a preset's card by the title of its second-level sections."""
    parts = re.split(r"^## (.+)$", card("privacy", name), flags=re.MULTILINE)
    return dict(zip(parts[1::2], (p.strip() for p in parts[2::2]), strict=True))


def private(name: str) -> Privacy:
    """The options that a preset stands for."""
    return load(None, [f"privacy={name}"]).privacy


def sentence(options: Privacy, sampling: str) -> str:
    """What is printed when the whole of a preset's epsilon is spent."""
    trust = options.trust if options.unit == "client" else "local"
    claim = Claim(
        options.unit, trust, options.adjacency, sampling, options.delta, options.accountant
    )
    return claim.sentence(options.epsilon)


def test_there_are_the_presets_that_are_documented_here():
    assert set(NAMES) == set(FITTING) == {f.stem for f in shared("privacy").glob("*.md")}
    assert set(UNFIT) == set(NAMES) - {"none"}


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_says_everything_that_its_claim_rests_on(name):
    table = preset("privacy", name)
    needed = {"unit"}
    if table["unit"] != "none":
        needed |= {"adjacency", "accountant", "epsilon", "delta"}
    if table["unit"] == "client":
        needed |= {"trust"}
    assert needed <= set(table)
    first = Path(shared("privacy") / f"{name}.toml").read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ") and first.endswith(".") and len(first) <= 100


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_has_a_card_with_all_sections_in_order(name):
    found = sections(name)
    assert card("privacy", name).startswith(f"# {name}\n")
    assert list(found) == SECTIONS
    assert all(found.values()), "an empty section"


@pytest.mark.parametrize("name", NAMES)
def test_a_card_quotes_what_a_run_prints(name):
    options, claimed = private(name), one_line(sections(name)["What is claimed"])
    if options.unit == "client":
        expected = sentence(options, "Poisson sampling of clients at rate 0.1")
    elif options.unit == "example":
        expected = sentence(
            options,
            "Poisson sampling of a client's examples at batch_size / examples in every step",
        )
    elif options.swing.map != "off":
        expected = statement(options.swing)
    else:
        expected = "no privacy mechanism was used; nothing is claimed (epsilon: inf)"
    assert expected in claimed, expected


@pytest.mark.parametrize("name", NAMES)
def test_a_card_names_only_options_and_strategies_that_exist(name):
    text = card("privacy", name)
    for key in re.findall(r"`(privacy\.(?!json)[\w.]+)`", text):
        at = Privacy()
        for part in key.split(".")[1:]:
            at = getattr(at, part)
    needs = sections(name)["What it needs"]
    named = set(re.findall(r"`([a-z0-9]+(?:-[a-z0-9]+)*)`", needs))
    assert name == "none" or named & set(strategies.names())
    for link in re.findall(r"\]\((\S+?)\)", text):
        assert (shared("privacy") / link).is_file()


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("swing")])
def test_swing_is_called_a_reconstruction_where_it_is_met_first(name):
    assert "a reconstruction from the abstract" in one_line(card("privacy", name))
    assert "a reconstruction" in (shared("privacy") / f"{name}.toml").read_text(encoding="utf-8")
    assert "arXiv:2212.08349" in sections(name)["Sources"]


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_plans_what_it_claims_with_what_its_card_names(name, tiny):
    strategy, changes = FITTING[name]
    prepared = prepare(tiny(strategy, {**changes, "privacy": name, "data.public.size": 20}))
    plan, options = prepared.plan, private(name)
    assert plan.options == options and plan.active == (options.unit != "none")
    assert (prepared.swing is not None) == (options.swing.map != "off")
    if plan.active:
        assert plan.delta == options.delta and min(plan.noise) > 0
        said = plan.claim()
        assert said.accountant == options.accountant and said.not_covered
        assert any("public pool" in item for item in said.not_covered)


@pytest.mark.parametrize("name", UNFIT)
def test_what_does_not_fit_is_refused_with_the_fix(name, tiny):
    strategy, changes, fix = UNFIT[name]
    with pytest.raises(ConfigError) as refused:
        prepare(tiny(strategy, {**changes, "privacy": name}))
    assert "privacy" in str(refused.value) or "clients.participation" in str(refused.value)
    assert fix in str(refused.value)


def test_less_epsilon_is_more_noise(tiny):
    quick = {**POISSON, "privacy.accountant": "rdp"}
    noise = {
        name: prepare(tiny(UNIFORM, {"privacy": name, **quick})).plan.noise_multiplier
        for name in ("client-eps8", "client-eps1")
    }
    assert noise["client-eps1"] > 1.2 * noise["client-eps8"]
