"""Tables of images from a local folder or the Hugging Face hub, as Arrow, without waiting in vain.

Local files are read with pyarrow alone. The hub is asked only after a short probe, because the
client libraries try for about 20 seconds before they say that there is no network.
"""

from __future__ import annotations

import importlib.util
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from threading import Thread
from typing import Any

from fedkd.errors import DataError

PATIENCE = 3.0
EXTRA = "pip install 'fedkd[datasets]'"
ALIASES = {"validation": ("validation", "valid", "val"), "train": ("train",), "test": ("test",)}
SUFFIXES = (".parquet", ".arrow")


def local_folder(name: str, folder: str) -> Path | None:
    """Return where the data set lies on this machine: ``folder``, else ``$FEDKD_DATA/name``.

    Raises:
        DataError: ``folder`` was given and does not exist.
    """
    if folder:
        given = Path(folder).expanduser()
        if not given.is_dir():
            raise DataError(f"{name}: folder = {folder!r} is no folder; give one that exists")
        return given
    root = os.environ.get("FEDKD_DATA", "")
    candidate = Path(root).expanduser() / name
    return candidate if root and candidate.is_dir() else None


def open_tables(name: str, hub_name: str, folder: str, splits: Sequence[str]) -> dict[str, Any]:
    """Return one ``pyarrow.Table`` for each split, from a local folder or else from the hub.

    Raises:
        DataError: the data are not here and cannot be fetched; the message lists the ways out.
    """
    place = local_folder(name, folder)
    if place is not None:
        return read_folder(name, place, splits)
    return download(name, hub_name, splits)


def read_folder(name: str, folder: Path, splits: Sequence[str]) -> dict[str, Any]:
    """Return the tables of the parquet or Arrow files in a folder and the folders below it.

    A file belongs to the split that its name or a folder of its begins with, as in
    ``data/train-00000-of-00001.parquet`` or ``train/data-00000-of-00002.arrow`` (what
    ``save_to_disk`` writes). If there is only one split to find, it may also be all files.
    """
    require(name, "pyarrow")
    files = sorted(f for f in folder.rglob("*") if f.suffix in SUFFIXES and f.is_file())
    found = {
        split: [f for f in files if _belongs(f.relative_to(folder), split)] for split in splits
    }
    if len(splits) == 1 and not found[splits[0]]:
        found[splits[0]] = files
    lost = [split for split in splits if not found[split]]
    if lost:
        raise DataError(
            f"{name}: {folder} has no parquet or Arrow file of the split {lost[0]!r}; expected for "
            f"instance {lost[0]}-00000-of-00001.parquet ({len(files)} data files are there)"
        )
    return {split: _read_files(found[split]) for split in splits}


def _belongs(file: Path, split: str) -> bool:
    return any(part.lower().startswith(ALIASES[split]) for part in file.parts)


def _read_files(files: list[Path]) -> Any:
    import pyarrow as pa
    from pyarrow import parquet

    tables = []
    for file in files:
        try:
            if file.suffix == ".parquet":
                tables.append(parquet.ParquetFile(file).read())
            else:
                with pa.memory_map(str(file)) as source:
                    tables.append(_read_arrow(source))
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"cannot read {file}: {error}; fetch the file again") from error
    try:
        return pa.concat_tables(tables)
    except pa.ArrowInvalid as error:
        names = ", ".join(str(f) for f in files)
        raise DataError(f"files of one split have different columns ({names}): {error}") from error


def _read_arrow(source: Any) -> Any:
    import pyarrow as pa

    try:
        return pa.ipc.open_stream(source).read_all()
    except pa.ArrowInvalid:
        source.seek(0)
        return pa.ipc.open_file(source).read_all()


def download(name: str, hub_name: str, splits: Sequence[str]) -> dict[str, Any]:
    """Return the tables of a hub data set, from the hub's local cache where it is there."""
    ways = (
        f"or download its parquet files elsewhere and give the folder that holds them as folder, "
        f"or put them into $FEDKD_DATA/{name}"
    )
    if importlib.util.find_spec("datasets") is None:
        raise DataError(
            f"{name} is not on this machine, and fetching {hub_name} needs an extra: {EXTRA}; "
            f"{ways}"
        )
    import datasets
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE and not reachable(constants.ENDPOINT):
        raise DataError(
            f"{name}: the hub that has {hub_name} could not be reached within {PATIENCE:g} s; "
            f"connect and try again, or set HF_HUB_OFFLINE=1 if you fetched it before, {ways}"
        )
    try:
        loaded = [datasets.load_dataset(hub_name, split=split) for split in splits]
    except Exception as error:
        # Which of them a broken connection raises depends on the versions of three libraries.
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{name}: fetching {hub_name} failed ({cause}); try again, {ways}"
        ) from error
    return {s: d.with_format("arrow")[:] for s, d in zip(splits, loaded, strict=True)}


def reachable(url: str, seconds: float = PATIENCE) -> bool:
    """Tell whether anything answers at ``url`` in time, through the proxy if one is set."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            with urllib.request.urlopen(request, timeout=seconds):
                answers.append(True)
        except urllib.error.HTTPError as error:
            error.close()
            answers.append(True)
        except (OSError, ValueError):
            answers.append(False)

    # A name server that does not answer blocks beyond any socket timeout: wait outside of it.
    asking = Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    return bool(answers and answers[0])


def hint(name: str, hub_name: str, folder: str) -> str:
    """Say in one line what is missing, or nothing if the data set is on this machine."""
    try:
        if local_folder(name, folder) is not None:
            return ""
    except DataError as error:
        return str(error)
    if importlib.util.find_spec("datasets") is None:
        return f"not on this machine; {EXTRA} to fetch {hub_name}, or give folder"
    from datasets import config

    if (Path(config.HF_DATASETS_CACHE) / hub_name.replace("/", "___")).is_dir():
        return ""
    return f"not on this machine yet; will be fetched from the hub ({hub_name}), or give folder"


def require(name: str, module: str) -> None:
    """Raise an error that names the extra to install where a module is not there."""
    if importlib.util.find_spec(module) is None:
        raise DataError(f"reading {name} needs an extra: {EXTRA}")
