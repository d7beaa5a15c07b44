"""CIFAR-10, CIFAR-100, CINIC-10 and FEMNIST: the image sets that federated papers report on.

They come from the Hugging Face hub or from local files of the same schema; each source only says
what its columns are called, which split is which, and how its pixels are normalised.
"""

from __future__ import annotations

import string
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from fedkd.data.dataset import Dataset, Source, first
from fedkd.data.registries import sources
from fedkd.data.schema import Schema
from fedkd.errors import DataError
from fedkd.options import options
from fedkd.rng import Rng

Folder = Annotated[
    str, Field(description="folder with parquet or Arrow files; empty: $FEDKD_DATA, then the hub")
]
CIFAR10 = Schema(
    name="cifar10",
    hub_name="uoft-cs/cifar10",
    image="img",
    label="label",
    shape=(32, 32, 3),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    classes=10,
    names=(
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    ),
)
CIFAR100 = replace(
    CIFAR10,
    name="cifar100",
    hub_name="uoft-cs/cifar100",
    label="fine_label",
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
    classes=100,
    names=(),
)
CINIC10 = replace(
    CIFAR10,
    name="cinic10",
    hub_name="flwrlabs/cinic10",
    image="image",
    mean=(0.47889522, 0.47227842, 0.43047404),
    std=(0.24205776, 0.23828046, 0.25874835),
)
FEMNIST = Schema(
    name="femnist",
    hub_name="flwrlabs/femnist",
    image="image",
    label="character",
    shape=(28, 28),
    mean=(0.9637,),
    std=(0.1592,),
    classes=62,
    names=tuple(string.digits + string.ascii_uppercase + string.ascii_lowercase),
)
TEST_FRACTION = 0.1


def _official(source: Source, schema: Schema, folder: str, *extra: str) -> Dataset:
    """Read a set with an official split; images beyond the limits are never decoded."""
    tables = schema.open(folder, "train", *extra, "test")
    import pyarrow as pa

    train = pa.concat_tables([tables["train"], *(tables[e] for e in extra)])
    train_y, test_y = schema.labels(train), schema.labels(tables["test"])
    keep = first(train_y, source.limit, "train")
    keep_test = first(test_y, source.test_limit, "test")
    return Dataset(
        name=schema.name,
        train_x=schema.inputs(train, keep),
        train_y=train_y[keep],
        test_x=schema.inputs(tables["test"], keep_test),
        test_y=test_y[keep_test],
        classes=schema.classes,
        class_names=schema.names,
    )


@sources.register("cifar10")
@options
class Cifar10(Source):
    """CIFAR-10: 50,000 + 10,000 colour photographs, 32x32, 10 classes (Krizhevsky, 2009)."""

    folder: Folder = ""

    def read(self) -> Dataset:
        """Return the data; normalised by the training set's mean and deviation per channel."""
        return _official(self, CIFAR10, self.folder)

    def missing(self) -> str:
        """Say what is missing, if anything."""
        return CIFAR10.missing(self.folder)


@sources.register("cifar100")
@options
class Cifar100(Source):
    """CIFAR-100: 50,000 + 10,000 colour photographs, 32x32, 100 classes in 20 superclasses."""

    folder: Folder = ""
    label: Annotated[
        Literal["fine", "coarse"], Field(description="the 100 classes, or the 20 superclasses")
    ] = "fine"

    def read(self) -> Dataset:
        """Return the data; normalised by the training set's mean and deviation per channel."""
        classes = 100 if self.label == "fine" else 20
        schema = replace(CIFAR100, label=f"{self.label}_label", classes=classes)
        return _official(self, schema, self.folder)

    def missing(self) -> str:
        """Say what is missing, if anything."""
        return CIFAR100.missing(self.folder)


@sources.register("cinic10")
@options
class Cinic10(Source):
    """CINIC-10: 90,000 + 90,000 + 90,000 colour images, 32x32, the classes of CIFAR-10.

    Darlow et al., arXiv:1810.03505. The official validation part is left aside, since clients take
    their own from their training data, unless it is merged into the training part.
    """

    folder: Folder = ""
    merge_validation: Annotated[
        bool, Field(description="train on the official validation part too (180,000 examples)")
    ] = False

    def read(self) -> Dataset:
        """Return the data; normalised by the mean and deviation that its authors publish."""
        return _official(
            self, CINIC10, self.folder, *(["validation"] if self.merge_validation else [])
        )

    def missing(self) -> str:
        """Say what is missing, if anything."""
        return CINIC10.missing(self.folder)


@sources.register("femnist")
@options
class Femnist(Source):
    """FEMNIST: 814,000 handwritten characters by 3,597 writers, 28x28, 62 classes.

    Caldas et al., arXiv:1812.01097. There is no official split, so a fixed tenth of each writer's
    examples (at least one, if there are two) is the test part, the same on every machine and
    whichever writers are loaded. The writers are the owners for the partition ``natural``.
    Pixels are normalised by the nominal mean 0.9637 and deviation 0.1592 (dark ink on white).
    """

    folder: Folder = ""
    writers: Annotated[
        int, Field(ge=0, description="load so many writers, chosen at random but fixed; 0: all")
    ] = 0

    def read(self) -> Dataset:
        """Return the data; only images that are asked for are decoded."""
        table = FEMNIST.open(self.folder, "train")["train"]
        ids = np.asarray(FEMNIST.column(table, "writer_id").to_pylist(), dtype=str)
        labels = FEMNIST.labels(table)
        rows, test = self._choose(ids)
        if not 0 < test.sum() < len(rows):
            raise DataError("femnist: no writer has two examples, one to train and one to test on")
        train, held = rows[~test], rows[test]
        train = train[first(labels[train], self.limit, "train")]
        held = held[first(labels[held], self.test_limit, "test")]
        return Dataset(
            name="femnist",
            train_x=FEMNIST.inputs(table, train),
            train_y=labels[train],
            test_x=FEMNIST.inputs(table, held),
            test_y=labels[held],
            classes=FEMNIST.classes,
            class_names=FEMNIST.names,
            train_ids=ids[train],
            test_ids=ids[held],
        )

    def _choose(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of the chosen writers and which of them are test examples."""
        writers, who = np.unique(ids, return_inverse=True)
        rng = Rng(0, ("femnist",))
        luck = np.array([rng.child("writer", str(w)).uniform() for w in writers])
        chosen = np.argsort(luck)[: self.writers or len(writers)]
        test = np.zeros(len(ids), dtype=bool)
        order = np.argsort(who, kind="stable")
        groups = np.split(order, np.cumsum(np.bincount(who))[:-1])
        for w in chosen:
            mine = rng.child("split", str(writers[w])).numpy().permutation(groups[w])
            if len(mine) > 1:
                test[mine[: max(1, round(TEST_FRACTION * len(mine)))]] = True
        rows = np.flatnonzero(np.isin(who, chosen))
        return rows, test[rows]

    def missing(self) -> str:
        """Say what is missing, if anything."""
        return FEMNIST.missing(self.folder)
