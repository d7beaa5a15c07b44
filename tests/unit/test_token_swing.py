"""Swing distillation on text: a temperature for the token that each place predicts."""

import math

import pytest
import torch

from fedkd.data.federated import Split
from fedkd.errors import ConfigError
from fedkd.privacy.options import Release, Swing
from fedkd.privacy.scorers.base import Fitted, Sequences, TokenScorer
from fedkd.privacy.scorers.knn import NearestNeighbours
from fedkd.privacy.scorers.pattern import Pattern
from fedkd.privacy.scorers.rarity import Rarity
from fedkd.privacy.sensitivity import diameter
from fedkd.privacy.swing import Items, SwingPlan, likelihood, prepare_swing, targets, temperatures
from fedkd.privacy.token_swing import TokenScores, predicted
from fedkd.rng import Rng
from fedkd.types import Task

NAMES = ("", *"abcdefghij 0123456789")
LENGTH = 12
TEXT = Task(
    name="notes", input_shape=(LENGTH,), classes=len(NAMES), class_names=NAMES, sequence=True
)
NUMBERS = Task(name="notes", input_shape=(LENGTH,), classes=len(NAMES), sequence=True)
IMAGES = Task(name="images", input_shape=(1, 4, 4), classes=3)
RNG = Rng(0).child("swing")
COMMON = ["a bad cafe", "a bad badge", "a cab", "dad faced a b", "a big fig", "a bead", "a bad cab"]


def written(*texts: str) -> Split:
    """Rows as a data set has them: one token more than a network reads, padding behind."""
    rows = torch.zeros(len(texts), LENGTH + 1, dtype=torch.int64)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = torch.tensor([NAMES.index(c) for c in text])
    follows = rows[:, 1:].clone()
    follows[follows == 0] = -1
    return Split(rows[:, :-1].contiguous(), follows)


def swing(map_="adaptive", **more) -> Swing:
    return Swing(**({"map": map_, "t_min": 1.0, "t_max": 9.0, "scorer": "rarity"} | more))


def plan(options: Swing | None = None, task=TEXT, pool=None, scorer=None) -> SwingPlan:
    pool = written(*COMMON * 4) if pool is None else pool
    return SwingPlan(options or swing(), Release(), pool, task, RNG, scorer)


def equal(one: Items, other: Items) -> bool:
    same = (one.weights is None) == (other.weights is None)
    pairs = zip(one, other, strict=True)
    return same and all(a is None or torch.equal(a, b) for a, b in pairs)


def test_every_place_has_its_temperature_and_noise():
    items = plan(swing(noise=0.5, weights="open")).of_pool()
    for values in items:
        assert values.shape == (28, LENGTH) and values.dtype == torch.float64
    expected = 0.5 * diameter(len(NAMES), Release().logit_clip, items.temperatures.numpy())
    assert torch.allclose(items.noise, torch.from_numpy(expected))
    assert torch.allclose(items.weights, 1 - (items.temperatures - 1) / 8)
    there = predicted(written(*COMMON * 4))
    assert float(items.temperatures[there].max()) > 8 and int((~there).sum()) > 0
    assert plan().of_pool().weights is None


def test_the_temperature_of_a_place_is_that_of_the_token_predicted_there():
    """The digits stand at 6 to 9 of the text, and are predicted one place earlier."""
    data = written("a bad 4829 b")
    items = plan(swing(scorer="pattern")).of_data(data)
    assert items.temperatures[0].tolist() == [1.0] * 5 + [9.0] * 4 + [1.0] * 3
    first = plan(swing(scorer="pattern")).of_data(written("4829 a"))
    assert first.temperatures[0].tolist() == [9.0] * 3 + [1.0] * 9
    assert plan(swing("reverse", scorer="pattern")).of_data(data).temperatures[0].tolist() == (
        [9.0] * 5 + [1.0] * 4 + [9.0] * 2 + [1.0]
    )


def test_a_match_may_begin_with_what_is_read_first_and_end_with_what_is_predicted_last():
    text = "1" * (LENGTH + 1)
    exact = Pattern(expression=rf"\d{{{LENGTH + 1}}}")
    assert plan(scorer=exact).of_data(written(text)).temperatures.tolist() == [[9.0] * LENGTH]
    assert plan(scorer=exact).of_data(written(text[1:])).temperatures.tolist() == [[1.0] * LENGTH]


def test_a_pattern_needs_what_tokens_stand_for_and_rarity_does_not():
    with pytest.raises(ConfigError, match="reads text"):
        plan(swing(scorer="pattern"), NUMBERS).of_pool()
    assert equal(plan(task=NUMBERS).of_pool(), plan().of_pool())


@pytest.mark.parametrize("map_", ["adaptive", "reverse"])
def test_where_nothing_is_predicted_nothing_is_hidden_and_nothing_takes_a_rank(map_):
    data = written("a bad cab", "", "b", "a 0")
    items = plan(swing(map_)).of_data(data)
    there = predicted(data)
    assert there.sum(1).tolist() == [8, 0, 0, 2]
    assert bool((items.temperatures[~there] == 1.0).all())
    longer = [
        Split(
            torch.cat([s.x, s.x.new_zeros(len(s), 5)], 1),
            torch.cat([s.y, -s.y.new_ones(len(s), 5)], 1),
        )
        for s in (written(*COMMON * 4), data)
    ]
    again = plan(swing(map_), pool=longer[0]).of_data(longer[1])
    assert torch.equal(again.temperatures[:, :LENGTH], items.temperatures)
    assert bool((again.temperatures[:, LENGTH:] == 1.0).all())
    assert torch.equal(
        plan(swing(map_), pool=longer[0]).of_pool().temperatures[:, :LENGTH],
        plan(swing(map_)).of_pool().temperatures,
    )


def test_a_scorer_never_sees_padding():
    seen: list[list[str | int]] = []

    class Spy(TokenScorer):
        ranked = True

        def fit(self, sequences: Sequences) -> Fitted:
            seen.extend(list(s) for s in sequences)
            return self

        def score(self, sequences: Sequences) -> torch.Tensor:
            assert len({len(s) for s in sequences}) == 1
            return torch.ones(len(sequences), len(sequences[0]), dtype=torch.float64)

    plan(scorer=Spy()).of_data(written("ab", "", "abc"))
    assert "".join(seen[-1]) == COMMON[-1] and not any("" in s for s in seen)


def test_a_missing_label_in_the_middle_is_a_gap_and_not_the_end():
    data = written("a bad 4829 b")
    data.y[0, 2] = -1
    t = plan(swing(scorer="pattern")).of_data(data).temperatures[0]
    assert t.tolist() == [1.0] * 5 + [9.0] * 4 + [1.0] * 3


def test_the_pool_is_scored_by_its_other_half():
    texts = [*COMMON * 4, "070707070707"]
    found = TokenScores(Rarity(), written(*texts), TEXT, RNG).of_pool
    order = torch.randperm(len(texts), generator=RNG.child("folds").torch()).tolist()
    cut = len(texts) // 2
    for mine, other in ((order[:cut], order[cut:]), (order[cut:], order[:cut])):
        model = Rarity().fit([texts[i] for i in other])
        for i in mine:
            (scores,) = model.score([texts[i]]).tolist()
            assert found[i, : len(texts[i]) - 1].tolist() == pytest.approx(scores[1:])
            assert not found[i, len(texts[i]) - 1 :].any()
    # A scorer that had seen the row itself would not be surprised by it.
    itself = Rarity().fit(texts).score([texts[-1]])[0, 1:]
    assert float(found[-1, :11].mean()) > float(itself.mean()) + 0.5


def test_own_text_is_ranked_among_the_pool_by_a_scorer_of_all_of_it():
    made, data = plan(), written("a bad 0718", "a bad cab")
    own = torch.cat([s[1:] for s in Rarity().fit(COMMON * 4).score(["a bad 0718"])])
    pool = made._scores[predicted(written(*COMMON * 4))]
    expected = temperatures(likelihood(own, reference=pool), swing())
    found = made.of_data(data)
    assert torch.allclose(found.temperatures[0, :9], expected)
    assert float(found.temperatures[0, 5:9].mean()) > 8
    assert float(found.temperatures[1, :8].mean()) < 5
    alone = plan().of_data(written("a bad cab"))
    assert torch.equal(alone.temperatures[0], found.temperatures[1])


def test_private_temperatures_are_paid_for_at_the_coldest():
    options = swing(noise=1.0)
    coldest = diameter(len(NAMES), Release().logit_clip, 1.0)
    own = plan(options).of_data(written("a bad cab")).noise
    assert own.tolist() == [[pytest.approx(coldest)] * LENGTH]
    declared = plan(options, scorer=Rarity(private=True)).of_pool().noise
    assert declared.unique().tolist() == [pytest.approx(coldest)]


def test_a_constant_temperature_needs_no_pool_and_no_scorer():
    options = swing("constant", noise=1.0, scorer="nonsense")
    t, std, _ = prepare_swing(options, Release(), None, written("ab", ""), TEXT, RNG)
    assert t.tolist() == [[9.0] * LENGTH] * 2
    expected = diameter(len(NAMES), Release().logit_clip, 9.0)
    assert std.tolist() == [[pytest.approx(expected)] * LENGTH] * 2


def test_items_and_targets_are_addressed():
    assert equal(plan().of_pool(), plan().of_pool())
    items = plan(swing(noise=0.1)).of_pool()
    logits = torch.randn(28, LENGTH, len(NAMES), generator=Rng(1).torch())
    soft = targets(logits, items.temperatures, swing(noise=0.1), 5.0, RNG)
    assert soft.shape == logits.shape
    torch.testing.assert_close(soft.sum(-1), torch.ones(28, LENGTH))


def test_tiny_pools_and_no_data():
    one = plan(pool=written("ab"))
    assert one.of_pool().temperatures.shape == (1, LENGTH)
    empty = plan().of_data(Split(written("ab").x[:0], written("ab").y[:0]))
    assert empty.temperatures.shape == empty.noise.shape == (0, LENGTH)


@pytest.mark.parametrize("data", [None, written("ab")], ids=["pool", "own"])
def test_what_cannot_be_scored_is_refused(data):
    def prepare(options, pool, task=TEXT, scorer=None):
        prepare_swing(options, Release(), pool, data, task, RNG, scorer)

    pool = written(*COMMON)
    with pytest.raises(ConfigError, match=r"'knn' scores whole examples.*allowed are pattern, rar"):
        prepare(swing(scorer="knn"), pool)
    with pytest.raises(ConfigError, match="scores whole examples"):
        prepare(swing(scorer="knn"), pool, scorer=NearestNeighbours())
    with pytest.raises(ConfigError, match=r"scores tokens of text.*allowed are knn, mask"):
        prepare(swing(), pool, IMAGES)
    with pytest.raises(ConfigError, match="needs a public pool"):
        prepare(swing(), None)
    with pytest.raises(ConfigError, match="every sequence of the pool is empty"):
        prepare(swing(), written("", "a"))


def test_rarity_in_closed_form_at_a_place():
    """Half of a pool of equal rows: after a always b; 1 of 2 tokens and one unknown."""
    pool = written(*["ab"] * 6)
    found = TokenScores(Rarity(), pool, TEXT, RNG)
    assert found.of_pool[:, 0].tolist() == [pytest.approx(-math.log(4 / 6))] * 6
    assert found.of(written("ab", "aa"))[:, 0].tolist() == pytest.approx(
        [-math.log(7 / 9), -math.log(1 / 9)]
    )
