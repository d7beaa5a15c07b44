import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.data.apportion import label_counts
from fedkd.data.dataset import Dataset
from fedkd.data.partition import Partition, divide, own_test
from fedkd.data.registries import partitions
from fedkd.errors import ConfigError, DataError
from fedkd.options import build
from fedkd.rng import Rng

LABELS = np.arange(4000) % 10


def split(name, clients, labels=LABELS, seed=0, ids=None, **values):
    return build(partitions.get(name), values).split(labels, clients, Rng(seed), ids)


def counts(parts, labels=LABELS):
    return label_counts(parts, labels, int(labels.max()) + 1)


def classes_held(parts, labels=LABELS):
    return (counts(parts, labels) > 0).sum(1)


def dataset(labels, test_labels, **ids):
    return Dataset(
        name="made",
        train_x=np.zeros((len(labels), 3), np.float32),
        train_y=labels,
        test_x=np.zeros((len(test_labels), 3), np.float32),
        test_y=test_labels,
        classes=int(labels.max()) + 1,
        **ids,
    )


def test_iid_parts_are_equal_and_look_alike():
    parts = split("iid", 7)
    assert {len(p) for p in parts} == {571, 572}
    assert (np.abs(counts(parts) / 571 - 0.1) < 0.06).all()


@pytest.mark.parametrize("balanced", [False, True])
def test_dirichlet_with_large_alpha_is_even(balanced):
    held = counts(split("dirichlet", 8, alpha=1e7, balanced=balanced))
    assert np.abs(held - 50).max() <= 1


@pytest.mark.parametrize("balanced", [False, True])
def test_dirichlet_skew_falls_with_alpha(balanced):
    held = [
        classes_held(split("dirichlet", 20, alpha=a, balanced=balanced)).mean()
        for a in (0.02, 0.5, 50)
    ]
    assert held[0] < held[1] < held[2]
    assert held[2] > 9.5


def test_dirichlet_matches_its_moments():
    # A share of Dir_K(a) has mean 1/K and variance (1/K)(1 - 1/K) / (K a + 1).
    alpha, clients, examples = 0.5, 5, 400
    shares = np.concatenate(
        [
            counts(split("dirichlet", clients, seed=s, alpha=alpha, min_examples=1)).ravel()
            / examples
            for s in range(40)
        ]
    )
    expected = (1 / clients) * (1 - 1 / clients) / (clients * alpha + 1)
    assert shares.mean() == pytest.approx(1 / clients)
    assert shares.var() == pytest.approx(expected, rel=0.08)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("alpha", [1e-300, 1e-9, 0.01])
def test_dirichlet_ends_for_any_alpha_and_leaves_nobody_empty(alpha, balanced):
    parts = split("dirichlet", 100, alpha=alpha, balanced=balanced, min_examples=7)
    assert min(map(len, parts)) >= 7
    assert len(np.unique(np.concatenate(parts))) == len(LABELS)


def test_dirichlet_balanced_gives_equal_sizes():
    assert {len(p) for p in split("dirichlet", 30, alpha=0.1, balanced=True)} == {133, 134}


def test_dirichlet_may_leave_clients_empty_when_asked():
    parts = split("dirichlet", 100, alpha=1e-9, allow_empty=True)
    assert sum(len(p) > 0 for p in parts) <= 10
    assert sum(map(len, parts)) == len(LABELS)


def test_dirichlet_refuses_a_minimum_that_cannot_be_met():
    with pytest.raises(ConfigError, match="at most 40, or min_examples to at most 2"):
        split("dirichlet", 50, labels=np.arange(120) % 3, min_examples=3)
    with pytest.raises(ConfigError, match="alpha = 0: Input should be greater than 0"):
        build(partitions.get("dirichlet"), {"alpha": 0})


@pytest.mark.parametrize("k", [1, 2, 3, 10])
def test_pathological_gives_exactly_k_classes_evenly(k):
    parts = split("pathological", 20, classes_per_client=k)
    assert set(classes_held(parts)) == {k}
    holders = (counts(parts) > 0).sum(0)
    assert holders.max() - holders.min() <= 1
    sizes = [len(p) for p in parts]
    assert max(sizes) - min(sizes) <= k


@pytest.mark.parametrize(
    ("k", "clients", "words"),
    [
        (12, 20, "there are 10 classes; allowed: 1 to 10"),
        (2, 4, "4 clients have to hold all 10 classes; allowed: 3 to 10"),
        (10, 500, "500 of them hold class 0, with 400 training examples"),
    ],
)
def test_pathological_refuses_the_impossible(k, clients, words):
    with pytest.raises(ConfigError, match=words):
        split("pathological", clients, classes_per_client=k)


def test_shards_hold_few_classes_in_equal_parts():
    parts = split("shards", 20, shards_per_client=2)
    assert {len(p) for p in parts} == {200}
    assert classes_held(parts).max() <= 2
    with pytest.raises(ConfigError, match="allowed: 1 to 200"):
        split("shards", 20, shards_per_client=201)


def test_quantity_changes_sizes_but_not_the_class_mixture():
    parts = split("quantity", 10, alpha=0.3)
    sizes = np.array([len(p) for p in parts])
    assert sizes.max() > 4 * sizes.min() >= 40
    large = counts(parts)[sizes > 300] / sizes[sizes > 300, None]
    assert np.abs(large - 0.1).max() < 0.06
    even = [len(p) for p in split("quantity", 10, alpha=1e9)]
    assert max(even) - min(even) <= 1


def test_rotation_spreads_angles_and_refuses_vectors():
    scheme = build(partitions.get("rotation"), {"max_degrees": 30})
    assert scheme.degrees(5) == (-30.0, -15.0, 0.0, 15.0, 30.0)
    assert scheme.degrees(1) == (0.0,)
    with pytest.raises(ConfigError, match="cannot be rotated"):
        divide(dataset(LABELS, LABELS[:100]), scheme, 5, Rng(0))


def test_natural_clients_are_owners():
    ids = np.array(["w2", "w0", "w1", "w0", "w2", "w2"])
    parts = split("natural", 3, labels=np.arange(6) % 2, ids=ids)
    assert [p.tolist() for p in parts] == [[1, 3], [2], [0, 4, 5]]


def test_natural_merges_whole_owners_when_asked():
    ids = Rng(0).numpy().integers(0, 50, len(LABELS))
    parts = split("natural", 8, ids=ids, group=True)
    for a in range(8):
        for b in range(a):
            assert not set(ids[parts[a]]) & set(ids[parts[b]])
    sizes = [len(p) for p in parts]
    assert max(sizes) < 1.4 * min(sizes)


def test_natural_test_examples_follow_their_owners():
    ids, test_ids = np.array([5, 5, 6, 7, 7]), np.array([6, 5, 5, 5, 9])
    data = dataset(np.arange(5) % 2, np.arange(5) % 2, train_ids=ids, test_ids=test_ids)
    made = divide(data, partitions.get("natural")(), 3, Rng(0))
    assert set(test_ids[made.test[0]]) == {5}
    assert test_ids[made.test[1]].tolist() == [6]
    # Owner 7 has no test example and borrows one from the client that has most.
    assert test_ids[made.test[2]].tolist() == [5]


@pytest.mark.parametrize(
    ("clients", "ids", "error", "words"),
    [
        (2, None, DataError, "femnist"),
        (4, np.arange(6) % 3, ConfigError, "allowed: 1 to 3"),
        (2, np.arange(6) % 3, ConfigError, "set clients to 3, or group = true"),
    ],
)
def test_natural_says_what_is_wrong(clients, ids, error, words):
    with pytest.raises(error, match=words):
        split("natural", clients, labels=np.arange(6) % 2, ids=ids)


@given(
    seed=st.integers(0, 10**6),
    clients=st.integers(1, 12),
    alpha=st.sampled_from([0.01, 0.3, 10.0]),
    tests=st.integers(40, 200),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_own_test_is_disjoint_and_gives_everybody_one(seed, clients, alpha, tests):
    labels = np.arange(400) % 5
    test_labels = np.arange(tests) % 5
    train = split("dirichlet", clients, labels=labels, seed=seed, alpha=alpha, min_examples=2)
    parts = own_test(labels, train, test_labels, Rng(seed))
    assert min(map(len, parts)) >= 1
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(tests))


def test_own_test_has_the_distribution_of_the_training_part():
    test_labels = np.arange(2000) % 10
    train = split("dirichlet", 10, alpha=0.3)
    trained = counts(train)
    tested = counts(own_test(LABELS, train, test_labels, Rng(0)), test_labels)
    p, q = trained / trained.sum(1, keepdims=True), tested / tested.sum(1, keepdims=True)
    assert (np.abs(p - q).sum(1) / 2).max() < 0.06
    # Largest remainder: no class of a client misses its exact share by one example or more.
    assert np.abs(tested - 2000 / 4000 * trained).max() < 1 + 1e-9


def test_own_test_lends_an_example_of_a_class_that_the_client_holds():
    labels = np.array([0] * 90 + [1] * 91)
    train = [np.arange(90), np.arange(90, 180), np.array([180])]
    test_labels = np.array([0] * 10 + [1] * 10)
    parts = own_test(labels, train, test_labels, Rng(0))
    assert [len(p) for p in parts] == [10, 9, 1]
    assert test_labels[parts[2]].tolist() == [1]


def test_own_test_leaves_empty_clients_and_unknown_classes_out():
    labels, test_labels = np.array([0, 0, 1]), np.array([0, 1, 2, 2])
    parts = own_test(labels, [np.array([0, 1, 2]), np.array([], int)], test_labels, Rng(0))
    assert [p.tolist() for p in parts] == [[0, 1], []]


def test_own_test_refuses_fewer_test_examples_than_clients():
    with pytest.raises(DataError, match="lower clients, or raise test_limit"):
        own_test(np.zeros(4, int), [np.array([k]) for k in range(4)], np.zeros(3, int), Rng(0))


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ([[0, 1], [1, 2]], "training example 1 is given 2 times"),
        ([[0, 1], [3]], "training index 3 does not exist; allowed: 0 to 2"),
        ([[0], [2]], "1 training examples belong to no client, the first one is 1"),
    ],
)
def test_check_finds_what_is_no_partition(train, words):
    parts = tuple(np.array(p) for p in train)
    made = Partition(parts, (np.array([0]), np.array([1])), (0.0, 0.0), "made")
    with pytest.raises(DataError, match=words):
        made.check(3, 2)


def test_divide_records_where_it_came_from_and_refuses_no_clients():
    data = dataset(LABELS, LABELS[:200])
    made = divide(data, partitions.get("dirichlet")(alpha=0.2), 5, Rng(3), "dirichlet")
    assert (made.name, made.seed, made.options["alpha"]) == ("dirichlet", 3, 0.2)
    with pytest.raises(ConfigError, match="clients = 0"):
        divide(data, partitions.get("iid")(), 0, Rng(0))
