"""Swing distillation: likelihood, temperature, noise; each in its closed form and its limits."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn
from torch.nn import functional

from fedkd.clients.local import Batch
from fedkd.clients.swing_targets import SwingTargets, softening
from fedkd.clients.terms import Distil
from fedkd.data.federated import Split
from fedkd.distill.objectives.kl import KullbackLeibler
from fedkd.distill.simplex import project
from fedkd.distill.targets import (
    SampleTargets,
    bounded,
    disturbed,
    noised,
    noised_probs,
    softened,
)
from fedkd.errors import ConfigError, DataError, RunError
from fedkd.privacy.options import Release, Swing
from fedkd.privacy.scorers.knn import NearestNeighbours
from fedkd.privacy.scorers.mask import Mask
from fedkd.privacy.sensitivity import diameter
from fedkd.privacy.swing import (
    SwingPlan,
    deviations,
    likelihood,
    prepare_swing,
    statement,
    targets,
    temperatures,
)
from fedkd.rng import Rng
from fedkd.types import Task

RNG = Rng(0).child("swing")
TASK = Task(name="toy", input_shape=(4,), classes=5)
P = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
numbers = arrays(
    np.float64, st.integers(1, 30), elements=st.floats(-1e6, 1e6, allow_nan=False, width=32)
)


def drawn(*shape, seed=0, dtype=torch.float32):
    return 3 * torch.randn(*shape, generator=Rng(seed).torch(), dtype=dtype)


def swing(map_="adaptive", **more):
    return Swing(**({"map": map_, "t_min": 1.0, "t_max": 9.0} | more))


# Likelihood


def test_ranks_from_zero_to_one():
    assert likelihood(torch.tensor([5.0, -1.0, 2.0])).tolist() == [1.0, 0.0, 0.5]


def test_ties_share_their_mean_rank():
    found = likelihood(torch.tensor([1.0, 1.0, 1.0, 7.0, 7.0]))
    assert found.tolist() == [0.25, 0.25, 0.25, 0.875, 0.875]


def test_one_item_is_not_private_and_equal_items_are_in_the_middle():
    assert likelihood(torch.tensor([3.0])).tolist() == [0.0]
    assert likelihood(torch.full((7,), 2.0)).tolist() == [0.5] * 7
    assert likelihood(torch.zeros(0)).shape == (0,)


def test_what_was_declared_is_private_and_moves_nobody_else():
    scores = torch.tensor([1.0, 2.0, 3.0])
    mask = torch.tensor([True, False, False])
    assert likelihood(scores, mask).tolist() == [1.0, 0.5, 1.0]


def test_tokens_are_ranked_together_at_their_places():
    scores = drawn(3, 4)
    found = likelihood(scores)
    assert found.shape == (3, 4)
    assert torch.equal(found.flatten(), likelihood(scores.flatten()))


def test_ranks_among_others_depend_on_the_others_alone():
    reference = torch.tensor([1.0, 2.0, 2.0, 4.0])
    found = likelihood(torch.tensor([0.0, 2.0, 3.0, 9.0]), reference=reference)
    assert found.tolist() == [0.0, 0.5, 0.75, 1.0]
    alone = likelihood(torch.tensor([3.0]), reference=reference)
    assert alone.tolist() == [0.75]


@given(numbers)
def test_likelihood_keeps_order_and_has_mean_one_half(values):
    scores = torch.from_numpy(values)
    p = likelihood(scores)
    assert float(p.min()) >= 0 and float(p.max()) <= 1
    assert bool((p[scores.argsort()].diff() >= 0).all())
    if len(values) > 1:
        assert float(p.mean()) == pytest.approx(0.5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_has_no_score_is_refused(bad):
    with pytest.raises(DataError, match="not finite"):
        likelihood(torch.tensor([1.0, bad]))
    with pytest.raises(DataError, match="reference score"):
        likelihood(torch.tensor([1.0]), reference=torch.tensor([bad]))


# Temperature


@pytest.mark.parametrize(
    ("map_", "gamma", "expected"),
    [
        ("adaptive", 1.0, [1.0, 3.0, 5.0, 9.0]),
        ("adaptive", 2.0, [1.0, 1.5, 3.0, 9.0]),
        ("reverse", 1.0, [9.0, 7.0, 5.0, 1.0]),
        ("reverse", 0.5, [9.0, 5.0, 9.0 - 8 * math.sqrt(0.5), 1.0]),
        ("constant", 1.0, [9.0] * 4),
    ],
)
def test_temperatures_in_closed_form(map_, gamma, expected):
    found = temperatures(P, swing(map_, gamma=gamma))
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected)


@given(numbers, st.floats(0.1, 5))
def test_private_items_are_never_colder_and_in_reverse_never_hotter(values, gamma):
    p = likelihood(torch.from_numpy(values)).sort().values
    up, down = (temperatures(p, swing(m, gamma=gamma)) for m in ("adaptive", "reverse"))
    assert bool((up.diff() >= 0).all()) and bool((down.diff() <= 0).all())
    assert float(up.min()) >= 1 - 1e-9 and float(up.max()) <= 9 + 1e-9
    torch.testing.assert_close(up + down, torch.full_like(up, 10.0))


@pytest.mark.parametrize("map_", ["adaptive", "reverse", "constant"])
def test_an_empty_range_is_a_constant_temperature_to_the_last_bit(map_):
    found = temperatures(P, swing(map_, t_min=1.7, t_max=1.7))
    assert found.tolist() == [1.7] * 4
    z = drawn(4, 5)
    plain = functional.softmax(z / 1.7, dim=-1)
    assert torch.equal(targets(z, found, swing(map_), 5.0, RNG), plain)


def test_what_cannot_be_a_temperature_is_refused():
    with pytest.raises(ConfigError, match=r"t_min = 5.* above t_max = 2.*map = 'reverse'"):
        temperatures(P, swing(t_min=5.0, t_max=2.0))
    with pytest.raises(ConfigError, match="map = 'adaptive'"):
        temperatures(P, swing("off"))


# Targets and noise


def test_without_noise_targets_are_exact_and_not_clipped():
    z, t = 50 * drawn(4, 5), temperatures(P, swing())
    expected = torch.stack([functional.softmax(z[i] / float(t[i]), dim=0) for i in range(4)])
    assert torch.equal(targets(z, t, swing(), 0.1, RNG), expected)
    probs = functional.softmax(z, dim=1)
    assert noised_probs(probs, t, 0.1, torch.zeros(4), RNG) is probs


def test_noise_follows_the_sensitivity_at_each_temperature():
    t = temperatures(P, swing())
    std = deviations(t, swing(noise=0.5), 10, 5.0)
    assert std.tolist() == pytest.approx([0.5 * diameter(10, 5.0, float(v)) for v in t])
    assert bool((std.diff() < 0).all())
    assert deviations(t, swing(), 10, 5.0).tolist() == [0.0] * 4


@pytest.mark.parametrize("map_", ["adaptive", "reverse"])
def test_private_temperatures_are_paid_for_at_the_coldest(map_):
    t = temperatures(P, swing(map_))
    std = deviations(t, swing(map_, noise=2.0), 10, 5.0, public=False)
    assert std.tolist() == pytest.approx([2 * diameter(10, 5.0, 1.0)] * 4)
    assert bool((std >= deviations(t, swing(map_, noise=2.0), 10, 5.0)).all())


def test_a_constant_temperature_tells_nothing_and_is_paid_for_as_it_is():
    t = temperatures(P, swing("constant"))
    std = deviations(t, swing("constant", noise=1.0), 10, 5.0, public=False)
    assert std.tolist() == pytest.approx([diameter(10, 5.0, 9.0)] * 4)


def test_noise_has_its_scale_before_projection_and_is_independent():
    n, k = 4000, 5
    t = torch.tensor([1.0, 4.0], dtype=torch.float64).repeat(n // 2)
    std = torch.tensor([0.3, 0.02], dtype=torch.float64).repeat(n // 2)
    z = drawn(1, k).expand(n, k)
    clean = functional.softmax(bounded(z, 5.0) / t[:, None].float(), dim=1)
    noise = (disturbed(z, t, 5.0, std, RNG) - clean).double()
    for offset, sigma in ((0, 0.3), (1, 0.02)):
        part = noise[offset::2]
        # 10,000 values: standard errors of deviation and mean are sigma / 141 and sigma / 100.
        assert float(part.std()) == pytest.approx(sigma, rel=0.03)
        assert abs(float(part.mean())) < 0.04 * sigma
        correlation = torch.corrcoef(part.T) - torch.eye(k)
        assert float(correlation.abs().max()) < 0.1


def test_noised_targets_are_distributions_and_addressed():
    z, t = drawn(50, 5), temperatures(likelihood(drawn(50)), swing())
    one = targets(z, t, swing(noise=0.3), 5.0, RNG)
    assert float(one.min()) >= 0
    torch.testing.assert_close(one.sum(1), torch.ones(50))
    assert torch.equal(one, targets(z, t, swing(noise=0.3), 5.0, RNG))
    other = targets(z, t, swing(noise=0.3), 5.0, RNG.child("next"))
    assert bool((one != other).any(1).all())


def test_with_noise_logits_are_bounded_and_only_there():
    z = torch.tensor([[40.0, 0.0, -40.0], [40.0, 0.0, -40.0]])
    t = torch.tensor([2.0, 2.0], dtype=torch.float64)
    found = noised(z, t, 1.0, torch.tensor([1e-9, 0.0]), RNG)
    bound = functional.softmax(torch.tensor([0.5, 0.0, -0.5]), dim=0)
    torch.testing.assert_close(found[0], bound, rtol=0, atol=1e-6)
    assert torch.equal(found[1], functional.softmax(z[1] / 2, dim=0))


def test_bounded_logits_stay_within_the_diameter():
    """The farthest that any two rows get is what the noise is scaled to."""
    z = 100 * drawn(400, 4, dtype=torch.float64)
    t = torch.full((400,), 3.0, dtype=torch.float64)
    p = disturbed(z, t, 2.0, torch.zeros(400), RNG)
    far = float(torch.cdist(p, p).max())
    limit = diameter(4, 2.0, 3.0)
    assert 0.9 * limit < far <= limit + 1e-12


def test_fused_probabilities_are_bounded_as_the_logits_that_they_are():
    z, t = drawn(30, 5, dtype=torch.float64), torch.full((30,), 3.0, dtype=torch.float64)
    std = torch.full((30,), 0.05)
    probs = functional.softmax(z / 3.0, dim=1)
    torch.testing.assert_close(noised_probs(probs, t, 1.0, std, RNG), noised(z, t, 1.0, std, RNG))
    hard = torch.eye(5)[:2]
    assert bool(torch.isfinite(noised_probs(hard, t[:2], 5.0, std[:2], RNG)).all())


def test_softening_probabilities_and_where_it_does_nothing():
    z = drawn(6, 5, dtype=torch.float64)
    probs = functional.softmax(z, dim=1)
    t = torch.tensor([1.0, 2.0, 1.0, 9.0, 0.5, 1.0], dtype=torch.float64)
    found = softened(probs, t)
    torch.testing.assert_close(found, functional.softmax(z / t[:, None], dim=1))
    assert torch.equal(found[t == 1], probs[t == 1])
    assert bool(torch.isfinite(softened(torch.eye(3), t[:3])).all())


def test_the_projection_is_the_nearest_distribution():
    v = drawn(200, 6, dtype=torch.float64)
    p = project(v)
    assert float(p.min()) >= 0
    torch.testing.assert_close(p.sum(1), torch.ones(200, dtype=torch.float64))
    torch.testing.assert_close(project(p), p)
    # Optimality: (v - p) . (q - p) <= 0 for every distribution q; corners suffice.
    corners = torch.eye(6, dtype=torch.float64)
    gain = torch.einsum("nc,nqc->nq", v - p, corners[None] - p[:, None])
    assert float(gain.max()) < 1e-9


# In training


def test_without_rescale_the_loss_lacks_the_square_of_the_temperature():
    z, probs = drawn(4, 5), functional.softmax(drawn(4, 5, seed=1), dim=1)
    t = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    batch = Batch(z, torch.zeros(4, dtype=torch.long), torch.tensor([3, 2, 1, 0]), z, {})
    on, off = (
        Distil(KullbackLeibler(), SampleTargets(probs), t, 1.0, rescale=r)(batch)
        for r in (True, False)
    )
    torch.testing.assert_close(off, on / t.flip(0).square().float())
    single = Distil(KullbackLeibler(), SampleTargets(probs), 4.0, 1.0, rescale=False)(batch)
    q = functional.log_softmax(z / 4, dim=1)
    p = probs.flip(0)
    torch.testing.assert_close(single, (p * (p.log() - q)).sum(1))


class Tokens(nn.Module):
    """The smallest language model: a token's own row of logits."""

    def __init__(self, vocabulary):
        super().__init__()
        self.table = nn.Embedding(vocabulary, vocabulary)
        with torch.no_grad():
            self.table.weight.zero_()

    def forward(self, x):
        return self.table(x)


def test_tokens_are_taught_each_at_its_temperature():
    """Every token's teacher is the same; what is learned is softer exactly where p is high."""
    x = torch.arange(6).reshape(2, 3)
    p = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    plan = swing(t_min=1.0, t_max=4.0)
    t = temperatures(p, plan)
    teacher = torch.tensor([2.0, 0.0, 0.0, 0.0, 0.0, -2.0]).expand(2, 3, 6)
    soft = targets(teacher, t, plan, 5.0, RNG)
    assert torch.equal(soft[0, 1], functional.softmax(teacher[0, 1] / 4, dim=0))
    student = Tokens(6)
    optimizer = torch.optim.SGD(student.parameters(), lr=20.0)
    for _ in range(300):
        optimizer.zero_grad()
        loss = KullbackLeibler()(student(x).flatten(0, 1), soft.flatten(0, 1), t.flatten())
        loss.mean().backward()
        optimizer.step()
    # At its own T each student agrees with the teacher: heat teaches the same logits.
    torch.testing.assert_close(student(x), bounded(teacher, 5.0), rtol=0, atol=0.02)
    hot = swing(t_max=40.0)
    clean, noisy = (
        targets(teacher, temperatures(p, hot), swing(t_max=40.0, noise=noise), 5.0, RNG)
        for noise in (0.0, 0.1)
    )
    assert noisy.shape == (2, 3, 6)
    gaps = (noisy - clean).norm(dim=-1)
    assert float(gaps[p == 1].max()) < float(gaps[p == 0].min())


def test_softening_takes_the_items_at_hand():
    t = torch.tensor([1.0, 2.0, 3.0])
    made = SwingTargets(noise=torch.tensor([0.1, 0.2, 0.3]), clip=4.0, rescale=False)
    part = softening(made, t, torch.tensor([2, 0]))
    assert part.temperatures.tolist() == [3.0, 1.0]
    assert part.noise.tolist() == pytest.approx([0.3, 0.1])
    assert (part.clip, part.rescale) == (4.0, False)
    assert softening(made, t, noise=False).noise is None
    assert softening(None, t) is None
    z = drawn(2, 4)
    expected = noised(z, part.temperatures, 4.0, part.noise, RNG)
    assert torch.equal(part.of_logits(z, RNG), expected)


@pytest.mark.parametrize(("made", "t"), [(SwingTargets(), None), ("adaptive", torch.ones(2))])
def test_half_a_swing_is_an_error_and_not_silently_off(made, t):
    with pytest.raises(RunError, match="needs SwingTargets and a temperature"):
        softening(made, t)


# The whole


def pool(n=40, seed=0):
    return Split(drawn(n, 4, seed=seed), torch.arange(n) % 5)


def test_prepared_temperatures_of_the_pool_and_of_clients():
    options = swing(noise=0.5)
    t, std, _ = prepare_swing(options, Release(logit_clip=2.0), pool(), None, TASK, RNG)
    scores = NearestNeighbours().score_public(pool(), TASK, RNG)
    assert torch.equal(t, temperatures(likelihood(scores), options))
    assert std.tolist() == pytest.approx([0.5 * diameter(5, 2.0, float(v)) for v in t])
    data = pool(seed=1)
    own, paid, _ = prepare_swing(options, Release(logit_clip=2.0), pool(), data, TASK, RNG)
    assert own.shape == (40,) and float(own.max()) <= 9
    assert paid.tolist() == pytest.approx([0.5 * diameter(5, 2.0, 1.0)] * 40)
    few = Split(data.x[:3], data.y[:3])
    alone, _, _ = prepare_swing(options, Release(), pool(), few, TASK, RNG)
    assert torch.equal(alone, own[:3])


def test_a_scorer_that_says_it_is_private_is_paid_for_at_the_coldest():
    options = swing(noise=1.0)
    scorer = NearestNeighbours(private=True)
    t, std, _ = prepare_swing(options, Release(), pool(), None, TASK, RNG, scorer)
    assert len(t.unique()) == 40
    assert std.tolist() == pytest.approx([diameter(5, 5.0, 1.0)] * 40)


def test_declared_items_take_the_ends_of_the_range():
    t, _, _ = prepare_swing(swing(), Release(), pool(), None, TASK, RNG, Mask(indices=(1, 3)))
    assert t.tolist() == [9.0 if i in (1, 3) else 1.0 for i in range(40)]


def test_a_constant_temperature_needs_no_pool_and_no_scorer():
    options = swing("constant", noise=1.0, scorer="nonsense")
    t, std, _ = prepare_swing(options, Release(), None, pool(), TASK, RNG)
    assert t.tolist() == [9.0] * 40
    assert std.tolist() == pytest.approx([diameter(5, 5.0, 9.0)] * 40)


def test_a_plan_scores_the_pool_once(monkeypatch):
    calls = []
    original = NearestNeighbours.score_public
    monkeypatch.setattr(
        NearestNeighbours, "score_public", lambda self, *a: calls.append(1) or original(self, *a)
    )
    plan = SwingPlan(swing(), Release(), pool(), TASK, RNG)
    plan.of_pool(), plan.of_data(pool(seed=1)), plan.of_data(pool(seed=2))
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("options", "data", "said"),
    [
        (swing(), None, r"'adaptive' needs a public pool.*data.public.size = 500"),
        (swing(), pool(), "compares clients' own examples"),
        (swing(scorer="rarity"), None, "scores tokens.*allowed are knn, mask, reference-loss"),
        (swing(scorer="kn"), None, "did you mean 'knn'"),
    ],
)
def test_what_cannot_be_prepared_is_refused(options, data, said):
    there = None if "pool" in said or "compares" in said else pool()
    with pytest.raises(ConfigError, match=said):
        prepare_swing(options, Release(), there, data, TASK, RNG)


def test_no_statement_claims_an_epsilon():
    for options in (swing(), swing("constant", noise=0.5), swing("reverse", noise=1.0)):
        said = statement(options)
        assert "no epsilon: the temperature is a heuristic" in said
        assert "reconstruction" in said
        assert ("not accounted for" in said) is (options.noise > 0)
    assert statement(swing("off")) == "swing distillation: off"
