"""What a data source hands over: arrays with their official split, checked once when made.

Everything behind this line (partitions, federations, manifests) may rely on labels being classes
and inputs being finite numbers, whoever wrote the source.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated

import numpy as np
from pydantic import Field

from fedkd.data.tokenizers import Tokenizer
from fedkd.errors import DataError
from fedkd.options import options
from fedkd.rng import Rng
from fedkd.types import Task


@dataclass(frozen=True, eq=False)
class Dataset:
    """A labelled data set with its official split into training and test examples.

    Attributes:
        name: name of the source.
        train_x: float32 ``(n, channels, height, width)`` or ``(n, features)``, normalised; or rows
            of text, int64 ``(n, L + 1)``, which a network reads up to L and predicts from 1 on.
        train_y: int64 ``(n,)``, each in ``0 .. classes - 1``; 0 for text, whose labels are tokens.
        test_x: as ``train_x``, for the official test examples.
        test_y: as ``train_y``.
        classes: number of classes, whether or not each of them occurs.
        class_names: one name for each class, or none.
        train_ids: natural owner of each training example (int or str), where the data has owners.
        test_ids: natural owner of each test example.
        tokenizer: what the numbers of a text stand for; its tokens are the classes.

    Raises:
        DataError: shapes disagree, a label is no class, or an input is NaN or infinite.
    """

    name: str
    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    classes: int
    class_names: tuple[str, ...] = ()
    train_ids: np.ndarray | None = None
    test_ids: np.ndarray | None = None
    tokenizer: Tokenizer | None = None

    def __post_init__(self) -> None:
        self._check("train", self.train_x, self.train_y, self.train_ids)
        self._check("test", self.test_x, self.test_y, self.test_ids)
        if self.train_x.shape[1:] != self.test_x.shape[1:]:
            raise DataError(
                f"{self.name}: one example is {self.train_x.shape[1:]} in train_x and "
                f"{self.test_x.shape[1:]} in test_x; they have to agree"
            )
        if self.class_names and len(self.class_names) != self.classes:
            raise DataError(
                f"{self.name}: {len(self.class_names)} class names for {self.classes} classes"
            )

    def _check(self, part: str, x: np.ndarray, y: np.ndarray, ids: np.ndarray | None) -> None:
        if self.tokenizer is not None:
            self._check_text(part, x)
        elif x.ndim not in (2, 4) or x.dtype != np.float32:
            raise DataError(
                f"{self.name}: {part}_x has shape {x.shape} and type {x.dtype}; allowed: float32 "
                f"(n, features) or (n, channels, height, width)"
            )
        if y.shape != (len(x),) or y.dtype != np.int64:
            raise DataError(
                f"{self.name}: {part}_y has shape {y.shape} and type {y.dtype}; allowed: int64 "
                f"({len(x)},), one label for each row of {part}_x"
            )
        if len(y) == 0:
            raise DataError(f"{self.name}: there is no example in {part}_x; at least 1 is needed")
        if y.min() < 0 or y.max() >= self.classes:
            wrong = int(y.min()) if y.min() < 0 else int(y.max())
            raise DataError(
                f"{self.name}: {part}_y holds the label {wrong}; allowed: 0 to {self.classes - 1}"
            )
        if ids is not None and ids.shape != y.shape:
            raise DataError(f"{self.name}: {part}_ids has shape {ids.shape}; allowed: {y.shape}")
        if x.dtype.kind != "f":
            return
        with np.errstate(invalid="ignore", over="ignore"):
            finite = np.isfinite(x.sum(dtype=np.float64))
        if not finite:
            raise DataError(f"{self.name}: {part}_x holds NaN or infinite values; remove them")

    def _check_text(self, part: str, x: np.ndarray) -> None:
        if x.ndim != 2 or x.shape[1] < 2 or x.dtype != np.int64:
            raise DataError(
                f"{self.name}: {part}_x has shape {x.shape} and type {x.dtype}; allowed for text: "
                "int64 (n, L + 1), rows of at least 2 tokens"
            )
        if len(x) and (x.min() < 0 or x.max() >= self.classes):
            wrong = int(x.min()) if x.min() < 0 else int(x.max())
            raise DataError(
                f"{self.name}: {part}_x holds the token {wrong}; allowed: 0 to {self.classes - 1}"
            )

    def task(self) -> Task:
        """Return what is learned from this data set, which is all that a model has to know."""
        if self.tokenizer is not None:
            return Task(
                name=self.name,
                input_shape=(self.train_x.shape[1] - 1,),
                classes=self.classes,
                class_names=self.class_names,
                bounds=(0.0, float(self.classes - 1)),
                sequence=True,
            )
        return Task(
            name=self.name,
            input_shape=tuple(self.train_x.shape[1:]),
            classes=self.classes,
            class_names=self.class_names,
            bounds=(float(self.train_x.min()), float(self.train_x.max())),
        )

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that change with any example, label, owner or the order."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=8)
        for part in (self.train_x, self.train_y, self.test_x, self.test_y):
            digest.update(f"{part.dtype.str}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).data)
        for ids in (self.train_ids, self.test_ids):
            digest.update(b"-" if ids is None else "\n".join(map(str, ids)).encode())
        return digest.hexdigest()

    def limited(self, train: int = 0, test: int = 0) -> Dataset:
        """Return the subset of at most so many training and test examples (0: all).

        The subset holds every class in proportion, is the same on every machine, and a smaller
        one is contained in a larger one; see :func:`stratified_order`.
        """
        keep = first(self.train_y, train, "train")
        keep_test = first(self.test_y, test, "test")
        if len(keep) == len(self.train_y) and len(keep_test) == len(self.test_y):
            return self
        return replace(
            self,
            train_x=self.train_x[keep],
            train_y=self.train_y[keep],
            train_ids=None if self.train_ids is None else self.train_ids[keep],
            test_x=self.test_x[keep_test],
            test_y=self.test_y[keep_test],
            test_ids=None if self.test_ids is None else self.test_ids[keep_test],
        )


@options
class Source(ABC):
    """What every data source has: where it ends, and how to say that something is missing."""

    limit: Annotated[
        int,
        Field(ge=0, description="keep so many training examples, classes in proportion; 0: all"),
    ] = 0
    test_limit: Annotated[
        int, Field(ge=0, description="keep so many test examples, classes in proportion; 0: all")
    ] = 0

    def load(self) -> Dataset:
        """Return the data set, limited as asked.

        Raises:
            DataError: it is missing or damaged; the message says how to get it.
        """
        return self.read().limited(self.limit, self.test_limit)

    @abstractmethod
    def read(self) -> Dataset:
        """Return the data set; it may, but need not, respect the limits already."""

    @abstractmethod
    def missing(self) -> str:
        """Return an empty string where the data is at hand, else what is missing in one line."""


def stratified_order(labels: np.ndarray, rng: Rng) -> np.ndarray:
    """Return an order of all examples of which every prefix holds the classes in proportion.

    The example that comes r-th in its class of n (in random order) has the key (r + 1/2) / n; the
    keys are sorted. A prefix of length m holds ``m n / N`` examples of that class, up to one.

    >>> order = stratified_order(np.array([0] * 8 + [1] * 4), Rng(0))
    >>> np.bincount(np.array([0] * 8 + [1] * 4)[order[:6]])
    array([4, 2])
    """
    generator = rng.numpy()
    key = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        key[members] = (generator.permutation(len(members)) + 0.5) / len(members)
    return np.lexsort((generator.permutation(len(labels)), key))


def first(labels: np.ndarray, limit: int, part: str) -> np.ndarray:
    """Return the sorted indices of the first ``limit`` examples in stratified order (0: all)."""
    if limit == 0 or limit >= len(labels):
        return np.arange(len(labels))
    return np.sort(stratified_order(labels, Rng(0, ("subset", part)))[:limit])
