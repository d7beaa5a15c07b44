"""Who owns which example: the result of a partition, and its mirror image in the test set.

A scheme only divides the training examples; the test set is then divided to match, so that each
client is judged on the distribution that it trained on and on examples that nobody trained on.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np

from fedkd.data.apportion import apportion, label_counts
from fedkd.data.dataset import Dataset
from fedkd.errors import ConfigError, DataError
from fedkd.rng import Rng


class Parts(Sequence[np.ndarray]):
    """Many clients' indices in one array, int64; each client's is a view, made when asked for.

    So a client that nobody asks for costs its indices and one offset.
    """

    def __init__(self, parts: Iterable[np.ndarray]) -> None:
        arrays = [np.asarray(part, dtype=np.int64) for part in parts]
        self._flat = np.concatenate([np.empty(0, dtype=np.int64), *arrays])
        self._ends = np.cumsum([0, *map(len, arrays)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, place: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[np.ndarray]: ...
    def __getitem__(self, place: int | slice) -> np.ndarray | Sequence[np.ndarray]:
        """Return the indices of one client, or of several."""
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        i = range(len(self))[place]
        return self._flat[self._ends[i] : self._ends[i + 1]]


@dataclass(frozen=True, eq=False)
class Partition:
    """Which examples belong to which client.

    Attributes:
        train: for each client the sorted indices of its training examples; together they are the
            whole training set, each example once.
        test: for each client the sorted indices of its own-distribution test examples; disjoint.
        degrees: for each client the angle by which its images are rotated, counter-clockwise.
        name: name of the scheme.
        options: options of the scheme, for the record.
        seed: seed that the scheme was drawn with, for the record.
    """

    train: Sequence[np.ndarray]
    test: Sequence[np.ndarray]
    degrees: tuple[float, ...]
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("train", "test"):
            parts = getattr(self, name)
            if not isinstance(parts, Parts):
                object.__setattr__(self, name, Parts(parts))

    @property
    def clients(self) -> int:
        """The number of clients."""
        return len(self.train)

    def check(self, examples: int, test_examples: int) -> None:
        """Raise :class:`DataError` unless this is a partition of a data set of these sizes."""
        if not len(self.train) == len(self.test) == len(self.degrees) > 0:
            raise DataError(
                f"partition {self.name}: train, test and degrees are for {len(self.train)}, "
                f"{len(self.test)} and {len(self.degrees)} clients; they have to agree"
            )
        owners = _owners(self.name, "training", self.train, examples)
        if (owners == 0).any():
            raise DataError(
                f"partition {self.name}: {int((owners == 0).sum())} training examples belong to no "
                f"client, the first one is {int(owners.argmin())}"
            )
        _owners(self.name, "test", self.test, test_examples)


class Scheme(ABC):
    """A way to divide training examples over clients: a pure function with options."""

    @abstractmethod
    def split(
        self, labels: np.ndarray, clients: int, rng: Rng, ids: np.ndarray | None = None
    ) -> list[np.ndarray]:
        """Return for each client the sorted indices of its examples, each example exactly once.

        Args:
            labels: class of each training example.
            clients: number of clients.
            rng: the stream that everything is drawn from.
            ids: natural owner of each example, where there is one.

        Raises:
            ConfigError: the request is impossible; the message names the allowed values.
        """

    def degrees(self, clients: int) -> tuple[float, ...]:
        """Return for each client the angle by which its images are rotated; 0 means not at all."""
        return (0.0,) * clients

    def split_test(self, data: Dataset, train: Sequence[np.ndarray], rng: Rng) -> list[np.ndarray]:
        """Return for each client its own-distribution test examples; see :func:`own_test`."""
        return own_test(data.train_y, train, data.test_y, rng)


def divide(data: Dataset, scheme: Scheme, clients: int, rng: Rng, name: str = "") -> Partition:
    """Divide a data set over clients, training and test set alike, and check the result.

    Args:
        data: what is divided.
        scheme: how, as found in the registry ``partitions``.
        clients: number of clients.
        rng: the stream that the partition is drawn from.
        name: name of the scheme, for messages and manifests.

    Raises:
        ConfigError: the request is impossible for this data set.
    """
    if clients < 1:
        raise ConfigError(f"clients = {clients}: at least 1 is needed")
    train = scheme.split(data.train_y, clients, rng.child("train"), data.train_ids)
    degrees = scheme.degrees(clients)
    if any(degrees) and data.train_x.ndim != 4:
        raise ConfigError(
            f"{data.name} has inputs of shape {data.train_x.shape[1:]}, which cannot be rotated; "
            f"take images, or another partition"
        )
    made = dataclasses.is_dataclass(scheme)
    partition = Partition(
        train=Parts(np.sort(part) for part in train),
        test=Parts(np.sort(part) for part in scheme.split_test(data, train, rng.child("test"))),
        degrees=degrees,
        name=name or type(scheme).__name__.lower(),
        options=dataclasses.asdict(scheme) if made else {},  # type: ignore[call-overload]
        seed=rng.seed,
    )
    partition.check(len(data.train_y), len(data.test_y))
    return partition


def own_test(
    train_labels: np.ndarray, train: Sequence[np.ndarray], test_labels: np.ndarray, rng: Rng
) -> list[np.ndarray]:
    """Divide the test set so that each client's part has the client's training distribution.

    Of the t_c test examples of class c client k gets ``t_c n_kc / n_c``, rounded by largest
    remainder with ties broken by ``rng``; n_kc counts its training examples of the class. No
    example is given twice, and classes that nobody trains on are given to nobody.

    A client with training but no test examples (its shares were all rounded down) then gets one:
    of the class that it holds most among those of which some client with two or more test
    examples has one to give; of any class if there is no such class; the giver is the client with
    most test examples. This moves at most one example for each such client.

    Raises:
        DataError: there are more clients with training examples than test examples.
    """
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    held = label_counts(train, train_labels, classes)
    active = np.flatnonzero(held.sum(1))
    available = np.bincount(test_labels, minlength=classes)
    if available[held.sum(0) > 0].sum() < len(active):
        raise DataError(
            f"{int(available.sum())} test examples cannot give each of {len(active)} clients one "
            f"of its own; lower clients, or raise test_limit"
        )
    given = np.zeros_like(held)
    for c in np.flatnonzero(held.sum(0)):
        given[:, c] = apportion(held[:, c], int(available[c]), rng.child("ties", int(c)))
    for k in active:
        if given[k].sum() == 0:
            _lend(given, held[k], int(k))
    return deal(test_labels, given, rng.child("deal"))


def _lend(given: np.ndarray, held: np.ndarray, client: int) -> None:
    """Move one test example to ``client``, of a class that it holds if that is possible."""
    totals = given.sum(1)
    rich = totals >= 2
    for c in np.argsort(-held, kind="stable"):
        givers = rich & (given[:, c] > 0)
        if givers.any():
            giver = int(np.where(givers, totals, -1).argmax())
            given[giver, c] -= 1
            given[client, c] += 1
            return


def deal(labels: np.ndarray, counts: np.ndarray, rng: Rng) -> list[np.ndarray]:
    """Deal examples to clients: ``counts[k, c]`` random ones of class c to client k, sorted."""
    hands: list[list[np.ndarray]] = [[] for _ in counts]
    for c in np.flatnonzero(counts.sum(0)):
        members = rng.child("class", int(c)).numpy().permutation(np.flatnonzero(labels == c))
        ends = np.cumsum(counts[:, c])
        for k in np.flatnonzero(counts[:, c]):
            hands[k].append(members[ends[k] - counts[k, c] : ends[k]])
    none = np.empty(0, dtype=np.int64)
    return [np.sort(np.concatenate([none, *hand])) for hand in hands]


def _owners(name: str, part: str, parts: Sequence[np.ndarray], examples: int) -> np.ndarray:
    """Return how many clients own each example, or raise where that is more than one."""
    everything = np.concatenate([np.asarray(p, dtype=np.int64) for p in parts])
    outside = (everything < 0) | (everything >= examples)
    if outside.any():
        raise DataError(
            f"partition {name}: {part} index {int(everything[outside][0])} does not exist; "
            f"allowed: 0 to {examples - 1}"
        )
    owners = np.bincount(everything, minlength=examples)
    if owners.max(initial=0) > 1:
        raise DataError(
            f"partition {name}: {part} example {int(owners.argmax())} is given "
            f"{int(owners.max())} times; each one may belong to one client only"
        )
    return owners
