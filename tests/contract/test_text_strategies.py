"""Every strategy that says it works on text does, with noise and with swing distillation too."""

from __future__ import annotations

import math

import pytest

from fedkd.errors import ConfigError
from fedkd.strategies.base import strategies

TOPICS = {"name": "pydoc-topics", "topics": 3, "rows_per_topic": 8, "length": 16}
TEXT = {
    "rounds": 2,
    "model": {"name": "gpt-tiny", "width": 16, "depth": 1, "heads": 2, "hidden": 16},
    "data.source": TOPICS,
    "data.partition": "natural",
    "data.public.size": 4,
    "clients.count": 3,
}
SWING = {"privacy.swing.map": "adaptive", "privacy.swing.scorer": "rarity"}
ABLE = [name for name in strategies.names() if strategies.get(name).sequences]
SWINGING = [name for name in ABLE if strategies.get(name).swings]


def uniform(name: str) -> dict[str, str]:
    """Return a strategy that weighs clients alike, as noise on a sum needs it."""
    return {"name": name, "weighting": "uniform"}


def bits_of(run) -> list[float]:
    """Return the bits per character of all clients after the last round."""
    return [
        r.value
        for r in run.log.records
        if r.metric == "bits_per_character" and r.round == 2 and r.readout == "composite"
    ]


def test_there_are_baselines_and_distillation_for_text():
    assert {"local-only", "fedavg", "fedavg-ft", "feddf", "fedgkd"} <= set(ABLE)
    assert {"feddf", "fedgkd"} == set(SWINGING)


@pytest.mark.parametrize("name", ABLE)
def test_a_strategy_for_text_learns_and_is_judged_in_bits(tiny, play, name):
    found = bits_of(play(tiny(name, TEXT)))
    assert len(found) >= 3
    # Guessing among 98 tokens costs 6.6 bits.
    assert all(math.isfinite(bits) and bits < math.log2(98) + 0.5 for bits in found)


@pytest.mark.parametrize("name", [n for n in strategies.names() if n not in ABLE])
def test_the_others_say_so_and_name_those_that_do(tiny, play, name):
    with pytest.raises(ConfigError, match="exchanges knowledge by class"):
        play(tiny(name, TEXT), 0)


@pytest.mark.parametrize("name", SWINGING)
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_students_in_the_federation_are_taught_by_swing_distillation(tiny, play, bits, name, noise):
    plain = play(tiny(name, {**TEXT, "rounds": 3}))
    swung = play(tiny(name, {**TEXT, **SWING, "rounds": 3, "privacy.swing.noise": noise}))
    assert bits(plain)["server"] != bits(swung)["server"]


@pytest.mark.parametrize("model", ["gpt-tiny", "lstm"])
@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_rows_of_text_are_the_examples_of_dp_sgd(tiny, play, model, mode):
    noised = {
        **TEXT,
        "model": {"name": model, "width": 16} | ({"depth": 1} if model == "gpt-tiny" else {}),
        "rounds": 1,
        "privacy.unit": "example",
        "privacy.noise_multiplier": 1.0,
        "privacy.delta": 1e-2,
        "privacy.dp_sgd.grad_sample_mode": mode,
    }
    run = play(tiny("fedavg", noised))
    assert 0 < run.strategy.guard.ledger.epsilon() < math.inf


def test_networks_for_text_can_be_summed_under_noise(tiny, play):
    noised = {**TEXT, "privacy.unit": "client", "privacy.noise_multiplier": 1.0}
    run = play(tiny(uniform("fedavg"), {**noised, "privacy.delta": 1e-2}))
    assert 0 < run.strategy.guard.ledger.epsilon() < math.inf


@pytest.mark.parametrize("name", ["fedavg", "feddf"])
def test_threads_change_nothing_about_text(tiny, play, bits, name):
    threads = {"engine.executor": "thread", "engine.workers": 2}
    assert bits(play(tiny(name, TEXT))) == bits(play(tiny(name, {**TEXT, **threads})))
