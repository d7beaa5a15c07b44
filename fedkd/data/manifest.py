"""Partition manifests: a JSON file by which others can use the very same split.

A partition depends on a seed and on the version of this library; its manifest does not. It names
the data by their fingerprint, so that it cannot be laid over other data by mistake.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from fedkd.data.dataset import Dataset
from fedkd.data.partition import Partition, Parts
from fedkd.errors import DataError

SCHEMA = 1
KEYS = ("schema", "dataset", "scheme", "options", "seed", "clients", "degrees", "train", "test")


def save(partition: Partition, dataset: Dataset, path: Path) -> None:
    """Write a manifest: aside first, then renamed, so that no half of one is ever found."""
    content = {
        "schema": SCHEMA,
        "dataset": _identity(dataset),
        "scheme": partition.name,
        "options": dict(partition.options),
        "seed": partition.seed,
        "clients": partition.clients,
        "degrees": list(partition.degrees),
        "train": [part.tolist() for part in partition.train],
        "test": [part.tolist() for part in partition.test],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")
    aside.replace(path)


def load(path: Path, dataset: Dataset) -> Partition:
    """Read a manifest that was written for this very data set.

    Raises:
        DataError: unreadable, of another schema or data set, or no partition of the data.
    """
    content = _read(path)
    if content["schema"] != SCHEMA:
        raise DataError(f"{path} has schema {content['schema']!r}; this version reads {SCHEMA}")
    here, there = _identity(dataset), content["dataset"]
    if there != here:
        raise DataError(
            f"{path} was made for other data: {_show(there)}; this is {_show(here)}. Load the data "
            f"set with the options that it was made with, or make a new partition"
        )
    try:
        train, test = (Parts(map(_indices, content[key])) for key in ("train", "test"))
        degrees = tuple(float(d) for d in content["degrees"])
        clients, seed = int(content["clients"]), int(content["seed"])
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{path} is damaged: {error}") from error
    if clients != len(train) or not all(map(math.isfinite, degrees)):
        raise DataError(f"{path} is damaged: it says {clients} clients and lists {len(train)}")
    partition = Partition(
        train=train,
        test=test,
        degrees=degrees,
        name=str(content["scheme"]),
        options=dict(content["options"]),
        seed=seed,
    )
    try:
        partition.check(len(dataset.train_y), len(dataset.test_y))
    except DataError as error:
        raise DataError(f"{path} is damaged: {error}") from error
    return partition


def seed_of(path: Path) -> int:
    """Return the seed that a manifest's partition was drawn with, whatever data it is of.

    Raises:
        DataError: the file cannot be read, or its seed is no whole number.
    """
    try:
        return int(_read(path)["seed"])
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{path} is damaged: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the partition manifest {path}: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is no partition manifest: it holds no JSON object")
    lost = [key for key in KEYS if key not in content]
    if lost:
        raise DataError(f"{path} is no partition manifest: {', '.join(lost)} missing")
    if not isinstance(content["options"], dict):
        raise DataError(f"{path} is damaged: options is no object")
    return content


def _indices(part: Any) -> np.ndarray:
    array = np.asarray(part)
    if array.size and (array.ndim != 1 or array.dtype.kind not in "iu"):
        raise ValueError("a client's indices are not a list of whole numbers")
    return np.sort(array.astype(np.int64).reshape(-1))


def _identity(dataset: Dataset) -> dict[str, Any]:
    return {
        "name": dataset.name,
        "fingerprint": dataset.fingerprint(),
        "train": len(dataset.train_y),
        "test": len(dataset.test_y),
    }


def _show(identity: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in dict(identity).items())
