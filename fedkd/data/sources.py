"""Data that need no download: scikit-learn's digits, and the user's own arrays in an npz file."""

from __future__ import annotations

import importlib.util
import zipfile
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from fedkd.data.dataset import Dataset, Source, stratified_order
from fedkd.data.images import normalise
from fedkd.data.registries import sources
from fedkd.errors import DataError, nearest
from fedkd.options import options
from fedkd.rng import Rng

__all__ = ["Dataset", "Digits", "Npz", "Source", "sources"]

DIGITS_TEST = 360


@sources.register("digits")
@options
class Digits(Source):
    """Digits: scikit-learn's bundled 1,797 handwritten digits, 8x8, 10 classes.

    There is no official split; a fixed fifth (360 examples, classes in proportion) is the test
    part, the same on every machine. Pixels 0..16 are divided by 16 and normalised by the mean
    0.3053 and deviation 0.3760 of all of them.
    """

    def read(self) -> Dataset:
        """Return the data."""
        pixels, y = _bundled_digits()
        x = normalise(pixels, (0.3053,), (0.3760,), top=16.0)
        order = stratified_order(y, Rng(0, ("digits", "split")))
        test, train = np.sort(order[:DIGITS_TEST]), np.sort(order[DIGITS_TEST:])
        names = tuple(str(n) for n in range(10))
        return Dataset("digits", x[train], y[train], x[test], y[test], 10, names)

    def missing(self) -> str:
        """Return nothing: the data come with scikit-learn."""
        return ""


def _bundled_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return pixels 0..16, float64 (1797, 8, 8), and labels, int64 (1797,).

    The file is read as scikit-learn does, without an import of it: that takes seconds.

    Raises:
        DataError: scikit-learn is missing, or keeps the file elsewhere.
    """
    found = importlib.util.find_spec("sklearn")
    folder = Path(found.origin).parent if found is not None and found.origin else Path()
    file = folder / "datasets" / "data" / "digits.csv.gz"
    try:
        rows = np.loadtxt(file, delimiter=",")
    except (OSError, ValueError) as error:
        raise DataError(
            f"digits: cannot read {file} ({error}); the data come with scikit-learn: install it "
            "again, or use another data.source"
        ) from error
    return rows[:, :-1].reshape(-1, 8, 8), rows[:, -1].astype(np.int64)


@sources.register("npz")
@options
class Npz(Source):
    """Your own arrays: a NumPy .npz file with train_x, train_y, test_x and test_y.

    Inputs are ``(n, features)``, ``(n, height, width)`` or ``(n, channels, height, width)``; labels
    are whole numbers from 0. ``train_ids`` and ``test_ids`` may name the owner of each example, for
    the partition ``natural``. uint8 inputs are divided by 255.
    """

    path: Annotated[str, Field(min_length=1, description="the .npz file")]
    standardise: Annotated[
        bool,
        Field(description="subtract the mean of all training values, divide by their deviation"),
    ] = True

    def read(self) -> Dataset:
        """Return the data.

        Raises:
            DataError: the file or an array is missing, or has a wrong shape, type or value.
        """
        arrays = self._arrays()
        train_x, test_x = (self._inputs(arrays, key) for key in ("train_x", "test_x"))
        train_y, test_y = (self._labels(arrays, key) for key in ("train_y", "test_y"))
        if self.standardise and train_x.size:
            mean, std = train_x.mean(dtype=np.float64), train_x.std(dtype=np.float64)
            scale = np.float32(1 / std) if std > 0 else np.float32(1)
            train_x, test_x = ((x - np.float32(mean)) * scale for x in (train_x, test_x))
        classes = int(max(train_y.max(initial=0), test_y.max(initial=0))) + 1
        train_ids, test_ids = arrays.get("train_ids"), arrays.get("test_ids")
        name = Path(self.path).stem
        return Dataset(name, train_x, train_y, test_x, test_y, classes, (), train_ids, test_ids)

    def missing(self) -> str:
        """Say what is missing, if anything."""
        return "" if Path(self.path).expanduser().is_file() else f"there is no file {self.path}"

    def _arrays(self) -> dict[str, np.ndarray]:
        file = Path(self.path).expanduser()
        if not file.is_file():
            raise DataError(f"npz: path = {self.path!r}: there is no such file")
        try:
            with file.open("rb") as stream, np.load(stream, allow_pickle=False) as content:
                arrays = {key: content[key] for key in content.files}
        except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
            raise DataError(
                f"npz: cannot read {self.path} ({error}); write it with numpy.savez and plain "
                f"numbers or strings, no objects"
            ) from error
        for key in ("train_x", "train_y", "test_x", "test_y"):
            if key not in arrays:
                found = ", ".join(sorted(arrays)) or "nothing"
                raise DataError(
                    f"npz: {self.path} has no array {key!r}{nearest(key, arrays)} (found: {found})"
                )
        return arrays

    def _inputs(self, arrays: dict[str, np.ndarray], key: str) -> np.ndarray:
        x = arrays[key]
        if x.dtype.kind not in "biuf":
            raise DataError(f"npz: {key} holds {x.dtype}; allowed: numbers")
        if x.ndim == 4 and x.shape[3] in (1, 3) and x.shape[1] not in (1, 3):
            raise DataError(
                f"npz: {key} has shape {x.shape}, which looks like channels last; allowed: "
                f"(n, channels, height, width), so save {key}.transpose(0, 3, 1, 2)"
            )
        x = x[:, None] if x.ndim == 3 else x
        return x.astype(np.float32) / np.float32(255 if x.dtype == np.uint8 else 1)

    def _labels(self, arrays: dict[str, np.ndarray], key: str) -> np.ndarray:
        y = arrays[key]
        if y.dtype.kind not in "iu":
            raise DataError(f"npz: {key} holds {y.dtype}; allowed: whole numbers from 0")
        return y.astype(np.int64)
