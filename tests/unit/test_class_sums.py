"""Class means and label counts of a client's own examples: one example moves them by 1 at most."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedkd.errors import ConfigError, RunError
from fedkd.privacy.class_sums import (
    ClassRows,
    class_vector_sums,
    noisy_class_means,
    noisy_histogram,
)
from fedkd.privacy.options import Release
from fedkd.privacy.sensitivity import softmax
from fedkd.rng import Rng

WIDE = Release(row_norm=1e3)
C, D = 6, 3


def example_means(values, y, release=WIDE, noise=0.0, rng=None, counted=True, classes=C):
    return noisy_class_means(
        values,
        y,
        classes,
        simplex=frozenset({"probs"}),
        release=release,
        noise_multiplier=noise,
        rng=rng or Rng(0),
        counted=counted,
    )


def examples(rng, n):
    return {"probs": softmax(3 * rng.normal(size=(n, C))), "features": rng.normal(size=(n, D))}


@given(seed=st.integers(0, 10**6))
def test_one_example_moves_the_sums_by_1_at_most(seed):
    rng = Rng(seed).numpy()
    release = Release(row_norm=float(10 ** rng.uniform(-2, 2)), count_share=0.3)
    layout = ClassRows({"probs": C, "features": D}, frozenset({"probs"}), release)
    values, y = examples(rng, 9), rng.integers(0, C, 9)
    values["features"] *= 10.0 ** rng.uniform(-100, 100, (9, 1))

    def sums(keep):
        packed = layout.pack({k: v[keep] for k, v in values.items()}, len(keep))
        return class_vector_sums(layout, packed, y[keep], C)

    without = sums(np.arange(8))
    assert np.linalg.norm(sums(np.arange(9)) - without) <= 1 + 1e-9
    replaced = sums(np.array([*range(7), 8]))
    assert np.linalg.norm(replaced - without) <= 2 + 1e-9
    # A row as long as it may be uses the whole budget.
    values["probs"][8], values["features"][8] = np.eye(C)[0], 1e6
    assert np.linalg.norm(sums(np.arange(9)) - without) == pytest.approx(1)


def test_without_noise_class_means_are_exact():
    rng = Rng(0).numpy()
    values, y = examples(rng, 30), rng.integers(1, 4, 30)
    found = example_means(values, y)
    assert found["labels"].tolist() == [1, 2, 3]
    assert found["counts"].tolist() == np.bincount(y)[1:].tolist()
    for name, rows in values.items():
        for at, c in enumerate((1, 2, 3)):
            np.testing.assert_allclose(found[name][at], rows[y == c].mean(0), atol=1e-5)
    assert {k: v.dtype for k, v in found.items()} == {
        "labels": np.int32, "counts": np.int32, "probs": np.float32, "features": np.float32
    }  # fmt: skip
    assert "counts" not in example_means(values, y, counted=False)


def test_noise_on_class_means_has_the_promised_scale():
    """1,000 zero rows a class: std = z R / sqrt(1 - b) / n, and z / sqrt(b) on the count."""
    classes, n, z, b = 60, 1000, 5.0, 0.4
    release = Release(row_norm=3.0, count_share=b)
    y = np.repeat(np.arange(classes), n)
    values = {"features": np.zeros((len(y), 50), dtype=np.float32)}
    found = example_means(values, y, release, z, Rng(4), classes=classes)
    assert len(found["labels"]) == classes
    rows = found["features"] * (found["counts"] / n)[:, None]
    assert rows.std() == pytest.approx(z * 3.0 / np.sqrt(1 - b) / n, rel=0.04)
    assert (found["counts"] - n).std() == pytest.approx(z / np.sqrt(b), rel=0.3)


def test_noise_is_that_of_its_address():
    rng = Rng(0).numpy()
    values, y = examples(rng, 200), rng.integers(0, C, 200)
    first, again, other = (example_means(values, y, noise=1.0, rng=Rng(s)) for s in (1, 1, 2))
    assert all(np.array_equal(first[k], again[k]) for k in first)
    assert not np.array_equal(first["features"], other["features"])
    histograms = [noisy_histogram(y, C, noise_multiplier=9.0, rng=Rng(s)) for s in (1, 1, 2)]
    assert np.array_equal(histograms[0], histograms[1])
    assert not np.array_equal(histograms[0], histograms[2])


def test_classes_that_nobody_holds_get_noise_and_rare_ones_are_left_out():
    values = {"features": np.ones((40, D))}
    y = np.array([0] * 39 + [1])
    assert example_means(values, y, Release(min_count=2.0))["labels"].tolist() == [0]
    assert example_means(values, y, Release(), noise=1e4, counted=False, classes=2) == {}
    shown = set()
    for seed in range(60):
        shown |= set(example_means(values, y, noise=3.0, rng=Rng(seed))["labels"].tolist())
    assert 0 in shown and shown & {2, 3, 4, 5}


def test_no_examples_release_noise_or_nothing():
    nothing = {"features": np.zeros((0, D), dtype=np.float32)}
    y = np.zeros(0, dtype=np.int64)
    assert example_means(nothing, y) == {}
    rows = [example_means(nothing, y, noise=1.0, rng=Rng(s)) for s in range(40)]
    assert any(rows)


def test_a_noisy_histogram_is_unbiased_with_the_promised_scale():
    y = np.repeat(np.arange(5000), 40)
    exact = noisy_histogram(y, 5000, noise_multiplier=0.0, rng=Rng(0))
    assert exact.dtype == np.int32 and (exact == 40).all()
    noisy = noisy_histogram(y, 5000, noise_multiplier=5.0, rng=Rng(0))
    assert noisy.mean() == pytest.approx(40, abs=4 * 5 / np.sqrt(5000))
    assert noisy.std() == pytest.approx(np.sqrt(25 + 1 / 12), rel=0.04)
    assert noisy_histogram(y[:0], 50, noise_multiplier=5.0, rng=Rng(0)).min() == 0


@pytest.mark.parametrize(
    ("values", "y", "word"),
    [
        ({"features": np.full((2, D), np.nan)}, [0, 1], "features"),
        ({"features": np.zeros((3, D))}, [0, 1], "features"),
        ({"features": np.zeros(2)}, [0, 1], "features"),
        ({"probs": np.ones((2, C))}, [0, 1], "probs"),
        ({"features": np.zeros((2, D))}, [0, C], "labels"),
        ({"features": np.zeros((2, D))}, [0.0, 1.0], "labels"),
    ],
)
def test_broken_examples_are_refused_by_name(values, y, word):
    with pytest.raises(RunError, match=word):
        example_means(values, np.array(y))


@pytest.mark.parametrize("noise", [-1.0, np.nan, np.inf])
def test_noise_that_is_no_amount_is_refused(noise):
    values = {"features": np.zeros((2, D))}
    with pytest.raises(ConfigError, match="noise_multiplier"):
        example_means(values, np.array([0, 1]), noise=noise)
    with pytest.raises(ConfigError, match="noise_multiplier"):
        noisy_histogram(np.array([0, 1]), C, noise_multiplier=noise, rng=Rng(0))
