"""Soft targets, class tables and histograms: never above the bound, and right without noise."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedkd.errors import ConfigError, RunError
from fedkd.privacy.knowledge import SCALE, knowledge_coder
from fedkd.privacy.options import Release
from fedkd.privacy.payload import Histogram, Scores, Table
from fedkd.privacy.sensitivity import softmax
from fedkd.rng import Rng

TEMPERATURES = np.array([0.5, 1.0, 4.0, 20.0, 1.0])
WIDE = Release(row_norm=1e3)
Q, K, C, D = 5, 4, 6, 3


def scores(space="logits", temperatures=TEMPERATURES):
    return Scores("s", Q, K, space, temperatures)


def table(counted=False):
    return Table("t", C, {"probs": C, "features": D}, frozenset({"probs"}), counted)


PARTS = {
    "logits at T": scores(),
    "raw logits": scores(temperatures=None),
    "probs at T": scores("probs"),
    "probs": scores("probs", None),
    "uniform table": table(),
    "counted table": table(True),
    "histogram": Histogram("h", C),
}


def distributions(rng, n, k, sharp=3.0):
    p = softmax(sharp * rng.normal(size=(n, k)))
    return np.where(p < 1e-3, 0, p) / np.where(p < 1e-3, 0, p).sum(1, keepdims=True)


def said(rng, part, sharp=3.0, held=None):
    """Return an upload that fits ``part``, as wild as the type of its arrays allows."""
    wild = 10.0 ** rng.uniform(-40, 100)
    if isinstance(part, Scores):
        if part.space == "probs":
            return {"s": distributions(rng, Q, K, sharp)}
        return {"s": wild * rng.normal(size=(Q, K))}
    if isinstance(part, Histogram):
        return {"h": rng.integers(0, 10 ** rng.integers(1, 18), C) * rng.integers(0, 2, C)}
    labels = rng.permutation(C)[: rng.integers(0, C + 1) if held is None else held]
    arrays = {
        "t/labels": labels.astype(np.int32),
        "t/probs": distributions(rng, len(labels), C, sharp),
        "t/features": wild * rng.normal(size=(len(labels), D)),
    }
    if part.counted:
        arrays["t/counts"] = rng.integers(0, 10 ** rng.integers(1, 18), len(labels))
    return arrays


@pytest.mark.parametrize("name", PARTS)
@given(seed=st.integers(0, 10**6))
def test_no_upload_is_longer_than_the_bound(name, seed):
    """Neighbouring sums differ by an encoding (add/remove) or by two of them (replace-one)."""
    part, rng = PARTS[name], Rng(seed).numpy()
    release = Release(
        row_norm=float(10 ** rng.uniform(-2, 2)),
        count_share=float(rng.uniform(0.01, 0.99)),
        logit_clip=float(10 ** rng.uniform(-2, 2)),
    )
    coder = knowledge_coder(part, release)
    one, other = (coder.encode(said(rng, part, 10 ** rng.uniform(-3, 2))) for _ in range(2))
    rest = sum(coder.encode(said(rng, part)) for _ in range(3))
    assert np.isfinite(one).all()
    assert np.linalg.norm((rest + one) - rest) <= coder.bound * (1 + 1e-9)
    assert np.linalg.norm((rest + one) - (rest + other)) <= 2 * coder.bound * (1 + 1e-9)


@pytest.mark.parametrize("name", PARTS)
def test_the_bound_is_reached_so_that_no_noise_is_wasted(name):
    part, rng = PARTS[name], Rng(0).numpy()
    coder = knowledge_coder(part, Release())
    upload = said(rng, part, held=C)
    if name == "histogram":
        upload = {"h": np.eye(C)[2] * 17}
    elif "table" in name:
        upload["t/probs"], upload["t/features"] = np.eye(C), np.full((C, D), 50.0)
    elif "probs" in name:
        upload = {"s": np.eye(K)[[0, 1, 2, 3, 0]]}
    elif name == "logits at T":
        # The farthest corner has one class on top when cold and half of them when hot.
        half, single = np.array([1, 1, -1, -1.0]), np.array([3, -1, -1, -1.0])
        upload = {"s": 1e3 * np.array([single, single, half, half, single])}
    norm = np.linalg.norm(coder.encode(upload))
    assert 0.9 * coder.bound < norm <= coder.bound * (1 + 1e-9)


@pytest.mark.parametrize("name", PARTS)
def test_who_said_nothing_is_zeros_of_the_same_length(name):
    coder, rng = knowledge_coder(PARTS[name], Release()), Rng(0).numpy()
    nothing = coder.encode({})
    assert not nothing.any()
    assert nothing.shape == coder.encode(said(rng, PARTS[name])).shape
    assert nothing.dtype == np.float64


@pytest.mark.parametrize("name", PARTS)
def test_pure_noise_and_an_empty_cohort_decode_to_valid_arrays(name):
    coder, rng = knowledge_coder(PARTS[name], Release()), Rng(0).numpy()
    for noise in (0.0, 1.0, 1e9):
        arrays = coder.decode(
            coder.encode({}) + noise * rng.normal(size=len(coder.encode({}))), 2.5, noise
        )
        for key, value in arrays.items():
            assert np.isfinite(value).all(), key
        # What a strategy gets can be encoded again: it has the declared form.
        assert np.linalg.norm(coder.encode(arrays)) <= coder.bound * (1 + 1e-9)


# Soft targets


def test_without_noise_probabilities_are_averaged_exactly_where_nothing_is_clipped():
    p = softmax(Rng(0).numpy().normal(size=(8, Q, K)))
    coder = knowledge_coder(scores("probs", None), Release())
    mean = coder.decode(sum(coder.encode({"s": row}) for row in p), 8.0, 0.0)["s"]
    assert mean.dtype == np.float32
    np.testing.assert_allclose(mean, p.mean(0), atol=1e-6)


def test_without_noise_logits_give_the_mean_probability_at_each_temperature():
    z = Rng(0).numpy().normal(size=(8, Q, K))
    coder = knowledge_coder(scores(), Release())
    found = coder.decode(sum(coder.encode({"s": row}) for row in z), 8.0, 0.0)["s"]
    assert found.dtype == np.float32
    expected = np.mean([softmax(row, TEMPERATURES) for row in z], axis=0)
    np.testing.assert_allclose(softmax(found, TEMPERATURES), expected, atol=1e-6)


def test_large_logits_count_as_the_clipped_ones_do():
    z = 30 * Rng(0).numpy().normal(size=(Q, K))
    coder = knowledge_coder(scores(), Release(logit_clip=2.0))
    found = coder.decode(coder.encode({"s": z}), 1.0, 0.0)["s"]
    expected = softmax(np.clip(z - z.mean(1, keepdims=True), -2, 2), TEMPERATURES)
    np.testing.assert_allclose(softmax(found, TEMPERATURES), expected, atol=1e-6)


def test_raw_logits_are_averaged_without_their_row_means():
    z = Rng(0).numpy().normal(size=(8, Q, K)).astype(np.float32)
    coder = knowledge_coder(scores(temperatures=None), WIDE)
    found = coder.decode(sum(coder.encode({"s": row}) for row in z), 8.0, 0.0)["s"]
    expected = (z - z.mean(2, keepdims=True)).mean(0)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_divisor_is_the_expected_cohort_and_absence_means_one_in_k():
    coder = knowledge_coder(scores("probs", None), Release())
    p = np.full((Q, K), 0.1) + 0.6 * np.eye(K)[0]
    found = coder.decode(coder.encode({"s": p}), 2.0, 0.0)["s"]
    np.testing.assert_allclose(found, (p + 1 / K) / 2, atol=1e-6)


def test_noise_on_a_row_follows_the_sensitivity_at_its_temperature():
    q, k, z, n = 4000, 3, 0.2, 100.0
    t = np.repeat([1.0, 20.0], q // 2)
    coder = knowledge_coder(Scores("s", q, k, "probs", t), Release())
    std = z * coder.bound
    total = std * Rng(0).numpy().normal(size=q * k)
    from fedkd.privacy.sensitivity import radius, softmax

    # What comes back is at T = 1, as it was uploaded; the noise is at T_i.
    at_t = softmax(np.log(np.maximum(coder.decode(total, n, std)["s"], 1e-300)), t)
    noise = (at_t - 1 / k).reshape(2, -1)

    for found, temperature in zip(noise, (1.0, 20.0), strict=True):
        # The projection to sums of 1 takes one of k dimensions away.
        law = std * radius(k, 5.0, temperature) / n * np.sqrt((k - 1) / k)
        assert found.std() == pytest.approx(law, rel=0.04)


@pytest.mark.parametrize("space", ["logits", "probs"])
def test_scores_that_are_not_what_was_declared_are_refused(space):
    coder = knowledge_coder(scores(space), Release())
    good = np.full((Q, K), 1 / K)
    bad = [good * np.nan, good + np.inf, good[:-1], good.ravel(), good.astype(str)]
    if space == "probs":
        bad += [good * 1.1, good * 0, good - np.array([0.5, -0.5, 0, 0]), np.full((Q, K), 1e308)]
    for rows in bad:
        with pytest.raises(RunError, match="'s'"):
            coder.encode({"s": rows})


def test_temperatures_that_do_not_fit_are_refused():
    for t in (np.ones(Q + 1), np.zeros(Q), np.full(Q, np.nan)):
        with pytest.raises(ConfigError, match="temperature"):
            knowledge_coder(scores(temperatures=t), Release())


# Tables


def upload_of(labels, rng, counts=None):
    arrays = {
        "t/labels": np.array(labels, dtype=np.int32),
        "t/probs": softmax(rng.normal(size=(len(labels), C))).astype(np.float32),
        "t/features": rng.normal(size=(len(labels), D)).astype(np.float32),
    }
    return arrays if counts is None else {**arrays, "t/counts": np.array(counts, dtype=np.int32)}


@pytest.mark.parametrize("counted", [False, True])
def test_clients_of_one_class_each_are_given_back_exactly(counted):
    rng, coder = Rng(0).numpy(), knowledge_coder(table(counted), WIDE)
    uploads = [upload_of([c], rng, [7 + c] if counted else None) for c in (4, 1, 3)]
    found = coder.decode(sum(coder.encode(u) for u in uploads), 3.0, 0.0)
    assert found["t/labels"].tolist() == [1, 3, 4] and found["t/labels"].dtype == np.int32
    for field in ("t/probs", "t/features"):
        rows = np.concatenate([uploads[i][field] for i in (1, 2, 0)])
        np.testing.assert_allclose(found[field], rows, atol=1e-5)
        assert found[field].dtype == np.float32
    assert ("t/counts" in found) == counted
    if counted:
        assert found["t/counts"].dtype == np.int32 and (found["t/counts"] >= 1).all()


def test_a_uniform_table_is_the_plain_mean_where_all_hold_equally_many():
    rng, coder = Rng(0).numpy(), knowledge_coder(table(), WIDE)
    uploads = [upload_of([0, 1, 2], rng), upload_of([1, 2, 3], rng), upload_of([2, 0, 1], rng)]
    found = coder.decode(sum(coder.encode(u) for u in uploads), 50.0, 0.0)
    assert found["t/labels"].tolist() == [0, 1, 2, 3]
    own = [u["t/features"][u["t/labels"].tolist().index(1)] for u in uploads]
    np.testing.assert_allclose(found["t/features"][1], np.mean(own, axis=0), atol=1e-5)


def test_weights_are_relative_to_the_length_of_a_client_s_counts():
    rng, coder = Rng(0).numpy(), knowledge_coder(table(True), WIDE)
    uploads = [upload_of([0, 1], rng, [30, 40]), upload_of([1], rng, [10**6])]
    found = coder.decode(sum(coder.encode(u) for u in uploads), 2.0, 0.0)
    rows = [uploads[0]["t/features"][1], uploads[1]["t/features"][0]]
    np.testing.assert_allclose(found["t/features"][1], (0.8 * rows[0] + rows[1]) / 1.8, atol=1e-5)
    ratio = found["t/counts"][1] / found["t/counts"][0]
    assert ratio == pytest.approx(1.8 / 0.6, rel=1e-3)


def test_rows_are_clipped_to_the_row_norm():
    coder = knowledge_coder(Table("t", 2, {"f": D}), Release(row_norm=2.0))
    upload = {"t/labels": np.array([1]), "t/f": np.array([[30.0, 0.0, 40.0]])}
    found = coder.decode(coder.encode(upload), 1.0, 0.0)
    np.testing.assert_allclose(found["t/f"], [[1.2, 0.0, 1.6]], atol=1e-6)


def test_a_class_that_drowns_in_noise_or_is_too_rare_is_left_out():
    rng = Rng(0).numpy()
    coder = knowledge_coder(table(), Release(min_count=3.0))
    everybody = sum(coder.encode(upload_of(range(C), rng)) for _ in range(4))
    rare = everybody + coder.encode(upload_of([0], rng))
    assert coder.decode(rare, 5.0, 0.0)["t/labels"].tolist() == list(range(C))
    one = coder.encode(upload_of(range(C), rng))
    assert coder.decode(one, 5.0, 0.0) == {}
    # sqrt(count_share) times 4 / sqrt(C) stands against twice the noise.
    count = np.sqrt(0.25) * 4 / np.sqrt(C)
    assert coder.decode(everybody, 5.0, 0.51 * count) == {}
    assert len(coder.decode(everybody, 5.0, 0.49 * count)["t/labels"]) == C


def test_noise_alone_rarely_passes_for_a_class():
    coder = knowledge_coder(Table("t", 2000, {"f": 1}), Release(min_count=0.0))
    noise = Rng(0).numpy().normal(size=4000)
    found = coder.decode(noise, 10.0, 1.0)
    assert 0.01 < len(found["t/labels"]) / 2000 < 0.04


def good(rng):
    return upload_of([2, 0], rng, [3, 4])


BROKEN = {
    "out of range": ({"t/labels": np.array([2, C])}, "t/labels"),
    "negative label": ({"t/labels": np.array([-1, 0])}, "t/labels"),
    "twice": ({"t/labels": np.array([2, 2])}, "t/labels"),
    "fractions": ({"t/labels": np.array([0.5, 2.0])}, "t/labels"),
    "square labels": ({"t/labels": np.zeros((2, 1), dtype=int)}, "t/labels"),
    "nan row": ({"t/features": np.full((2, D), np.nan)}, "t/features"),
    "wide row": ({"t/features": np.zeros((2, D + 1))}, "t/features"),
    "row too many": ({"t/probs": np.full((3, C), 1 / C)}, "t/probs"),
    "sum of 2": ({"t/probs": np.full((2, C), 2 / C)}, "t/probs"),
    "below 0": ({"t/probs": np.array([[2.0, -1, 0, 0, 0, 0]] * 2)}, "t/probs"),
    "negative count": ({"t/counts": np.array([-1, 2])}, "t/counts"),
    "infinite count": ({"t/counts": np.array([np.inf, 2])}, "t/counts"),
    "no counts": ({"t/counts": None}, "t/counts"),
    "no rows": ({"t/probs": None}, "t/probs"),
    "no labels": ({"t/labels": None}, "t/labels"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_tables_are_refused_by_name(case):
    change, key = BROKEN[case]
    upload = {**good(Rng(0).numpy()), **change}
    upload = {k: v for k, v in upload.items() if v is not None}
    with pytest.raises(RunError, match=key):
        knowledge_coder(table(True), Release()).encode(upload)


def test_a_table_without_budget_for_rows_is_refused():
    with pytest.raises(ConfigError, match="count_share"):
        knowledge_coder(table(), Release(count_share=1.0))


# Histograms


def test_a_histogram_is_the_mean_of_shares():
    coder = knowledge_coder(Histogram("h", 3), Release())
    uploads = [np.array([1, 1, 2]), np.array([500, 0, 0]), np.zeros(3, dtype=int)]
    total = sum(coder.encode({"h": counts.astype(np.int32)}) for counts in uploads)
    found = coder.decode(total, 2.0, 0.0)["h"]
    assert found.dtype == np.int32
    assert found.tolist() == [1250, 250, 500]
    assert coder.decode(total - 0.5, 2.0, 0.0)["h"].tolist() == [2 * SCALE, 0, 0]
    assert coder.decode(np.array([-1.0, -2.0, -3.0]), 3.0, 1.0)["h"].tolist() == [SCALE] * 3


@pytest.mark.parametrize("bad", [[1, -1, 0], [1, np.nan, 0], [1, 2], [[1, 2, 3]]])
def test_a_broken_histogram_is_refused_by_name(bad):
    with pytest.raises(RunError, match="'h'"):
        knowledge_coder(Histogram("h", 3), Release()).encode({"h": np.array(bad)})
