"""Fusion rules against NumPy, written from the formulas and not from the code."""

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from fedkd.distill.fusion_rules import fusions, label_shares
from fedkd.errors import ConfigError
from fedkd.rng import stream

K, B, C = 3, 6, 4
RULES = list(fusions.names())
COUNTS = np.array([[5, 0, 3, 0], [1, 4, 0, 0], [0, 6, 9, 0]], dtype=np.float64)
LABELS = np.array([0, 1, 2, 2, 1, 0])
every = pytest.mark.parametrize("rule", RULES)
temperatures = pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])


def drawn(k=K, scale=2.0):
    return stream(0, "logits", k).numpy().normal(size=(k, B, C)) * scale


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def shares_of(counts):
    """Shares by class, one at a time; 1/K where nobody holds it."""
    shares = np.empty_like(counts)
    for c in range(counts.shape[1]):
        total = sum(counts[:, c])
        shares[:, c] = [n / total if total else 1 / len(counts) for n in counts[:, c]]
    return shares


def by_hand(rule, z, temperature, shares=None, labels=None):
    """The fused probabilities example by example, in plain loops."""
    k, b, c = z.shape
    out = np.zeros((b, c))
    for i in range(b):
        p = np.stack([softmax(z[j, i] / temperature) for j in range(k)])
        if rule == "mean-logits":
            out[i] = softmax(sum(z[j, i] for j in range(k)) / k / temperature)
        elif rule == "mean-probs" or (rule == "class-counts" and shares is None):
            out[i] = sum(p) / k
        elif rule == "class-counts" and labels is not None:
            out[i] = sum(shares[j, labels[i]] * p[j] for j in range(k))
        elif rule == "class-counts":
            mass = np.array([sum(shares[j, m] * p[j, m] for j in range(k)) for m in range(c)])
            out[i] = mass / mass.sum()
        elif rule == "entropy":
            q = [softmax(z[j, i]) for j in range(k)]
            trust = softmax(np.array([sum(v * np.log(v) for v in row) for row in q]))
            out[i] = sum(trust[j] * p[j] for j in range(k))
        elif rule == "variance":
            spread = np.array([np.var(z[j, i]) for j in range(k)])
            weights = spread / spread.sum()
            out[i] = softmax(sum(weights[j] * z[j, i] for j in range(k)) / temperature)
        else:
            middle = np.median(p, axis=0)
            out[i] = middle / middle.sum()
    return out


def fused(rule, z, temperature, shares=None, labels=None):
    return fusions.get(rule)()(
        torch.as_tensor(z),
        temperature,
        None if shares is None else torch.as_tensor(shares),
        None if labels is None else torch.as_tensor(labels),
    ).numpy()


@every
@temperatures
@pytest.mark.parametrize("teachers", [1, 2, 3, 4])
def test_a_rule_is_its_formula(rule, temperature, teachers):
    z = drawn(teachers)
    counts = np.vstack([COUNTS, COUNTS[:1] + 1])[:teachers]
    for shares in (None, shares_of(counts)):
        for labels in (None, LABELS):
            found = fused(rule, z, temperature, shares, labels)
            expected = by_hand(rule, z, temperature, shares, labels)
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
            np.testing.assert_allclose(found.sum(1), 1, rtol=0, atol=1e-12)


@every
def test_the_order_of_teachers_does_not_matter(rule):
    z, shares, order = drawn(), shares_of(COUNTS), [2, 0, 1]
    for labels in (None, LABELS):
        one = fused(rule, z, 2.0, shares, labels)
        other = fused(rule, z[order], 2.0, shares[order], labels)
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-14)


@every
def test_one_teacher_and_equal_teachers_are_themselves(rule):
    z = drawn(1)
    alone = softmax(z[0] / 3.0)
    shares = shares_of(COUNTS)
    np.testing.assert_allclose(fused(rule, z, 3.0, shares[:1] * 0 + 1, LABELS), alone, atol=1e-12)
    for labels in (None, LABELS):
        repeated = np.repeat(z, K, axis=0)
        np.testing.assert_allclose(fused(rule, repeated, 3.0, shares, labels), alone, atol=1e-12)


@every
def test_gradient_reaches_the_logits_and_is_the_derivative(rule):
    z = torch.tensor(drawn(), requires_grad=True)
    shares, labels = torch.tensor(shares_of(COUNTS)), torch.tensor(LABELS)
    made = fusions.get(rule)()
    assert gradcheck(lambda v: made(v, 2.0, shares, labels), (z,))
    assert gradcheck(lambda v: made(v, 2.0, shares), (z,))
    (gradient,) = torch.autograd.grad(made(z, 2.0, shares, labels)[:, 0].sum(), z)
    assert gradient.abs().sum() > 0


@every
def test_a_high_temperature_is_uniform_and_a_low_one_is_sure(rule):
    z = np.zeros((K, B, C))
    z[:, :, 1] = 2.0
    z[0, :, 2] = 0.5
    np.testing.assert_allclose(fused(rule, z, 1e6), 1 / C, atol=1e-5)
    assert (fused(rule, z, 0.05).argmax(1) == 1).all()
    assert fused(rule, z, 0.05).max(1).min() > 0.99


def test_sure_teachers_count_more_only_where_the_rule_says_so():
    z = np.zeros((2, 1, C))
    z[0, 0, 0], z[1, 0, 1] = 6.0, 1.0
    plain = fused("mean-probs", z, 1.0)[0, 0]
    assert fused("entropy", z, 1.0)[0, 0] > plain
    assert fused("variance", z, 1.0)[0, 0] > plain
    same = np.repeat(z[:1], 2, axis=0)
    np.testing.assert_allclose(fused("entropy", same, 1.0), fused("mean-probs", same, 1.0))


def test_one_liar_changes_the_median_little():
    honest = np.zeros((4, 1, C))
    honest[:, 0, 2] = 3.0
    liar = np.zeros((1, 1, C))
    liar[0, 0, 0] = 50.0
    together = np.vstack([honest, liar])
    truth = softmax(honest[0, 0])
    np.testing.assert_allclose(fused("median", together, 1.0)[0], truth, atol=1e-12)
    assert abs(fused("mean-logits", together, 1.0)[0] - truth).max() > 0.5
    assert abs(fused("mean-probs", together, 1.0)[0] - truth).max() > 0.1


def test_teachers_without_variance_count_alike():
    flat = np.full((2, B, C), 7.0)
    np.testing.assert_allclose(fused("variance", flat, 1.0), 1 / C)


def test_extreme_logits_stay_finite():
    z = drawn(scale=1.0).astype(np.float32) * 1e4
    for rule in RULES:
        for labels in (None, LABELS):
            out = fused(rule, z, 0.1, shares_of(COUNTS).astype(np.float32), labels)
            assert np.isfinite(out).all(), rule


def test_class_counts_with_a_label_listens_only_to_those_who_hold_it():
    z = drawn()
    shares = shares_of(COUNTS)
    before = fused("class-counts", z, 1.0, shares, LABELS)
    # Teacher 2 holds no example of class 0: whatever it says there must not dilute the answer.
    z[2] = stream(0, "other").numpy().normal(size=(B, C)) * 9
    after = fused("class-counts", z, 1.0, shares, LABELS)
    zero = LABELS == 0
    assert np.array_equal(before[zero], after[zero])
    assert not np.allclose(before[~zero], after[~zero])


def test_a_teacher_without_examples_says_nothing_in_class_counts():
    z = drawn()
    counts = COUNTS.copy()
    counts[1] = 0
    counts[:, 3] = [1, 0, 2]
    for labels in (None, LABELS):
        with_it = fused("class-counts", z, 2.0, shares_of(counts), labels)
        without = fused("class-counts", z[[0, 2]], 2.0, shares_of(counts[[0, 2]]), labels)
        np.testing.assert_allclose(with_it, without, rtol=0, atol=1e-14)


def test_label_shares():
    found = label_shares(torch.tensor(COUNTS)).numpy()
    np.testing.assert_allclose(found, shares_of(COUNTS), rtol=0, atol=1e-15)
    np.testing.assert_allclose(found.sum(0), 1, rtol=0, atol=1e-15)
    assert (found[:, 3] == 1 / K).all(), "nobody holds the last class"
    assert (found[:, :3][COUNTS[:, :3] == 0] == 0).all()
    only = label_shares(torch.tensor([[4.0, 0.0]])).numpy()
    assert only.tolist() == [[1.0, 1.0]]


def test_an_unknown_rule_is_named_with_its_neighbour():
    with pytest.raises(ConfigError, match="did you mean 'class-counts'"):
        fusions.get("class-count")
