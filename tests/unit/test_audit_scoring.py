"""What a network says of examples, against closed forms: bits, log p, phi and rank."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedkd.audit.results import label_exposure
from fedkd.audit.scoring import Scores, score
from fedkd.audit.subjects import Group, Subject
from fedkd.data.federated import Split
from fedkd.errors import RunError
from fedkd.privacy.auditing.lira import phi
from fedkd.privacy.auditing.options import Audit
from fedkd.rng import Rng

N, C, L = 23, 7, 6


def drawn(*shape: int) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def table(logits: torch.Tensor):
    """A predictor that looks logits up: example i is the number i, in its first place."""
    return lambda x: {"personal": logits[x.reshape(len(x), -1)[:, 0].long()]}


def images(labels: torch.Tensor) -> Split:
    return Split(torch.arange(len(labels)).float().reshape(-1, 1, 1, 1), labels)


def text(follows: torch.Tensor) -> Split:
    x = torch.arange(len(follows))[:, None].expand(-1, follows.shape[1])
    return Split(x, follows)


LABELS = torch.arange(N) % C


def scored(logits: torch.Tensor, examples: Split, batch_size: int = 100) -> Scores:
    return score(table(logits), "personal", examples, batch_size, "teacher")


def test_images_are_scored_by_the_probability_of_their_label():
    logits = drawn(N, C)
    found = scored(logits, images(LABELS))
    logp = torch.log_softmax(logits.double(), 1).numpy()
    own = logp[np.arange(N), LABELS]
    assert np.allclose(found.bits, -np.log2(np.exp(own)), rtol=1e-12)
    assert np.allclose(found.log_p, own, rtol=1e-12)
    assert np.allclose(found.phi, np.log(np.exp(own) / (1 - np.exp(own))), rtol=1e-9)
    assert np.allclose(found.phi, phi(logp, LABELS.numpy()), rtol=1e-12)
    ranks = [1 + sum(p > row[y] for p in row) for row, y in zip(logp, LABELS, strict=True)]
    assert found.rank.tolist() == ranks


def test_a_network_that_knows_nothing_gives_log2_of_the_classes():
    found = scored(torch.zeros(N, C), images(LABELS))
    assert np.allclose(found.bits, math.log2(C))
    assert np.allclose(found.phi, -math.log(C - 1))
    assert set(found.rank.tolist()) == {1}
    follows = torch.ones(3, L, dtype=torch.int64)
    assert np.allclose(scored(torch.zeros(3, L, C), text(follows)).bits, L * math.log2(C))


@pytest.mark.parametrize("gap", [200.0, 2000.0])
def test_certainty_gives_finite_scores(gap):
    logits = torch.zeros(2, 3)
    logits[:, 0] = gap
    found = scored(logits, images(torch.tensor([0, 1])))
    assert np.isfinite(found.phi).all()
    assert found.phi[0] > 100 > -100 > found.phi[1]
    assert found.bits[0] == pytest.approx(0, abs=1e-12)
    assert found.bits[1] == pytest.approx(gap / math.log(2), rel=1e-9)


def test_text_is_scored_by_its_real_tokens():
    logits = drawn(4, L, C)
    follows = torch.arange(4 * L).reshape(4, L) % C
    for row, length in enumerate((L, 1, 3, 2)):
        follows[row, length:] = -1
    found = scored(logits, text(follows))
    for row, length in enumerate((L, 1, 3, 2)):
        logp = torch.log_softmax(logits[row].double(), 1)
        own = [float(logp[t, follows[row, t]]) for t in range(length)]
        assert found.bits[row] == pytest.approx(-sum(own) / math.log(2))
        assert found.log_p[row] == found.phi[row] == pytest.approx(sum(own) / length)
    assert found.rank.tolist() == [0] * 4


def test_what_stands_at_padding_changes_nothing():
    logits, follows = drawn(4, L, C), torch.ones(4, L, dtype=torch.int64)
    follows[:, 3:] = -1
    other = logits.clone()
    other[:, 3:] = 50 * drawn(4, L - 3, C)
    one, two = scored(logits, text(follows)), scored(other, text(follows))
    assert np.array_equal(one.bits, two.bits)
    assert np.array_equal(one.log_p, two.log_p)


@pytest.mark.parametrize("batch_size", [1, 4, N])
def test_neither_batches_nor_order_matter(batch_size):
    logits = drawn(N, C)
    whole = scored(logits, images(LABELS))
    parts = scored(logits, images(LABELS), batch_size)
    order = torch.from_numpy(np.random.default_rng(0).permutation(N))
    turned = score(
        table(logits), "personal", Split(images(LABELS).x[order], LABELS[order]), 5, "teacher"
    )
    for name in ("bits", "log_p", "phi", "rank"):
        assert np.array_equal(getattr(whole, name), getattr(parts, name))
        assert np.array_equal(getattr(whole[order.numpy()], name), getattr(turned, name))
    assert whole[2:5].bits.tolist() == whole.bits[2:5].tolist()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("shape", [(N, C), (N, L, C)])
def test_losses_that_are_not_finite_are_refused(bad, shape):
    logits = drawn(*shape)
    logits[3] = bad
    follows = torch.ones(N, L, dtype=torch.int64)
    examples = images(LABELS) if len(shape) == 2 else text(follows)
    with pytest.raises(RunError, match=rf"teacher: 1 of {N} losses are not finite.*lower"):
        scored(logits, examples)


def test_an_output_that_is_not_there_is_named():
    with pytest.raises(RunError, match=r"client 3 has no output 'global'; it has personal"):
        score(table(drawn(N, C)), "global", images(LABELS), 8, "client 3")


def test_label_exposure_is_the_rank_of_the_label_among_the_classes():
    def subject(rank: list[int]) -> Subject:
        empty = np.zeros(len(rank))
        scores = Scores(empty, empty, empty, np.array(rank))
        return Subject("teacher", (Group(np.arange(len(rank)), scores, scores),), {})

    planted = SimpleNamespace(inside=np.array([True, True, False, False]))
    found = label_exposure(subject([1, 2, 8, 8]), planted, 8, Audit(), Rng(0))
    assert found["ceiling"] == 3
    assert found["inside"]["value"] == 2.5
    assert found["outside"]["value"] == 0
    assert label_exposure(subject([0, 0, 0, 0]), planted, 8, Audit(), Rng(0)) is None
