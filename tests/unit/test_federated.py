from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.data.dataset import Dataset
from fedkd.data.federated import ClientData, Federation, Split, hold_out
from fedkd.data.partition import divide
from fedkd.data.registries import partitions, sources
from fedkd.data.rotate import rotate
from fedkd.errors import ConfigError, DataError
from fedkd.rng import Rng


@pytest.fixture(scope="module")
def digits():
    return sources.get("digits")().load()


def made(data, clients=10, scheme="dirichlet", validation=0.1, seed=0, **values):
    partition = divide(data, partitions.get(scheme)(**values), clients, Rng(seed), scheme)
    return Federation.build(data, partition, validation=validation, rng=Rng(seed))


def numbered(channels=1, side=3):
    """A data set in which the value of every pixel is the number of the example."""
    labels, tests = np.arange(60) % 3, np.arange(30) % 3
    shape = (1, channels, side, side)
    return Dataset(
        name="numbered",
        train_x=np.arange(60, dtype=np.float32).reshape(-1, 1, 1, 1) * np.ones(shape, np.float32),
        train_y=labels,
        test_x=1000
        + np.arange(30, dtype=np.float32).reshape(-1, 1, 1, 1) * np.ones(shape, np.float32),
        test_y=tests,
        classes=3,
    )


def numbers(split):
    return split.x[:, 0, 0, 0].long().tolist() if len(split) else []


def test_clients_share_nothing_and_the_official_split_is_kept():
    federation = made(numbered(), clients=4, scheme="iid")
    everything = [federation.client(i) for i in range(4)]
    trained = [n for c in everything for part in (c.train, c.validation) for n in numbers(part)]
    tested = [n for c in everything for n in numbers(c.test)]
    assert sorted(trained) == list(range(60))
    assert sorted(tested) == list(range(1000, 1030))
    for client in everything:
        for part, labels in ((client.train, 0), (client.validation, 0), (client.test, 1000)):
            assert part.y.tolist() == [(n - labels) % 3 for n in numbers(part)]
            assert part.y.dtype == torch.int64
            assert part.x.dtype == torch.float32


def test_tensors_are_channels_last_and_made_once():
    federation = made(numbered(channels=3), clients=4, scheme="iid")
    client = federation.client(2)
    assert client.train.x.is_contiguous(memory_format=torch.channels_last)
    assert federation.client(2) is client


def test_counts_sizes_and_absent_classes_describe_what_is_trained_on(digits):
    federation = made(digits, alpha=0.1)
    counts = federation.counts()
    assert counts.shape == (10, 10)
    for i in range(10):
        y = federation.client(i).train.y.numpy()
        assert np.array_equal(counts[i], np.bincount(y, minlength=10))
        assert federation.train_size(i) == len(y)
        assert set(federation.absent(i)) == set(range(10)) - set(y.tolist())
    assert any(len(federation.absent(i)) for i in range(10))
    counts[:] = 0
    assert federation.counts().sum() > 0


def test_own_test_follows_training_and_has_no_class_that_is_absent(digits):
    federation = made(digits, alpha=0.3, clients=5)
    for i in range(5):
        data = federation.client(i)
        p = np.bincount(data.train.y, minlength=10) / len(data.train)
        q = np.bincount(data.test.y, minlength=10) / len(data.test)
        assert np.abs(p - q).sum() / 2 < 0.12
        assert not set(federation.absent(i)) & set(data.test.y.tolist())


def test_global_test_is_balanced_nested_and_official(digits):
    federation = made(digits)
    whole, small = federation.global_test(), federation.global_test(limit_per_class=5)
    rarest = np.bincount(digits.test_y).min()
    assert np.bincount(whole.y).tolist() == [rarest] * 10
    assert np.bincount(small.y).tolist() == [5] * 10
    official = {x.tobytes() for x in digits.test_x}
    rows = [{x.numpy().tobytes() for x in part.x} for part in (small, whole)]
    assert rows[0] <= rows[1] <= official
    assert federation.global_test() is whole


def test_pooled_is_the_union_of_the_clients():
    federation = made(numbered(), clients=4, scheme="iid")
    pooled = federation.pooled()
    clients = [federation.client(i) for i in range(4)]
    assert sorted(numbers(pooled.train)) == sorted(n for c in clients for n in numbers(c.train))
    held = sorted(n for c in clients for n in numbers(c.validation))
    assert sorted(numbers(pooled.validation)) == held
    assert numbers(pooled.test) == numbers(federation.global_test())


def test_rotation_turns_own_data_but_not_the_global_test(digits):
    federation = made(digits, clients=3, scheme="rotation", max_degrees=90)
    rows = federation.partition.test[2]
    straight = torch.from_numpy(digits.test_x[rows])
    assert torch.allclose(federation.client(2).test.x, torch.rot90(straight, 1, (2, 3)), atol=1e-4)
    assert torch.equal(
        federation.client(1).test.x, torch.from_numpy(digits.test_x[federation.partition.test[1]])
    )
    official = {x.tobytes() for x in digits.test_x}
    assert {x.numpy().tobytes() for x in federation.global_test().x} <= official
    pooled = federation.pooled().train
    together = torch.cat([federation.client(i).train.x for i in range(3)])
    assert torch.equal(pooled.x, together)


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_rotation_by_right_angles_is_exact_and_counter_clockwise(quarters):
    images = torch.from_numpy(Rng(0).numpy().random((2, 3, 9, 9), dtype=np.float32))
    turned = torch.rot90(images, quarters, (2, 3))
    assert torch.allclose(rotate(images, 90.0 * quarters), turned, atol=1e-4)


def test_rotation_keeps_proportions_of_oblong_images():
    images = torch.zeros(1, 1, 5, 9)
    images[0, 0, 2, 6] = 1.0
    turned = rotate(images, 90.0)[0, 0]
    assert turned.argmax().item() == 0 * 9 + 4


def test_threads_get_the_same_client(digits):
    federation = made(digits)
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(federation.client, [3] * 32))
    assert all(client is got[0] for client in got)


def test_same_stream_same_federation_and_other_stream_other_validation(digits):
    first, second, other = made(digits), made(digits), made(digits, seed=1)
    assert torch.equal(first.client(4).validation.x, second.client(4).validation.x)
    assert not torch.equal(first.client(4).train.y, other.client(4).train.y)


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    fraction=st.sampled_from([0.0, 0.05, 0.1, 0.5, 0.9]),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_hold_out_takes_a_fraction_and_keeps_every_class_in_training(labels, fraction):
    labels = np.array(labels)
    indices = np.arange(len(labels)) * 2
    everything = np.repeat(labels, 2)
    train, held = hold_out(indices, everything, fraction, Rng(0))
    assert np.array_equal(np.sort(np.concatenate([train, held])), indices)
    assert (np.diff(train) > 0).all() and (np.diff(held) > 0).all()
    assert set(everything[train]) == set(labels)
    spare = len(labels) - len(set(labels))
    wanted = max(1, round(fraction * len(labels))) if fraction else 0
    assert len(held) == min(wanted, spare)


def test_validation_is_stratified(digits):
    federation = made(digits, clients=2, scheme="iid", validation=0.2)
    client = federation.client(0)
    ratio = np.bincount(client.validation.y) / np.bincount(client.train.y)
    assert np.abs(ratio - 0.25).max() < 0.03
    assert len(made(digits, validation=0.0).client(0).validation) == 0


@pytest.mark.parametrize("validation", [-0.1, 1.0])
def test_validation_out_of_range_is_refused(digits, validation):
    with pytest.raises(ConfigError, match="allowed: at least 0 and below 1"):
        made(digits, validation=validation)


def test_a_partition_of_other_data_is_refused(digits):
    partition = divide(numbered(), partitions.get("iid")(), 4, Rng(0))
    with pytest.raises(DataError, match="belong to no client"):
        Federation.build(digits, partition, rng=Rng(0))


@pytest.fixture
def made_of(monkeypatch):
    """Return the list of (part, number of rows) that were made into tensors."""
    done = []
    real = Federation._split
    monkeypatch.setattr(
        Federation,
        "_split",
        lambda self, part, indices, *rest: (
            done.append((part, len(indices))) or real(self, part, indices, *rest)
        ),
    )
    return done


def test_a_client_costs_nothing_until_it_takes_part_and_then_what_it_uses(digits, made_of):
    federation = made(digits, clients=4, validation=0.1)
    federation.counts(), federation.sizes(3), federation.train_size(2), federation.absent(1)
    client = federation.client(0)
    federation.client(1)
    assert made_of == []
    assert len(client.test) == federation.sizes(0)["test"]
    assert made_of == [("test", len(client.test))], "whoever is only judged trains nothing"
    assert client.train is client.train
    assert client.train is federation.client(0).train
    assert [part for part, _ in made_of] == ["test", "train"]
    federation.pooled()
    assert len(made_of) == 2


def test_an_idle_client_holds_each_of_its_indices_once(digits):
    federation = made(digits, clients=4, validation=0.2)
    kept = {id(a): a for a in (*federation.partition.train, *federation._validation)}
    held = sum(len(v) for v in federation._validation)
    assert sum(a.size for a in kept.values()) == len(digits.train_y) + held
    assert not [v for v in vars(federation).values() if isinstance(v, list) and len(v) == 4][1:]
    for i in range(4):
        train, validation = federation._own(i), federation._validation[i]
        assert sorted([*train, *validation]) == federation.partition.train[i].tolist()
        assert (np.diff(train) > 0).all()
        assert len(train) == federation.train_size(i)


def test_threads_make_a_split_once(digits, made_of):
    client = made(digits).client(3)
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda _: client.train, range(32)))
    assert all(train is got[0] for train in got)
    assert len(made_of) == 1


def test_mapped_data_is_changed_when_it_is_used(digits, made_of):
    client = made(digits).client(3)
    halved = client.mapped(lambda split: Split(split.x / 2, split.y))
    assert made_of == []
    assert torch.equal(halved.test.x, client.test.x / 2)
    assert halved.test is halved.test
    assert [part for part, _ in made_of] == ["test"]
    given = ClientData(client.test, client.validation, client.test)
    assert given.train is client.test
