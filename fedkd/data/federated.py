"""A federation's data: what each client trains, validates and is tested on, made when asked for.

A client that nobody trains costs its index arrays only. Each of its splits is made at first use,
once, in the memory format that convolutions are fastest in: who is only judged trains nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any

import numpy as np
import torch

from fedkd.data.apportion import apportion, label_counts
from fedkd.data.dataset import Dataset, stratified_order
from fedkd.data.partition import Partition, Parts
from fedkd.data.rotate import rotate
from fedkd.errors import ConfigError
from fedkd.rng import Rng
from fedkd.types import Task

UNLABELLED = -1
"""The label of what has none: public examples of unknown class, places behind the end of a text."""


@dataclass(frozen=True, eq=False)
class Split:
    """Labelled examples as tensors: float32 ``x (n, ...)`` and int64 ``y (n,)``.

    Of text: int64 ``x (n, L)`` and the token that follows each of them, ``y (n, L)``, -1 for none.
    """

    x: torch.Tensor
    y: torch.Tensor

    def __len__(self) -> int:
        return len(self.y)

    @property
    def like(self) -> torch.Tensor:
        """No rows at all, but shape, type and place of what they would be: ``x[:0]``."""
        return self.x[:0]


@dataclass(frozen=True, eq=False)
class Rows:
    """Which rows of a larger table somebody has: ``table (N, ...)``, int64 ``index (n,)``."""

    table: torch.Tensor
    index: np.ndarray


class Drawn(Split):
    """Rows of a larger table: ``x = table[index]``, taken out at first use and kept; thread-safe.

    Who needs a few of them at a time can read them where they lie, in ``rows``, and spare the copy.
    """

    rows: Rows | None

    def __init__(self, x: Rows | torch.Tensor, y: torch.Tensor) -> None:
        given = {"rows": x} if isinstance(x, Rows) else {"rows": None, "x": x}
        self.__dict__.update(given, y=y, _lock=Lock())

    @cached_property
    def x(self) -> torch.Tensor:
        """The rows (n, ...)."""
        # Who judges may be the first to ask, and what is made in that mode could never train.
        with self.__dict__["_lock"], torch.inference_mode(False):
            # Another thread may have taken them meanwhile. NumPy is faster at it, by a fifth.
            found: torch.Tensor | None = self.__dict__.get("x")
            if found is None:
                assert self.rows is not None
                taken = self.rows.table.numpy().take(self.rows.index, axis=0)
                found = self.__dict__["x"] = compact(torch.from_numpy(taken))
        return found

    @property
    def like(self) -> torch.Tensor:
        """No rows at all, but shape, type and place of what they would be."""
        return self.x[:0] if self.rows is None else self.rows.table[:0]

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy, and travel to other processes, as a split that has its rows."""
        return Split, (self.x, self.y)


Make = Callable[[], Split]
"""Makes a split when it is asked for."""


class ClientData:
    """What one client has; ``test`` follows the distribution that the client trains on.

    Each split is given, or made by a function at first use and kept; thread-safe.
    """

    def __init__(self, train: Split | Make, validation: Split | Make, test: Split | Make) -> None:
        self._splits = {"train": train, "validation": validation, "test": test}
        self._lock = Lock()

    @property
    def train(self) -> Split:
        """What the client trains on."""
        return self._split("train")

    @property
    def validation(self) -> Split:
        """What was held out of its training examples."""
        return self._split("validation")

    @property
    def test(self) -> Split:
        """Its official test examples."""
        return self._split("test")

    def mapped(self, change: Callable[[Split], Split]) -> ClientData:
        """Return this data with every split changed, such as moved to a device, when it is used."""
        return ClientData(
            lambda: change(self.train), lambda: change(self.validation), lambda: change(self.test)
        )

    def _split(self, name: str) -> Split:
        found = self._splits[name]
        if isinstance(found, Split):
            return found
        with self._lock:
            # Another thread may have made it meanwhile: a client has one of each.
            found = self._splits[name]
            made = self._splits[name] = found if isinstance(found, Split) else found()
        return made


@dataclass(frozen=True, eq=False)
class Planted:
    """What is put into a client's training examples: rows as in a data set, ``x (p, ...), y (p,)``.

    ``instead``: positions among the client's own training examples that they push out.
    """

    x: np.ndarray
    y: np.ndarray
    instead: np.ndarray


class Federation:
    """A data set that was divided over clients; thread-safe. Made by :meth:`build`.

    Attributes:
        task: what is learned.
        dataset: the data as the source gave them.
        partition: which example belongs to whom.
        clients: number of clients.
    """

    def __init__(
        self,
        dataset: Dataset,
        partition: Partition,
        validation: Sequence[np.ndarray],
        rng: Rng,
        planted: Mapping[int, Planted] | None = None,
    ) -> None:
        self.dataset, self.partition = dataset, partition
        self._planted = dict(planted or {})
        self.task: Task = dataset.task()
        self.clients = partition.clients
        self._validation, self._rng = Parts(validation), rng
        self._made: dict[int, ClientData] = {}
        self._global: dict[int, Split] = {}
        self._lock = Lock()

    @classmethod
    def build(
        cls, dataset: Dataset, partition: Partition, *, validation: float = 0.1, rng: Rng
    ) -> Federation:
        """Take a validation part out of each client's training examples; see :func:`hold_out`.

        Args:
            dataset: the data.
            partition: which example belongs to whom, as made by
                :func:`~fedkd.data.partition.divide` or loaded from a manifest.
            validation: the fraction of a client's training examples, in [0, 1).
            rng: decides which examples are held out, and the order of the global test set.

        Raises:
            ConfigError: ``validation`` is out of range.
            DataError: the partition is of another data set.
        """
        if not 0 <= validation < 1:
            raise ConfigError(f"validation = {validation}: allowed: at least 0 and below 1")
        partition.check(len(dataset.train_y), len(dataset.test_y))
        held = [
            hold_out(indices, dataset.train_y, validation, rng.child("validation", k))[1]
            for k, indices in enumerate(partition.train)
        ]
        return cls(dataset, partition, held, rng)

    def plant(self, planted: Mapping[int, Planted]) -> Federation:
        """Return this federation with examples of no data set put into clients' training parts.

        Validation and test examples, and what the partition says, stay as they are.
        """
        return Federation(self.dataset, self.partition, self._validation, self._rng, planted)

    def client(self, i: int) -> ClientData:
        """Return what client ``i`` has; its tensors are made at first use and kept."""
        with self._lock:
            if i not in self._made:
                self._made[i] = ClientData(
                    lambda: self._with_planted([i], self._train_split([i], self._own)),
                    lambda: self._train_split([i], self._validation.__getitem__),
                    lambda: self._split("test", self.partition.test[i], self.partition.degrees[i]),
                )
            return self._made[i]

    def counts(self) -> np.ndarray:
        """Return how often each client trains on each class: int64 ``(clients, classes)``.

        Validation examples are not counted, so that row i sums to ``train_size(i)``.
        """
        return self._counts.copy()

    def train_size(self, i: int) -> int:
        """Return the number of training examples of client ``i``, validation taken out."""
        own = len(self.partition.train[i]) - len(self._validation[i])
        planted = self._planted.get(i)
        return own if planted is None else own - len(set(planted.instead)) + len(planted.y)

    def sizes(self, i: int) -> dict[str, int]:
        """Return how many examples each split of client ``i`` has; nothing is made for it."""
        return {
            "train": self.train_size(i),
            "validation": len(self._validation[i]),
            "test": len(self.partition.test[i]),
        }

    def absent(self, i: int) -> np.ndarray:
        """Return the classes of which client ``i`` has no training example."""
        return np.flatnonzero(self._counts[i] == 0)

    def global_test(self, limit_per_class: int = 0) -> Split:
        """Return the balanced test set: equally many official test examples of each class.

        The number is that of the rarest class, or ``limit_per_class`` if that is smaller and not
        0; a smaller set is contained in a larger one. Classes without any test example are left
        out. Images are never rotated here, whatever the partition does to the clients.
        """
        with self._lock:
            if limit_per_class not in self._global:
                labels = self.dataset.test_y
                present = np.unique(labels)
                each = int(np.bincount(labels)[present].min())
                each = min(each, limit_per_class) if limit_per_class > 0 else each
                keep = []
                for c in present:
                    order = self._rng.child("global", int(c)).numpy()
                    keep.append(order.permutation(np.flatnonzero(labels == c))[:each])
                self._global[limit_per_class] = self._split("test", np.sort(np.concatenate(keep)))
            return self._global[limit_per_class]

    def pooled(self) -> ClientData:
        """Return the union of all clients' train and of all validation parts, for one big client.

        Its test part is the balanced :meth:`global_test`. Nothing of this is kept.
        """
        everybody = list(range(self.clients))
        return ClientData(
            lambda: self._with_planted(everybody, self._train_split(everybody, self._own)),
            lambda: self._train_split(everybody, self._validation.__getitem__),
            self.global_test,
        )

    @cached_property
    def _counts(self) -> np.ndarray:
        own = [self._own(i) for i in range(self.clients)]
        found = label_counts(own, self.dataset.train_y, self.dataset.classes)
        for k, planted in self._planted.items():
            found[k] += np.bincount(planted.y, minlength=self.dataset.classes)
        return found

    def _own(self, i: int) -> np.ndarray:
        """Return the sorted indices that a client trains on: found when asked for, never kept."""
        mine = self.partition.train[i]
        own = np.delete(mine, np.searchsorted(mine, self._validation[i]))
        return np.delete(own, self._planted[i].instead) if i in self._planted else own

    def _with_planted(self, who: list[int], own: Split) -> Split:
        parts = [own]
        for k in who:
            if k in self._planted:
                put = self._planted[k]
                parts.append(as_split(put.x, put.y, self.task))
        if len(parts) == 1:
            return own
        return Split(compact(torch.cat([p.x for p in parts])), torch.cat([p.y for p in parts]))

    def _train_split(self, who: list[int], part: Callable[[int], np.ndarray]) -> Split:
        if not any(self.partition.degrees[i] for i in who):
            return self._split("train", np.concatenate([part(i) for i in who]))
        made = [self._split("train", part(i), self.partition.degrees[i]) for i in who]
        return Split(compact(torch.cat([m.x for m in made])), torch.cat([m.y for m in made]))

    def _split(self, part: str, indices: np.ndarray, degrees: float = 0.0) -> Split:
        data = self.dataset
        x, y = (data.train_x, data.train_y) if part == "train" else (data.test_x, data.test_y)
        if self.task.sequence or degrees:
            return as_split(x.take(indices, axis=0), y[indices], self.task, degrees)
        return Drawn(Rows(self._tables[part], indices), torch.from_numpy(y[indices]))

    @cached_property
    def _tables(self) -> dict[str, torch.Tensor]:
        parts = {"train": self.dataset.train_x, "test": self.dataset.test_x}
        return {name: _table(x) for name, x in parts.items()}


def _table(x: np.ndarray) -> torch.Tensor:
    """Return a data set's rows as a tensor over the same memory, which nobody writes to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return torch.from_numpy(x if min(x.strides, default=0) >= 0 else np.ascontiguousarray(x))


def hold_out(
    indices: np.ndarray, labels: np.ndarray, fraction: float, rng: Rng
) -> tuple[np.ndarray, np.ndarray]:
    """Divide a client's training examples into a training and a validation part, both sorted.

    The validation part holds ``fraction`` of them, rounded, but at least one where that is
    possible, each class in proportion. Every class keeps at least one training example, so a class
    held once, and so a client with one example, gives nothing to validation.
    """
    nothing = np.empty(0, dtype=np.int64)
    mine = labels[indices]
    spare = np.maximum(np.bincount(mine, minlength=1) - 1, 0)
    wanted = max(1, round(fraction * len(indices))) if fraction > 0 else 0
    total = min(wanted, int(spare.sum()))
    if total == 0:
        return indices, nothing
    per_class = apportion(spare, total, rng.child("classes"))
    order = stratified_order(mine, rng.child("order"))
    held = np.concatenate([order[mine[order] == c][:n] for c, n in enumerate(per_class) if n])
    mask = np.zeros(len(indices), dtype=bool)
    mask[held] = True
    return indices[~mask], indices[mask]


def as_split(x: np.ndarray, y: np.ndarray, task: Task, degrees: float = 0.0) -> Split:
    """Return rows of a data set as tensors: text as what is read and what follows, images turned.

    Rows of text (n, L + 1) become ``x (n, L)`` and ``y (n, L)``, -1 where the next is padding.
    """
    if task.sequence:
        rows = torch.from_numpy(np.ascontiguousarray(x))
        follows = rows[:, 1:].clone()
        follows[follows == 0] = UNLABELLED
        return Split(rows[:, :-1].contiguous(), follows)
    return Split(compact(rotate(torch.from_numpy(x), degrees)), torch.from_numpy(y))


def compact(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` without gaps in memory: images channels last, anything else as it is."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.contiguous()
