"""Low-rank factors of updates: the rank that the energy asks for, and when they do not pay."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedkd.distill.low_rank import as_matrix, factorise, most_rank, rank_for, restore
from fedkd.rng import stream

SHAPES = [(12, 30), (30, 12), (8, 3, 5, 5), (20, 20)]


def update(shape, rank=None, noise=0.0):
    """A matrix of known rank in the shape of a weight, with some noise on top."""
    generator = stream(0, "update", *shape).numpy()
    m, n = shape[0], int(np.prod(shape[1:]))
    rank = rank or min(m, n)
    made = generator.normal(size=(m, rank)) @ generator.normal(size=(rank, n))
    return (made + noise * generator.normal(size=(m, n))).reshape(shape).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_an_update_of_low_rank_comes_back(shape, rank):
    given_, base = update(shape, rank), update(shape)
    u, sv = factorise(given_, 0.999999)
    assert (u.shape, sv.shape) == (
        (shape[0], rank),
        (rank, given_.size // shape[0]),
    )
    back = restore(base, (u, sv))
    assert back.shape == shape
    assert back.dtype == np.float32
    assert np.allclose(back - base, given_, atol=1e-4 * np.abs(given_).max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("energy", [0.3, 0.6, 0.9])
def test_the_rank_is_the_smallest_that_keeps_the_energy(shape, energy):
    """Against the eigenvalues of the Gram matrix, which are the squared singular values."""
    given_ = update(shape, 6, noise=0.1)
    matrix = as_matrix(given_).astype(np.float64)
    eigen = np.sort(np.linalg.eigvalsh(matrix @ matrix.T))[::-1]
    kept = np.cumsum(eigen) / eigen.sum()
    pair = factorise(given_, energy)
    rank = pair[0].shape[1]
    assert kept[rank - 1] >= energy - 1e-6
    assert rank == 1 or kept[rank - 2] < energy
    lost = given_ - restore(np.zeros_like(given_), pair)
    assert np.square(lost).sum() / np.square(given_).sum() == pytest.approx(
        1 - kept[rank - 1], abs=1e-5
    )


@given(
    singular=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12),
    energy=st.floats(0.01, 1.0),
)
def test_rank_of_any_spectrum(singular, energy):
    singular = np.sort(np.array(singular))[::-1]
    rank = rank_for(singular, energy)
    squares = singular**2
    assert 1 <= rank <= len(singular)
    assert squares[:rank].sum() >= energy * squares.sum() * (1 - 1e-12)
    assert rank == 1 or squares[: rank - 1].sum() < energy * squares.sum() * (1 + 1e-12)


def test_all_energy_of_a_full_spectrum_is_all_ranks_and_of_nothing_one():
    """Loops that stop short of the last singular value keep rank 0 here, and lose the update."""
    assert rank_for(np.ones(5), 1.0) == 5
    assert rank_for(np.ones(5), 0.81) == 5
    assert rank_for(np.zeros(5), 0.9) == 1


@pytest.mark.parametrize("shape", [(7,), (), (1, 50), (50, 1), (0, 4), (2, 2)])
def test_what_has_no_smaller_factors_is_left_alone(shape):
    assert most_rank(shape) == 0
    assert factorise(np.ones(shape, dtype=np.float32), 0.5) is None


@pytest.mark.parametrize("shape", SHAPES)
def test_factors_are_smaller_or_not_made(shape):
    m, n = shape[0], int(np.prod(shape[1:]))
    most = most_rank(shape)
    assert most * (m + n) < m * n <= (most + 1) * (m + n)
    seen = set()
    for rank in range(1, min(m, n) + 1):
        pair = factorise(update(shape, rank), 0.999999)
        seen.add(pair is None)
        if pair is not None:
            assert pair[0].size + pair[1].size < m * n
    assert seen == {True, False}


def test_all_energy_means_every_bit_and_no_update_costs_one_rank():
    assert factorise(update((12, 30), 1), 1.0) is None
    u, sv = factorise(np.zeros((12, 30), np.float32), 0.9)
    assert u.shape[1] == 1
    base = update((12, 30))
    assert restore(base, (u, sv)).tobytes() == base.tobytes()
