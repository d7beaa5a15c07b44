"""Swing distillation by configuration: loss weights, options of a scorer, and what is refused."""

import numpy as np
import pytest
import torch

from fedkd.clients.local import Batch
from fedkd.clients.terms import Distil
from fedkd.distill.objectives.kl import KullbackLeibler
from fedkd.distill.targets import SampleTargets
from fedkd.engine.setup import prepare
from fedkd.errors import ConfigError
from fedkd.types import select

ADAPTIVE = {"privacy.swing.map": "adaptive", "privacy.swing.t_max": 5.0}
POOL = {"data.public.size": 40}
FEDMD = {"name": "fedmd", "digest_loss": "kl", "fusion": "mean-probs"}


def test_the_loss_of_an_item_counts_what_it_weighs():
    logits = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])
    probs = torch.full((3, 2), 0.5)
    weights = torch.tensor([1.0, 0.25, 0.0])
    plain, weighed = (
        Distil(KullbackLeibler(), SampleTargets(probs), 2.0, 1.0, counts=counts)
        for counts in (None, weights)
    )
    index = torch.tensor([2, 0, 1])
    batch = Batch(logits, torch.zeros(3, dtype=torch.long), index, logits[index], {})
    assert torch.equal(weighed(batch), plain(batch) * weights[index])


@pytest.mark.parametrize("strategy", [FEDMD, "ds-fl", "feddf", "fedgkd"])
def test_open_items_teach_more(strategy, tiny, play):
    changes = {**ADAPTIVE, **POOL, "rounds": 3}
    if strategy == "feddf":
        strategy = {"name": "feddf", "server_steps": 4}
    equal, open_ = (
        play(tiny(strategy, {**changes, "privacy.swing.weights": w})) for w in ("equal", "open")
    )
    swing, temperatures = open_.prepared.setting.swing, open_.prepared.setting.public_temperatures
    if temperatures is not None:
        # T = 1 + 4 p and w = 1 - p: hot items weigh little.
        assert torch.allclose(swing.weights, 1 - (temperatures - 1) / 4)
    states = (r.client_state(0) if strategy == FEDMD else r.state for r in (equal, open_))
    one, two = (select(state, "model") for state in states)
    assert one.keys() == two.keys()
    assert any(not np.array_equal(one[k], two[k]) for k in one)
    assert all(np.isfinite(v).all() for v in two.values())


def test_options_of_a_scorer_reach_it(tiny):
    near, far = (
        prepare(tiny(FEDMD, {**ADAPTIVE, **POOL, "privacy.swing.scorer_options": {"k": k}}))
        for k in (1, 30)
    )
    assert not torch.equal(near.setting.public_temperatures, far.setting.public_temperatures)


def test_wrong_options_of_a_scorer_are_named(tiny):
    with pytest.raises(ConfigError, match="scorer_options"):
        prepare(tiny(FEDMD, {**ADAPTIVE, **POOL, "privacy.swing.scorer_options": {"nearest": 3}}))
    with pytest.raises(ConfigError, match="did you mean 'knn'"):
        prepare(tiny(FEDMD, {**ADAPTIVE, **POOL, "privacy.swing.scorer": "knnn"}))


@pytest.mark.parametrize("votes", ["gnmax", "confident-gnmax"])
def test_votes_answer_with_one_class(votes, tiny, play):
    changes = {
        **POOL,
        "privacy.unit": "client",
        "privacy.noise_multiplier": 0.05,
        "privacy.delta": 1e-3,
        "privacy.max_epsilon": 1e9,
        "privacy.release.votes": votes,
        "privacy.release.vote_threshold": 0.5,
        "clients.participation": {"scheme": "full"},
    }
    done = play(tiny(FEDMD, changes), rounds=2)
    consensus = done.state["consensus/scores"]
    top = consensus.max(1)
    answered = top > 0.99
    assert answered.any()
    if votes == "gnmax":
        assert answered.all()
    else:
        # Where the clients disagree nobody is taught anything.
        assert np.allclose(consensus[~answered], 0.1, atol=1e-3)
    worst = done.strategy.guard.level.worst(done.strategy.guard.payload(done.state, 1))
    assert worst == pytest.approx(0.05)
    assert 0 < done.strategy.guard.ledger.epsilon() < np.inf
