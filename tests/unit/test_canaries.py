"""Text canaries, and what all canaries share: holders, coins, shares, reports."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest
from scipy import stats

from fedkd.data.dataset import Dataset
from fedkd.data.federated import UNLABELLED, Federation
from fedkd.data.partition import divide
from fedkd.data.registries import partitions
from fedkd.data.tokenizers import UNKNOWN
from fedkd.errors import ConfigError, DataError
from fedkd.privacy.canaries.draw import CanarySet, draw
from fedkd.privacy.canaries.options import Canaries
from fedkd.privacy.canaries.secrets import enumerate_space, pattern_of
from fedkd.rng import Rng

LETTERS = "abcdefghijklmnopqrstuvwxyz 0123456789-"


@dataclass(frozen=True)
class Letters:
    """A tokenizer of single characters; what it does not know is its last token."""

    alphabet: str = LETTERS

    @property
    def names(self) -> tuple[str, ...]:
        return ("", *self.alphabet, UNKNOWN)

    def encode(self, text: str) -> np.ndarray:
        known = {c: i for i, c in enumerate(self.names)}
        return np.array([known.get(c, len(known) - 1) for c in text], dtype=np.int64)

    def decode(self, tokens: np.ndarray) -> str:
        return "".join(self.names[t] for t in tokens)


def texts(length: int = 24, n: int = 60, tokenizer: Letters | None = None) -> Dataset:
    tokenizer = tokenizer or Letters()
    classes = len(tokenizer.names)
    rows = Rng(0, ("rows",)).numpy().integers(1, classes - 1, size=(n, length + 1))
    rows[::3, length // 2 :] = 0
    zeros = np.zeros(n, dtype=np.int64)
    test = (rows[:10].copy(), zeros[:10])
    return Dataset(
        "letters", rows, zeros, *test, classes, tokenizer.names, tokenizer=tokenizer
    )  # fmt: skip


DATA = texts()


def drawn(
    sizes=(20, 20, 20, 20), rng=0, coins=0, data: Dataset = DATA, **values: object
) -> CanarySet:
    options = Canaries(**{"kind": "text", "references": 50, "count": 4, **values})
    return draw(options, data, None, sizes, Rng(rng, ("canaries",)), Rng(coins, ("coins",)))


def test_rows_are_the_texts_padded_and_secrets_are_distinct():
    made = drawn(pattern="pin {}{}-{} end", repetitions=(1, 2))
    assert made.x.dtype == np.int64 and made.x.shape == (8, 25)
    assert made.reference_x.shape == (50, 25)
    for row, text in zip(made.x, made.texts, strict=True):
        assert text.startswith("pin ") and text[6] == "-" and text.endswith(" end")
        assert DATA.tokenizer.decode(row) == text
        assert (row[len(text) :] == 0).all() and (row[: len(text)] != 0).all()
    rows = {tuple(row) for row in np.concatenate([made.x, made.reference_x])}
    assert len(rows) == 58
    assert made.space == 1000
    assert not made.y.any() and not made.reference_y.any()


def test_a_secret_stays_the_same_when_references_are_raised():
    for gaps in (4, 9):
        few, many = (drawn(pattern="no " + "{}" * gaps, references=n) for n in (30, 3000))
        assert np.array_equal(few.x, many.x)
        assert np.array_equal(few.reference_x, many.reference_x[:30])
        assert few.holders == many.holders
        assert np.array_equal(few.inside, many.inside)


def test_the_order_of_levels_changes_nothing():
    one, other = drawn(repetitions=(1, 2, 8)), drawn(repetitions=(8, 1, 2))
    assert one.digest() == other.digest()
    assert one.repetitions.tolist() == [1] * 4 + [2] * 4 + [8] * 4


@pytest.mark.parametrize("gaps", [3, 8])
def test_secrets_are_uniform(gaps):
    """Small spaces are shuffled, large ones drawn from; digits are uniform and independent."""
    made = drawn(pattern="no " + "{}" * gaps, references=900 if gaps == 3 else 10_000)
    digits = made.reference_x[:, 3 : 3 + gaps] - DATA.tokenizer.encode("0")
    for place in range(gaps):
        assert stats.chisquare(np.bincount(digits[:, place], minlength=10)).pvalue > 1e-3
    pairs = np.bincount(10 * digits[:, 0] + digits[:, 1], minlength=100)
    assert stats.chisquare(pairs).pvalue > 1e-3


def test_first_secret_is_uniform_over_addresses():
    values = {"pattern": "no {}", "count": 1, "repetitions": 1, "coin": False, "references": 2}
    first = [drawn(rng=seed, **values).texts[0] for seed in range(600)]
    counts = Counter(first)
    assert len(counts) == 10
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


def test_a_whole_space_can_be_used_and_is_enumerated_in_order():
    made = drawn(pattern="no {}{}", alphabet=("abc",), count=2, repetitions=1, references=7)
    every = enumerate_space(made.options, DATA)
    want = ["no " + a + b for a, b in itertools.product("abc", repeat=2)]
    assert [DATA.tokenizer.decode(row) for row in every] == want
    used = np.concatenate([made.x, made.reference_x])
    assert sorted(map(tuple, used)) == sorted(map(tuple, every))


def test_only_small_spaces_are_enumerated():
    small = Canaries(kind="text", pattern="no {}{}{}")
    assert enumerate_space(small, DATA).shape == (1000, 25)
    assert enumerate_space(replace(small, pattern="no {}{}{}{}{}{}"), DATA) is None


def test_words_fill_gaps_and_spaces_may_be_huge():
    words = ("one", "two", "three")
    made = drawn(pattern="say {} and {}", alphabet=words, count=1, repetitions=1, references=8)
    seen = {made.texts[0], *(DATA.tokenizer.decode(row) for row in made.reference_x)}
    assert seen == {f"say {a} and {b}" for a, b in itertools.product(words, repeat=2)}
    assert pattern_of(Canaries(alphabet="ab")).words == ("a", "b")
    assert pattern_of(Canaries(alphabet=("ab", "c"))).words == ("ab", "c")
    huge = drawn(data=texts(length=400), pattern="no " + "{}" * 350)
    assert math.isinf(huge.space)
    assert huge.report()["space_bits"] == "inf"


def test_coins_are_fair_and_independent_by_canary():
    heads = np.array(
        [drawn(coins=seed, pattern="no {}{}{}", count=20).inside for seed in range(40)]
    )
    n = heads.size
    assert abs(heads.mean() - 0.5) < 3.3 * 0.5 / math.sqrt(n)
    by_canary = heads.sum(0)
    spread = ((by_canary - 20) ** 2 / 10).sum()
    assert 1e-3 < stats.chi2.sf(spread, heads.shape[1]) < 0.999
    neighbours = (heads[:, 1:] == heads[:, :-1]).mean()
    assert abs(neighbours - 0.5) < 3.3 * 0.5 / math.sqrt(n)


def test_other_coins_flip_the_same_canaries_and_other_secrets_keep_the_coins():
    one, other, third = drawn(), drawn(coins=1), drawn(rng=1)
    assert np.array_equal(one.x, other.x) and one.holders == other.holders
    assert not np.array_equal(one.inside, other.inside)
    assert not np.array_equal(one.x, third.x) and one.holders != third.holders
    assert np.array_equal(one.inside, third.inside)
    assert drawn(coin=False).inside.all()


@pytest.mark.parametrize("clients", [1, 3, 7])
def test_holders_are_balanced_distinct_and_vary(clients):
    made = drawn(sizes=(0, 5, 5, 5, 5, 5, 5), clients=clients, count=10)
    assert all(len(set(who)) == clients for who in made.holders)
    held = np.bincount([k for who in made.holders for k in who], minlength=7)
    assert held.sum() == 60 * clients
    assert held.max() - held.min() <= 1
    assert len(set(made.holders)) > 1 or clients == 7


def test_planting_adds_copies_to_their_holders_alone():
    made = drawn(clients=2, repetitions=(1, 4))
    rows: Counter = Counter()
    for client in range(4):
        planted = made.planted(client, 20)
        held = [i for i, who in enumerate(made.holders) if client in who and made.inside[i]]
        want = np.repeat(held, made.repetitions[held])
        assert np.array_equal(planted.x, made.x[want])
        assert len(planted.instead) == 0 and planted.instead.dtype == np.int64
        rows.update(map(tuple, planted.x.tolist()))
    found = np.array([rows[tuple(row)] for row in made.x.tolist()])
    assert np.array_equal(found, made.copies * made.inside)
    assert np.array_equal(made.copies, 2 * made.repetitions)
    assert np.array_equal(made.changed, made.copies)


def test_who_holds_nothing_gets_nothing():
    made = drawn(sizes=(5,) * 30, count=2, repetitions=1, coin=False)
    idle = set(range(30)) - {k for who in made.holders for k in who}
    assert len(idle) == 28
    assert all(made.planted(k, 5) is None for k in idle)


def test_a_share_replaces_examples_apart_and_whatever_the_coins():
    values = {"repetitions": 1, "count": 6, "clients": 2, "share": 0.15}
    all_in = drawn(coin=False, **values)
    assert np.array_equal(all_in.copies, [6] * 6)
    assert np.array_equal(all_in.changed, [12] * 6)
    places: dict[int, np.ndarray] = {}
    for client in range(4):
        planted = all_in.planted(client, 20)
        assert len(planted.instead) == len(planted.x) == 3 * 3
        assert len(set(planted.instead.tolist())) == 9
        assert (np.diff(planted.instead) > 0).all() and planted.instead.max() < 20
        places[client] = planted.instead
    half = drawn(coins=3, **values)
    assert 0 < half.inside.sum() < 6
    for client in range(4):
        planted = half.planted(client, 20)
        if planted is not None:
            assert set(planted.instead) <= set(places[client])
            assert len(planted.instead) == len(planted.x)
    # What one canary replaces does not depend on whether the others are planted.
    for i in range(6):
        alone, without = (replace(all_in, inside=np.arange(6) == i), np.arange(6) != i)
        rest = replace(all_in, inside=without)
        for client in all_in.holders[i]:
            a, b = alone.planted(client, 20).instead, rest.planted(client, 20).instead
            assert np.array_equal(np.sort(np.concatenate([a, b])), places[client])


def test_a_tiny_share_replaces_one_example():
    made = drawn(sizes=(8,) * 4, repetitions=1, share=0.001, coin=False)
    assert len(made.planted(0, 8).instead) == 1
    assert np.array_equal(made.copies, [1] * 4)


def test_the_largest_share_named_fits():
    values = {"repetitions": 1, "count": 6, "sizes": (3, 40)}
    with pytest.raises(DataError, match=r"client 1 holds 3 .* 40 training") as error:
        drawn(share=0.9, **values)
    assert "at most 0.325;" in str(error.value)
    made = drawn(share=0.325, coin=False, **values)
    assert [len(made.planted(k, n).instead) for k, n in ((0, 3), (1, 40))] == [3, 39]
    with pytest.raises(DataError, match=r"at most 0\.333333"):
        drawn(share=0.6, **{**values, "sizes": (3, 39)})


def test_planted_in_a_federation_of_texts():
    partition = divide(DATA, partitions.get("iid")(), 4, Rng(0), "iid")
    plain = Federation.build(DATA, partition, validation=0.1, rng=Rng(0))
    sizes = [plain.train_size(k) for k in range(4)]
    made = drawn(sizes=sizes)
    planted = {k: p for k in range(4) if (p := made.planted(k, sizes[k])) is not None}
    federation = plain.plant(planted)
    for k in range(4):
        now, before = federation.client(k), plain.client(k)
        extra = len(planted[k].y) if k in planted else 0
        assert federation.sizes(k)["train"] == len(now.train) == sizes[k] + extra
        assert np.array_equal(now.train.x[: sizes[k]], before.train.x)
        assert np.array_equal(now.validation.x, before.validation.x)
        assert np.array_equal(now.test.y, before.test.y)
        if extra:
            put = now.train.y[sizes[k] :].numpy()
            follows = np.where(planted[k].x[:, 1:] == 0, UNLABELLED, planted[k].x[:, 1:])
            assert np.array_equal(put, follows)
    assert sum(map(sum, federation.counts())) == sum(sizes) + (made.copies * made.inside).sum()


def test_the_report_is_json_and_the_digest_sees_everything():
    made = drawn()
    table = json.loads(json.dumps(made.report(), allow_nan=False))
    assert table["count"] == 24 and table["references"] == 50
    assert table["inside"] == made.inside.sum()
    assert table["space_bits"] == pytest.approx(6 * math.log2(10))
    for i, entry in enumerate(table["canaries"]):
        assert entry["text"] == made.texts[i] and entry["inside"] == made.inside[i]
        assert tuple(entry["holders"]) == made.holders[i]
        assert entry["level"] == entry["copies"] == made.repetitions[i]
    assert table["digest"] == drawn().digest()
    others = [drawn(coins=1), drawn(rng=1), drawn(references=51), drawn(clients=2)]
    assert len({made.digest(), *(o.digest() for o in others)}) == 5


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"kind": "none"}, 'canaries.kind = "none"'),
        ({"kind": "random-image"}, 'letters holds texts; set canaries.kind to "text"'),
        ({"pattern": "my number is 1"}, "no gap"),
        ({"alphabet": ("a", "b", "a")}, "'a' is given twice"),
        ({"alphabet": ("a", "")}, "an empty one"),
        ({"pattern": "no {}{}", "alphabet": ("a", "aa", "aba")}, "can give the same text"),
        ({"pattern": "no {}{}"}, r"at least 3 gaps"),
        ({"pattern": "no {}{}", "references": 80}, r"at least 3 gaps, lower .* to at most 76"),
        ({"pattern": "no {}", "alphabet": "a"}, "give a larger alphabet"),
        ({"pattern": "NO {}{}{}{}"}, r"cannot write: .* it has no 'N', 'O';"),
        ({"pattern": f"no {UNKNOWN} {{}}{{}}{{}}"}, "cannot write"),
        ({"pattern": "a very long number is {}{}{}{}"}, "26 tokens, but the rows .* have 25"),
        ({"pattern": "{}{}{}{}"}, "the first token differs"),
        ({"clients": 5}, "there are 4 clients"),
        ({"share": 0.5, "repetitions": 2}, r"set repetitions = \[1\]"),
        ({"share": 0.5, "repetitions": 1, "sizes": (0, 9, 9, 9)}, "client 0 .* no share fits"),
    ],
)
def test_refusals_say_what_is_wrong_and_what_to_do(values, says):
    values = {"references": 90, **values} if values.get("pattern") == "no {}{}" else values
    with pytest.raises(ConfigError, match=says):
        drawn(**values)


def test_no_canary_inside_is_refused():
    values = {"count": 2, "repetitions": 1}
    outcomes = []
    for seed in range(20):
        try:
            outcomes.append(drawn(coins=seed, **values).inside.sum())
        except DataError as error:
            assert "all 2 canaries fell on tails" in str(error)
            outcomes.append(0)
    assert set(outcomes) == {0, 1, 2}
    assert drawn(coins=outcomes.index(0), coin=False, **values).inside.all()


def test_clients_whose_data_changed_are_refused():
    made = drawn(repetitions=1, share=0.1, coin=False)
    with pytest.raises(DataError, match="has 21 training examples, but had 20"):
        made.planted(made.holders[0][0], 21)


def test_words_that_need_a_separator_are_told_apart_by_one():
    words = ("ann", "anna", "hanna")
    for pattern in ("to {} {}", "to {} of {}", "to {}"):
        assert pattern_of(Canaries(pattern=pattern, alphabet=words)).words == words
    with pytest.raises(ConfigError, match="put a character"):
        pattern_of(Canaries(pattern="to {}a{}", alphabet=words))
