"""Every registered partition gives each example to exactly one client, always ends, and repeats."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.data.dataset import Dataset
from fedkd.data.partition import divide
from fedkd.data.registries import partitions
from fedkd.errors import ConfigError
from fedkd.rng import Rng

NAMES = partitions.names()
quick = settings(max_examples=25, deadline=None, derandomize=True)


@st.composite
def requests(draw):
    """Labels in random order, with at least as many of each class as there are clients."""
    classes = draw(st.integers(2, 6))
    counts = draw(st.lists(st.integers(12, 60), min_size=classes, max_size=classes))
    labels = np.repeat(np.arange(classes), counts)
    clients = draw(st.integers(1, 8))
    seed = draw(st.integers(0, 2**32))
    order = Rng(seed, ("test",)).numpy().permutation(len(labels))
    return labels[order], clients, seed


def scheme_for(name, labels, clients):
    cls = partitions.get(name)
    fields = {f.name for f in dataclasses.fields(cls)}
    values = {}
    if "min_examples" in fields:
        values["min_examples"] = 2
    if "classes_per_client" in fields:
        values["classes_per_client"] = max(2, -(-len(np.unique(labels)) // clients))
    return cls(**values)


def owners(labels, clients):
    return np.arange(len(labels)) % clients


def split(name, labels, clients, seed):
    scheme = scheme_for(name, labels, clients)
    return scheme.split(labels, clients, Rng(seed), owners(labels, clients))


@pytest.mark.parametrize("name", NAMES)
@given(request=requests())
@quick
def test_each_example_belongs_to_exactly_one_client_and_no_client_is_empty(name, request):
    labels, clients, seed = request
    parts = split(name, labels, clients, seed)
    assert len(parts) == clients
    assert min(map(len, parts)) >= 1
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))
    assert all((np.diff(part) > 0).all() for part in parts)
    assert all(part.dtype == np.int64 for part in parts)


@pytest.mark.parametrize("name", NAMES)
@given(request=requests())
@quick
def test_same_stream_same_partition(name, request):
    labels, clients, seed = request
    first, second = (split(name, labels, clients, seed) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", [n for n in NAMES if n != "natural"])
def test_another_seed_gives_another_partition(name):
    labels = np.arange(300) % 5
    first, second = (split(name, labels, 6, seed) for seed in (0, 1))
    assert not all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_more_clients_than_examples_is_refused_with_the_way_out(name):
    labels = np.arange(6) % 2
    with pytest.raises(ConfigError, match=r"clients = 7.*\d"):
        partitions.get(name)().split(labels, 7, Rng(0), np.arange(6))


@pytest.mark.parametrize("name", NAMES)
def test_the_test_set_is_divided_too_and_summaries_exist(name):
    rng = Rng(0).numpy()
    labels, test_labels = np.arange(300) % 5, np.arange(100) % 5
    data = Dataset(
        name="made",
        train_x=rng.random((300, 1, 4, 4), dtype=np.float32),
        train_y=labels,
        test_x=rng.random((100, 1, 4, 4), dtype=np.float32),
        test_y=test_labels,
        classes=5,
        train_ids=owners(labels, 6),
        test_ids=owners(test_labels, 6),
    )
    made = divide(data, scheme_for(name, labels, 6), 6, Rng(0), name)
    made.check(300, 100)
    assert made.name == name
    assert made.clients == len(made.degrees) == 6
    assert min(map(len, made.test)) >= 1
    assert partitions.summary(name).endswith(".")
