"""Averaging of weights against NumPy, alone and in a run replayed by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from fedkd.models.book import to_arrays
from fedkd.rng import Rng, stream
from fedkd.strategies.averaging import average
from fedkd.types import select


@given(
    seed=st.integers(0, 10**6),
    weights=st.lists(st.integers(0, 500), min_size=1, max_size=6).filter(any),
)
def test_average_against_numpy(seed, weights):
    g = Rng(seed).numpy()
    items = [{"a": g.normal(size=(3, 2)).astype(np.float32)} for _ in weights]
    expected = np.average([i["a"].astype(np.float64) for i in items], axis=0, weights=weights)
    found = average(items, weights)["a"]
    assert found.dtype == np.float32
    assert np.array_equal(found, expected.astype(np.float32)) or np.allclose(found, expected, 1e-6)


@given(seed=st.integers(0, 10**6), n=st.integers(1, 9), weight=st.integers(1, 10**6))
def test_equal_items_average_to_themselves_bit_for_bit(seed, n, weight):
    item = {"a": (Rng(seed).numpy().normal(size=7) * 10.0 ** (seed % 9 - 4)).astype(np.float32)}
    assert average([item] * n, [weight] * n)["a"].tobytes() == item["a"].tobytes()


def test_a_key_is_averaged_over_those_that_have_it():
    items = [{"a": np.float32([1])}, {"a": np.float32([4]), "b": np.float32([8])}]
    found = average(items, [2, 1])
    assert found["a"].tolist() == [2.0]
    assert found["b"].tolist() == [8.0]


def test_clients_without_examples_weigh_nothing_unless_they_are_alone():
    items = [{"a": np.float32([1])}, {"a": np.float32([5])}]
    assert average(items, [0, 3])["a"].tolist() == [5.0]
    assert average(items, [0, 0])["a"].tolist() == [3.0]


def by_hand(federation, book, rounds, lr, size, weighting):
    """FedAvg written out: functional forward, autograd, plain SGD, np.average."""
    w = {k: torch.from_numpy(v.copy()) for k, v in book.initial("mlp").items()}
    for round_ in range(1, rounds + 1):
        sent, mass = [], []
        for k in range(federation.clients):
            train = federation.client(k).train
            mine = {key: value.clone() for key, value in w.items()}
            rng = stream(0, "local", round_, k).child("epoch", 0)
            for index in torch.randperm(len(train), generator=rng.torch()).split(size):
                leaves = {key: v.clone().requires_grad_() for key, v in mine.items()}
                h = train.x[index].flatten(1)
                for i in (1, 2):
                    layer = f"fc{i}.{1 if i == 1 else 0}"
                    h = functional.relu(h @ leaves[f"{layer}.weight"].T + leaves[f"{layer}.bias"])
                z = h @ leaves["head.weight"].T + leaves["head.bias"]
                loss = functional.nll_loss(functional.log_softmax(z, 1), train.y[index])
                grads = torch.autograd.grad(loss, list(leaves.values()))
                mine = {key: v - lr * g for (key, v), g in zip(mine.items(), grads, strict=True)}
            sent.append(mine)
            mass.append(len(train) if weighting == "examples" else 1)
        w = {
            key: torch.from_numpy(
                np.average([s[key].numpy() for s in sent], axis=0, weights=mass)
            ).float()
            for key in w
        }
    return w


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_a_run_of_three_clients_against_the_run_by_hand(weighting, tiny, play):
    strategy = {"name": "fedavg", "weighting": weighting}
    run = play(tiny(strategy, {"clients.count": 3, "rounds": 3}))
    federation, book = run.prepared.federation, run.prepared.setting.book
    expected = by_hand(federation, book, 3, 0.2, 16, weighting)
    found = select(run.state, "model")
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert np.allclose(value, expected[key].numpy(), rtol=0, atol=2e-6), key
    start = to_arrays(book.make("mlp"))
    assert all(not np.allclose(found[k], start[k], atol=1e-3) for k in found), "it has moved"
