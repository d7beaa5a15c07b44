"""What each scorer takes for private, and that nothing judges itself."""

import gzip
import json
import math
from pathlib import Path

import pytest
import torch

from fedkd.data.federated import Split
from fedkd.errors import ConfigError, DataError
from fedkd.options import build
from fedkd.privacy.options import Swing
from fedkd.privacy.scorers import knn
from fedkd.privacy.scorers.base import ExampleScorer, TokenScorer, scorers
from fedkd.privacy.scorers.knn import NearestNeighbours
from fedkd.privacy.scorers.mask import Mask
from fedkd.privacy.scorers.pattern import Pattern
from fedkd.privacy.scorers.rarity import Rarity
from fedkd.privacy.scorers.reference_loss import ReferenceLoss
from fedkd.privacy.swing import likelihood, temperatures
from fedkd.rng import Rng
from fedkd.types import Task

TASK = Task(name="toy", input_shape=(2, 3), classes=3)
RNG = Rng(0).child("scorers")
TEXT = Path(__file__).parents[3] / "shared" / "data" / "shakespeare_roles.jsonl.gz"


def toy(n=60, seed=0, spread=0.3):
    """Three clouds around the corners of a cube, one a class."""
    y = torch.arange(n) % 3
    corners = 4 * torch.eye(6)[:3]
    x = corners[y] + spread * torch.randn(n, 6, generator=Rng(seed).torch())
    return Split(x.reshape(n, 2, 3), y)


def changed(split, i, x=None, y=None):
    xs, ys = split.x.clone(), split.y.clone()
    if x is not None:
        xs[i] = x
    if y is not None:
        ys[i] = y
    return Split(xs, ys)


def test_the_registry_knows_all_and_says_what_they_are():
    names = ["knn", "mask", "pattern", "rarity", "reference-loss"]
    assert scorers.names() == names
    for name in names:
        assert scorers.summary(name).endswith(".")
        assert issubclass(scorers.get(name), ExampleScorer | TokenScorer)
        assert not build(scorers.get(name), {}).private
        assert build(scorers.get(name), {"private": True}).private
    with pytest.raises(ConfigError, match="unknown scorer 'kn'; did you mean 'knn'"):
        scorers.get("kn")


@pytest.mark.parametrize(("name", "options"), [("knn", {"k": 0}), ("rarity", {"n": 0})])
def test_ranges_are_checked(name, options):
    with pytest.raises(ConfigError, match="greater than or equal to 1"):
        build(scorers.get(name), options)


@pytest.mark.parametrize("scorer", [NearestNeighbours(), ReferenceLoss()], ids=["knn", "loss"])
def test_what_stands_out_scores_highest_and_the_rest_alike_in_any_order(scorer):
    pool = changed(toy(), 7, x=torch.full((2, 3), -6.0))
    scores = scorer.score_public(pool, TASK, RNG)
    assert scores.shape == (60,) and scores.dtype == torch.float64
    assert int(scores.argmax()) == 7
    assert torch.equal(scores, scorer.score_public(pool, TASK, RNG))
    other = toy(seed=1)
    found = scorer.score(other, pool, TASK, RNG)
    order = torch.randperm(60, generator=Rng(2).torch())
    again = scorer.score(Split(other.x[order], other.y[order]), pool, TASK, RNG)
    torch.testing.assert_close(again, found[order])
    assert scorer.score(Split(other.x[:0], other.y[:0]), pool, TASK, RNG).shape == (0,)


@pytest.mark.parametrize("scorer", [NearestNeighbours(), ReferenceLoss()], ids=["knn", "loss"])
def test_examples_that_are_not_public_judge_nobody(scorer):
    """The score of one example depends on itself and on the pool, not on its neighbours."""
    pool, data = toy(), toy(seed=1)
    moved = changed(data, 3, x=torch.full((2, 3), 9.0))
    a, b = (scorer.score(d, pool, TASK, RNG) for d in (data, moved))
    same = torch.arange(60) != 3
    torch.testing.assert_close(a[same], b[same])
    assert b[3] > a[3]


def test_knn_is_the_mean_distance_to_others_in_chunks_as_in_one(monkeypatch):
    pool = toy(n=23)
    flat = pool.x.double().flatten(1)
    distances = (flat[:, None] - flat[None]).square().sum(2).sqrt()
    expected = distances.sort(1).values[:, 1:4].mean(1)
    whole = NearestNeighbours(k=3).score_public(pool, TASK, RNG)
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-6)
    monkeypatch.setattr(knn, "CHUNK", 5)
    torch.testing.assert_close(NearestNeighbours(k=3).score_public(pool, TASK, RNG), whole)
    data = toy(n=7, seed=1)
    gaps = (data.x.double().flatten(1)[:, None] - flat[None]).square().sum(2).sqrt()
    found = NearestNeighbours(k=99).score(data, pool, TASK, RNG)
    torch.testing.assert_close(found, gaps.mean(1), rtol=0, atol=1e-6)


def test_knn_of_a_pool_of_one_or_of_twins():
    one = toy(n=1)
    assert NearestNeighbours().score_public(one, TASK, RNG).tolist() == [0.0]
    twins = Split(one.x.repeat(4, 1, 1), one.y.repeat(4))
    assert float(NearestNeighbours().score_public(twins, TASK, RNG).max()) < 1e-6


def test_a_wrong_label_surprises_the_reference_of_the_other_fold():
    """Trained on the example itself, a model would have learned the wrong label."""
    pool = changed(toy(), 9, y=(toy().y[9] + 1) % 3)
    scores = ReferenceLoss(l2=1e-6).score_public(pool, TASK, RNG)
    assert int(scores.argmax()) == 9
    assert float(scores[9]) > 10 * float(scores.median())
    own = ReferenceLoss(l2=1e-6).score(pool, pool, TASK, RNG)
    assert float(own[9]) < 0.5 * float(scores[9])


def test_the_reference_is_the_optimum_of_its_loss():
    pool = toy(n=30, spread=2.0)
    scorer = ReferenceLoss(l2=0.1, steps=200)
    centred = pool.x.double().flatten(1) - pool.x.double().flatten(1).mean(0)
    x = torch.cat([centred / centred.square().mean().sqrt(), torch.ones(30, 1)], 1)
    w = scorer._fit(x, pool.y, torch.zeros(7, 3, dtype=torch.float64)).requires_grad_()
    loss = torch.nn.functional.cross_entropy(x @ w, pool.y) + 0.05 * w[:-1].square().sum()
    (grad,) = torch.autograd.grad(loss, w)
    assert float(grad.abs().max()) < 1e-4
    nll = torch.nn.functional.cross_entropy(x @ w.detach(), pool.y, reduction="none")
    torch.testing.assert_close(scorer.score(pool, pool, TASK, RNG), nll, rtol=1e-4, atol=1e-5)


def test_reference_loss_of_tiny_pools_and_of_a_fold_without_a_class():
    assert ReferenceLoss().score_public(toy(n=1), TASK, RNG).tolist() == [
        pytest.approx(math.log(3))
    ]
    scores = ReferenceLoss().score_public(toy(n=4), TASK, RNG)
    assert bool(torch.isfinite(scores).all()) and float(scores.min()) > 0


def test_reference_loss_needs_labels_and_says_what_does_not():
    blind = Split(toy().x, torch.full((60,), -1))
    with pytest.raises(ConfigError, match=r"needs the labels.*scorer = 'knn'"):
        ReferenceLoss().score_public(blind, TASK, RNG)
    with pytest.raises(ConfigError, match="needs the labels"):
        ReferenceLoss().score(toy(), blind, TASK, RNG)
    known, unknown = (NearestNeighbours().score_public(p, TASK, RNG) for p in (toy(), blind))
    assert torch.equal(known, unknown)


def test_rarity_counts_with_one_added():
    model = Rarity(n=2).fit(["abab", "abac"])
    assert model.vocabulary == 4
    # After a: b three times, c once. At the start: a twice. After b: a twice.
    expected = [-math.log(3 / 6), -math.log(4 / 8), -math.log(1 / 6)]
    (found,) = model.score(["abb"]).tolist()
    assert found == pytest.approx(expected)
    (unseen,) = model.score(["zzz"]).tolist()
    assert unseen == pytest.approx([math.log(6), math.log(4), math.log(4)])
    total = sum(math.exp(-float(model.score(["a" + c])[0, 1])) for c in "abcz")
    assert total == pytest.approx(1.0)


def test_rarity_of_single_tokens_numbers_and_words():
    unigrams = Rarity(n=1).fit([[1, 1, 2]])
    assert unigrams.score([[1, 2, 3]])[0].tolist() == pytest.approx(
        [-math.log(3 / 6), -math.log(2 / 6), -math.log(1 / 6)]
    )
    words = Rarity(n=3).fit([["the", "cat", "sat"]] * 5)
    scores = words.score([["the", "cat", "sat"], ["the", "cat", "flew"]])
    assert scores.shape == (2, 3)
    assert torch.equal(scores[0, :2], scores[1, :2])
    assert scores[1, 2] > scores[0, 2]


def test_sequences_of_several_lengths_are_refused():
    with pytest.raises(DataError, match=r"lengths from 2 to 3; cut them"):
        Rarity().fit(["ab"]).score(["ab", "abc"])
    assert Rarity().fit(["ab"]).score([]).shape == (0, 0)


def test_pattern_marks_what_a_match_reaches():
    text = "tel 48291 or 12"
    marks = Pattern().fit().score([text])[0]
    assert "".join(c for c, m in zip(text, marks.tolist(), strict=True) if m) == "48291"
    words = Pattern(expression=r"\d{3}").fit().score([["no. 1", "23", " end"]])
    assert words.tolist() == [[1.0, 1.0, 0.0]]
    assert not Pattern.ranked and not Mask.ranked and Rarity.ranked


def test_pattern_refuses_what_it_cannot_read():
    with pytest.raises(ConfigError, match="is no regular expression"):
        Pattern(expression="[").fit()
    with pytest.raises(ConfigError, match="reads text"):
        Pattern().fit().score([[1, 2]])


def test_mask_is_what_was_declared():
    pool = toy(n=9)
    assert Mask(indices=(2, 5)).score_public(pool, TASK, RNG).nonzero().flatten().tolist() == [2, 5]
    both = Mask(indices=(0,), classes=(1,)).score_public(pool, TASK, RNG)
    assert both.tolist() == [1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0]
    assert torch.equal(Mask(classes=(1,)).score(pool, pool, TASK, RNG), (pool.y == 1).double())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "nothing declared"),
        ({"indices": (9,)}, r"\[9\] are not in the public pool; allowed are 0 to 8"),
        ({"indices": (-1,)}, "allowed are 0 to 8"),
        ({"classes": (3,)}, r"\[3\] are no classes of 'toy'; allowed are 0 to 2"),
    ],
)
def test_mask_refuses_what_does_not_exist(options, said):
    with pytest.raises(ConfigError, match=said):
        Mask(**options).score_public(toy(n=9), TASK, RNG)


def test_mask_of_clients_needs_classes_and_classes_need_labels():
    with pytest.raises(ConfigError, match="declare classes"):
        Mask(indices=(1,)).score(toy(), toy(), TASK, RNG)
    with pytest.raises(ConfigError, match="declare indices"):
        Mask(classes=(1,)).score_public(Split(toy().x, torch.full((60,), -1)), TASK, RNG)


@pytest.mark.skipif(not TEXT.exists(), reason="the corpus of plays is not in shared/data")
def test_a_planted_number_is_hotter_than_common_words():
    with gzip.open(TEXT, "rt", encoding="utf-8") as file:
        text = " ".join(json.loads(next(file))["text"].replace("\n", " ") for _ in range(12))
    length, secret = 60, "my number is 482913 and "
    lines = [text[i : i + length] for i in range(0, 60 * length, length)]
    planted = (secret + lines[7])[:length]
    reference = Rarity(n=2).fit([text[i : i + length] for i in range(60 * length, 160000, length)])
    lines[7] = planted
    swing = Swing(map="adaptive", t_min=1.0, t_max=10.0)
    t = temperatures(likelihood(reference.score(lines)), swing)
    assert t.shape == (60, length)
    digits = torch.tensor([c.isdigit() for c in planted])
    common = torch.tensor([c.isalpha() for c in secret] + [False] * (length - len(secret)))
    assert float(t[7][digits].mean()) > 9.0
    assert float(t[7][digits].min()) > float(t[7][common].median())
    assert float(t[7][digits].mean()) > float(t[7][common].mean()) + 2.0
    exact = temperatures(Pattern().fit().score(lines), swing)
    assert torch.equal(exact[7] == 10.0, digits)
    assert bool((exact[:7] == 1.0).all())
