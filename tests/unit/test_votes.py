"""GNMax and confident-GNMax: bounded votes, honest accounts, answers that strategies can use."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedkd.errors import ConfigError, RunError
from fedkd.privacy.knowledge import knowledge_coder
from fedkd.privacy.options import Release
from fedkd.privacy.payload import Scores
from fedkd.privacy.votes import ConfidentGNMax, GNMax
from fedkd.rng import Rng

KEY = "logits/scores"
GNMAX = Release(votes="gnmax")
CONFIDENT = Release(votes="confident-gnmax")


def scores(rows=4, classes=3, space="logits", temperatures=None):
    return Scores(KEY, rows, classes, space, temperatures)


def counts_of(coder, winners_by_client, classes=3):
    uploads = [{KEY: np.eye(classes)[winners]} for winners in winners_by_client]
    return sum(coder.encode(upload) for upload in uploads)


def test_the_coder_follows_the_option_and_only_for_scores():
    assert isinstance(knowledge_coder(scores(), GNMAX), GNMax)
    assert isinstance(knowledge_coder(scores(), CONFIDENT), ConfidentGNMax)
    assert not isinstance(knowledge_coder(scores(), Release()), GNMax)


def test_a_vote_is_one_hot_and_ties_go_to_the_lowest_class():
    rows = np.array([[1, 3, 2], [2, 2, 1], [0, 0, 0], [-5, -9, -1]], dtype=np.float32)
    votes = knowledge_coder(scores(), GNMAX).encode({KEY: rows}).reshape(4, 3)
    assert votes.argmax(1).tolist() == [1, 0, 0, 2]
    assert votes.sum(1).tolist() == [1, 1, 1, 1]


@given(st.integers(0, 10**6))
def test_no_upload_moves_the_counts_by_more_than_the_bound(seed):
    rng = Rng(seed).numpy()
    one, other = (10.0 ** rng.uniform(-30, 30) * rng.normal(size=(6, 4)) for _ in range(2))
    for release in (GNMAX, CONFIDENT):
        coder = knowledge_coder(scores(6, 4), release)
        a, b = coder.encode({KEY: one}), coder.encode({KEY: other})
        assert np.linalg.norm(a) == pytest.approx(coder.bound)
        # Another vote moves two counts of a query: sqrt(2), below the 2 that is accounted.
        assert np.linalg.norm(a - b) <= np.sqrt(2) * coder.bound * (1 + 1e-12)
        largest = a.reshape(6, 4) + coder.encode({KEY: one[::-1]}).reshape(6, 4)
        moved = largest.max(1) - (largest - a.reshape(6, 4)).max(1)
        assert np.linalg.norm(moved) <= coder.bound


def test_who_said_nothing_votes_for_nobody():
    coder = knowledge_coder(scores(), GNMAX)
    assert not coder.encode({}).any()
    assert coder.encode({}).shape == (12,)


@pytest.mark.parametrize("bad", [np.full((4, 3), np.nan), np.zeros((3, 4)), np.zeros(12)])
def test_bad_scores_are_refused_by_name(bad):
    for release in (GNMAX, CONFIDENT):
        with pytest.raises(RunError, match=KEY):
            knowledge_coder(scores(), release).encode({KEY: bad})


def test_the_answer_is_the_majority_as_probabilities():
    coder = knowledge_coder(scores(space="probs"), GNMAX)
    total = counts_of(coder, [[0, 1, 2, 2], [0, 1, 2, 1], [1, 1, 0, 1]])
    rows = coder.decode(total, 3.0, 0.0)[KEY]
    assert rows.dtype == np.float32
    assert rows.tolist() == np.eye(3)[[0, 1, 2, 1]].tolist()


@pytest.mark.parametrize("temperatures", [None, np.array([1.0, 2.0, 5.0, 20.0])])
def test_the_answer_as_logits_is_one_hot_at_the_query_s_temperature(temperatures):
    coder = knowledge_coder(scores(temperatures=temperatures), GNMAX)
    rows = coder.decode(counts_of(coder, [[0, 1, 2, 0]]), 1.0, 0.0)[KEY]
    t = np.ones(4) if temperatures is None else temperatures
    e = np.exp(rows / t[:, None])
    assert np.isfinite(rows).all()
    np.testing.assert_allclose(e / e.sum(1, keepdims=True), np.eye(3)[[0, 1, 2, 0]], atol=1e-7)
    np.testing.assert_allclose(rows.sum(1), 0, atol=1e-4)


def renyi(alpha, shift, std):
    """Renyi divergence of N(shift, std^2 I) from N(0, std^2 I), by numerical integration."""
    x = np.linspace(-60, 60, 400001) * std
    log_p = -((x - np.linalg.norm(shift)) ** 2) / (2 * std**2)
    log_q = -(x**2) / (2 * std**2)
    mean = np.exp(alpha * log_p + (1 - alpha) * log_q).sum() / np.exp(log_q).sum()
    return np.log(mean) / (alpha - 1)


@pytest.mark.parametrize("alpha", [1.5, 2.0, 8.0])
def test_the_cost_of_gnmax_is_that_of_the_source(alpha):
    z, q = 3.0, 7
    s = z * knowledge_coder(scores(q), GNMAX).bound
    per_query = renyi(alpha, [1.0], s)
    assert per_query == pytest.approx(alpha / (2 * s**2), rel=1e-6)
    assert q * per_query == pytest.approx(alpha / (2 * z**2), rel=1e-6)
    # Replace-one: alpha / s^2 a query in the source, accounted as z / 2, which is twice that.
    replaced = renyi(alpha, [1.0, -1.0], s)
    assert replaced == pytest.approx(alpha / s**2, rel=1e-6)
    assert q * replaced <= alpha / (2 * (z / 2) ** 2)


@pytest.mark.parametrize("answered", [0, 3, 10])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.9])
def test_the_cost_of_confident_gnmax_is_the_sum_of_both_steps(answered, share):
    z, q, alpha = 2.0, 10, 4.0
    release = Release(votes="confident-gnmax", threshold_share=share)
    coder = knowledge_coder(scores(q), release)
    s1, s2 = coder.stds(z)
    rdp = q * alpha / (2 * s1**2) + answered * alpha / (2 * s2**2)
    assert alpha / (2 * coder.spent(z, answered) ** 2) == pytest.approx(rdp)
    assert coder.spent(z, q) == pytest.approx(coder.worst(z)) == pytest.approx(z)
    assert coder.spent(z, answered) >= coder.worst(z) * (1 - 1e-12)


def test_only_queries_with_agreement_are_answered():
    coder = knowledge_coder(scores(space="probs"), CONFIDENT)
    total = counts_of(coder, [[0, 1, 2, 0], [0, 1, 0, 1], [0, 2, 1, 2]])
    arrays, spent = coder.release_sum(total, 1e-9, 3.0, Rng(0))
    third = [np.float32(1 / 3)] * 3
    assert arrays[KEY].tolist() == [[1, 0, 0], [0, 1, 0], third, third]
    assert spent == pytest.approx(coder.spent(1e-9, 2))
    # The threshold is a share of whom one expects, not of who came.
    assert (coder.release_sum(total, 1e-9, 30.0, Rng(0))[0][KEY] == third).all()


def test_unanswered_logits_are_flat_and_no_noise_costs_all():
    coder = knowledge_coder(scores(), CONFIDENT)
    arrays, spent = coder.release_sum(coder.encode({}), 0.0, 5.0, Rng(0))
    assert not arrays[KEY].any()
    assert spent == 0.0


def test_noise_has_the_promised_scale_in_both_steps():
    """Answer rates follow the normal law of s1, wrong winners that of s2 sqrt(2)."""
    q, z = 20000, 0.02
    coder = knowledge_coder(scores(q, 2, "probs"), CONFIDENT)
    s1, s2 = coder.stds(z)
    total = np.tile([7.0, 5.0], q)
    rows = coder.release_sum(total, z, 10.0, Rng(1))[0][KEY]
    answered = rows.max(1) == 1
    from scipy.stats import norm

    expected = norm.sf((6.0 - 7.0) / s1)
    assert answered.mean() == pytest.approx(expected, abs=4 * np.sqrt(0.25 / q))
    wrong = rows[answered].argmax(1).mean()
    law = norm.cdf(-2.0 / (s2 * np.sqrt(2)))
    assert 0.05 < law < 0.45
    assert wrong == pytest.approx(law, abs=4 * np.sqrt(0.25 / answered.sum()))


def test_noise_is_that_of_its_address():
    coder = knowledge_coder(scores(200, 3, "probs"), CONFIDENT)
    total = np.tile([4.0, 3.0, 3.0], 200)
    first, again, other = (coder.release_sum(total, 0.3, 6.0, Rng(s))[0][KEY] for s in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_threshold_without_budget_for_answers_is_refused():
    with pytest.raises(ConfigError, match="threshold_share"):
        knowledge_coder(scores(), Release(votes="confident-gnmax", threshold_share=1.0))
