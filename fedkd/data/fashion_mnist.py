"""Fashion-MNIST, the main benchmark: from files that a package or anybody may bring, or the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from fedkd.data.dataset import Dataset, Source
from fedkd.data.hub import local_folder
from fedkd.data.idx import find_idx, read_idx
from fedkd.data.images import normalise
from fedkd.data.registries import sources
from fedkd.data.schema import Schema
from fedkd.errors import DataError
from fedkd.options import options

NAME = "fashion-mnist"
SYSTEM = Path("/usr/share/datasets/fashion-mnist")
SCHEMA = Schema(
    name=NAME,
    hub_name="zalando-datasets/fashion_mnist",
    image="image",
    label="label",
    shape=(28, 28),
    mean=(0.2860,),
    std=(0.3530,),
    classes=10,
    names=(
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
)
FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
PACKAGE = "on Debian: apt-get install dataset-fashion-mnist"


@sources.register(NAME)
@options
class FashionMnist(Source):
    """Fashion-MNIST: 60,000 + 10,000 grey 28x28 images of clothes, 10 classes.

    Xiao et al., arXiv:1708.07747. IDX files (plain or .gz) are looked for in ``folder``, else in
    ``$FEDKD_DATA/fashion-mnist``, else where Debian's package dataset-fashion-mnist puts them; else
    the hub is asked. Normalised by mean 0.2860 and deviation 0.3530 of the training pixels.
    """

    folder: Annotated[
        str, Field(description="folder with the four IDX files; empty: the usual places")
    ] = ""

    def read(self) -> Dataset:
        """Return the data.

        Raises:
            DataError: they are not found, or a file is damaged.
        """
        files = self._files()
        if files is None:
            return self._from_hub()
        train_x, train_y = _read_part(files[0], files[1])
        test_x, test_y = _read_part(files[2], files[3])
        return Dataset(NAME, train_x, train_y, test_x, test_y, SCHEMA.classes, SCHEMA.names)

    def missing(self) -> str:
        """Say what is missing, if anything."""
        try:
            if self._files() is not None:
                return ""
        except DataError as error:
            return str(error)
        text = SCHEMA.missing("")
        return text and f"{text}; {PACKAGE}"

    def _files(self) -> list[Path] | None:
        """Return the four files of the first place that has them all, or nothing."""
        given = local_folder(NAME, self.folder)
        for place in [given, *([] if self.folder else [SYSTEM])]:
            found = [find_idx(place, name) for name in FILES] if place is not None else []
            files = [file for file in found if file is not None]
            if len(files) == len(FILES):
                return files
        if self.folder:
            raise DataError(
                f"{NAME}: folder = {self.folder!r} lacks some of the IDX files {', '.join(FILES)} "
                f"(each plain or with .gz)"
            )
        return None

    def _from_hub(self) -> Dataset:
        try:
            tables = SCHEMA.open("", "train", "test")
        except DataError as error:
            raise DataError(f"{error}; {PACKAGE}") from error
        train_y, test_y = SCHEMA.labels(tables["train"]), SCHEMA.labels(tables["test"])
        train_x = SCHEMA.inputs(tables["train"], np.arange(len(train_y)))
        test_x = SCHEMA.inputs(tables["test"], np.arange(len(test_y)))
        return Dataset(NAME, train_x, train_y, test_x, test_y, SCHEMA.classes, SCHEMA.names)


def _read_part(image_file: Path, label_file: Path) -> tuple[np.ndarray, np.ndarray]:
    images, labels = read_idx(image_file, 3), read_idx(label_file, 1)
    if len(images) != len(labels):
        raise DataError(
            f"{image_file} has {len(images)} images and {label_file.name} {len(labels)} labels; "
            f"the files do not belong together, fetch them again"
        )
    return normalise(images, SCHEMA.mean, SCHEMA.std), labels.astype(np.int64)
