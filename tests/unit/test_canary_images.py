"""Image canaries: random pixels within bounds, and reserved examples under wrong labels."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from fedkd.data.dataset import Dataset
from fedkd.data.federated import Federation
from fedkd.data.partition import divide
from fedkd.data.registries import partitions
from fedkd.data.sources import Digits
from fedkd.errors import ConfigError, DataError
from fedkd.privacy.canaries.draw import CanarySet, draw, enumerate_space, reserve
from fedkd.privacy.canaries.options import Canaries
from fedkd.rng import Rng

KINDS = ("random-image", "mislabelled")


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return Digits(limit=600, test_limit=60).load()


def drawn(data: Dataset, sizes=(20,) * 4, rng=0, coins=0, **values: object) -> CanarySet:
    options = Canaries(**{"kind": "random-image", "references": 60, "count": 5, **values})
    address = Rng(rng, ("canaries",))
    rest, taken = reserve(options, data, address)
    return draw(options, rest, taken, sizes, address, Rng(coins, ("coins",)))


def rows(*parts: np.ndarray) -> list[bytes]:
    return sorted(row.tobytes() for part in parts for row in np.ascontiguousarray(part))


def tabular(classes: int = 3, value: float | None = None) -> Dataset:
    x = Rng(1, ("table",)).numpy().normal(size=(90, 5)).astype(np.float32)
    x = x if value is None else np.full_like(x, value)
    y = np.arange(90) % classes
    return Dataset("table", x, y, x[:9], y[:9], classes)


def test_random_images_are_uniform_over_bounds_and_classes(digits):
    made = drawn(digits, references=3000)
    low, high = digits.task().bounds
    x = np.concatenate([made.x, made.reference_x])
    assert x.shape == (3030, 1, 8, 8) and x.dtype == np.float32
    assert x.min() >= low and x.max() <= high
    counts, _ = np.histogram(x, bins=20, range=(low, high))
    assert counts.sum() == x.size
    assert stats.chisquare(counts).pvalue > 1e-3
    labels = np.concatenate([made.y, made.reference_y])
    assert labels.dtype == np.int64
    assert stats.chisquare(np.bincount(labels, minlength=10)).pvalue > 1e-3
    assert len(set(rows(x))) == len(x)
    assert made.space == np.inf and set(made.texts) == {""}


def test_tabular_inputs_get_canaries_of_their_shape():
    data = tabular()
    made = drawn(data)
    assert made.x.shape == (30, 5) and made.reference_x.shape == (60, 5)
    assert made.x.max() <= data.train_x.max()
    assert drawn(data, kind="mislabelled", count=1, references=20).x.shape == (6, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_secret_stays_the_same_when_references_are_raised(digits, kind):
    few, many = (drawn(digits, kind=kind, references=n) for n in (40, 300))
    assert np.array_equal(few.x, many.x) and np.array_equal(few.y, many.y)
    assert np.array_equal(few.reference_x, many.reference_x[:40])
    assert np.array_equal(few.reference_y, many.reference_y[:40])


@pytest.mark.parametrize("kind", KINDS)
def test_other_coins_flip_the_same_canaries(digits, kind):
    one, other, third = (
        drawn(digits, kind=kind, rng=rng, coins=coins) for rng, coins in ((0, 0), (0, 1), (1, 0))
    )
    assert np.array_equal(one.x, other.x) and np.array_equal(one.y, other.y)
    assert one.holders == other.holders
    assert not np.array_equal(one.inside, other.inside)
    assert np.array_equal(one.inside, third.inside)
    assert not np.array_equal(one.x, third.x)


def test_mislabelled_examples_are_taken_out_in_proportion_and_never_keep_their_label(digits):
    options = Canaries(kind="mislabelled", references=170, count=5)
    rest, taken = reserve(options, digits, Rng(0))
    assert (len(taken.y), len(rest.train_y)) == (200, 400)
    assert rows(rest.train_x, taken.x) == rows(digits.train_x)
    assert rest.test_x is digits.test_x
    share = np.bincount(taken.y, minlength=10) - 200 * np.bincount(digits.train_y) / 600
    assert np.abs(share).max() <= 1
    made = draw(options, rest, taken, (50, 50), Rng(0), Rng(1))
    assert np.array_equal(np.concatenate([made.x, made.reference_x]), taken.x)
    wrong = (np.concatenate([made.y, made.reference_y]) - taken.y) % 10
    assert (wrong > 0).all()
    assert stats.chisquare(np.bincount(wrong, minlength=10)[1:]).pvalue > 1e-3


def test_owners_follow_what_is_left():
    data = tabular()
    owned = Dataset(
        "owned", data.train_x, data.train_y, data.test_x, data.test_y, 3, (), np.arange(90)
    )
    rest, taken = reserve(Canaries(kind="mislabelled", references=20, count=1), owned, Rng(0))
    assert np.array_equal(owned.train_x[rest.train_ids], rest.train_x)
    assert len(rest.train_ids) == 90 - len(taken.y) == 64


def test_other_kinds_take_nothing(digits):
    for kind in ("none", "random-image"):
        assert reserve(Canaries(kind=kind), digits, Rng(0)) == (digits, None)
    assert enumerate_space(Canaries(kind="random-image"), digits) is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.0, 0.05])
def test_planted_in_a_federation_of_digits(digits, kind, share):
    levels = (1,) if share else (1, 3)
    options = Canaries(
        kind=kind, references=50, count=6, repetitions=levels, share=share, clients=2
    )
    rest, taken = reserve(options, digits, Rng(0))
    partition = divide(rest, partitions.get("dirichlet")(alpha=0.5), 4, Rng(0), "dirichlet")
    plain = Federation.build(rest, partition, validation=0.1, rng=Rng(0))
    sizes = [plain.train_size(k) for k in range(4)]
    made = draw(options, rest, taken, sizes, Rng(0), Rng(1))
    planted = {k: p for k in range(4) if (p := made.planted(k, sizes[k])) is not None}
    federation = plain.plant(planted)
    assert planted
    for k, put in planted.items():
        now, before = federation.client(k), plain.client(k)
        assert federation.train_size(k) == federation.sizes(k)["train"] == len(now.train)
        assert len(now.train) == sizes[k] + (0 if share else len(put.y))
        kept = np.delete(before.train.x.numpy(), put.instead, axis=0)
        assert np.array_equal(now.train.x.numpy(), np.concatenate([kept, put.x]))
        assert np.array_equal(federation.counts()[k], np.bincount(now.train.y, minlength=10))
        assert np.array_equal(now.validation.x, before.validation.x)
        assert np.array_equal(now.test.x, before.test.x)
    total = sum(len(p.y) for p in planted.values())
    assert total == (made.copies * made.inside).sum()


def test_the_report_names_labels(digits):
    made = drawn(digits)
    table = json.loads(json.dumps(made.report(), allow_nan=False))
    assert table["space_bits"] == "inf"
    assert [entry["label"] for entry in table["canaries"]] == made.y.tolist()
    assert "text" not in table["canaries"][0]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"kind": "text"}, 'digits holds inputs; set .* to "random-image" or "mislabelled"'),
        ({"kind": "none"}, "there is nothing to plant"),
        ({"kind": "mislabelled", "references": 700}, r"references to at most 5\d\d, or"),
        ({"kind": "mislabelled", "count": 200}, "; lower canaries.count, or choose"),
        ({"clients": 5}, "at most 4"),
    ],
)
def test_refusals_say_what_is_wrong_and_what_to_do(digits, values, says):
    with pytest.raises(ConfigError, match=says):
        drawn(digits, **values)


def test_the_largest_number_of_references_named_fits(digits):
    with pytest.raises(DataError) as error:
        drawn(digits, kind="mislabelled", references=700)
    most = int(str(error.value).split("at most ")[-1].split(",")[0])
    drawn(digits, kind="mislabelled", references=most)
    with pytest.raises(DataError, match="references"):
        drawn(digits, kind="mislabelled", references=most + 1)


def test_data_without_a_choice_are_refused(digits):
    with pytest.raises(DataError, match="none is wrong"):
        drawn(tabular(classes=1), kind="mislabelled", count=1, references=20)
    with pytest.raises(DataError, match="would not differ"):
        drawn(tabular(value=1.0))
    options = Canaries(kind="mislabelled", references=20, count=1)
    with pytest.raises(DataError, match=r"needs a reserve of 26 examples \(given: none\)"):
        draw(options, digits, None, (9, 9), Rng(0), Rng(0))
