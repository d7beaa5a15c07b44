"""The run folder: everything about a run is on disk as it happens, whole files atomically.

``config.toml`` the resolved experiment, ``metrics.jsonl`` one record a line, ``events.log`` what
happened, ``partition.json`` who has which example, ``checkpoint/`` the state, ``failures/`` what
a failing client was given, ``summary.json`` the result.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedkd.config import Experiment, load
from fedkd.errors import ConfigError, RunError
from fedkd.types import Record


class RunFolder:
    """One run on disk.

    Raises:
        RunError: the disk is full or not writable; nothing finished is lost.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"

    def exists(self) -> bool:
        """Return whether a run was begun here."""
        return (self.path / "config.toml").exists()

    def experiment(self) -> Experiment:
        """Return the experiment of the run that was begun here.

        Raises:
            ConfigError: its ``config.toml`` is damaged.
        """
        return load(self.path / "config.toml")

    def begin(self, toml: str) -> None:
        """Make the folder for a new run; whatever an unfinished start left is emptied."""
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self.metrics.write_bytes(b"")
        write_text(self.path / "config.toml", toml)

    def size(self) -> int:
        """Return the bytes of ``metrics.jsonl``."""
        return self.metrics.stat().st_size if self.metrics.exists() else 0

    def rewind(self, size: int) -> list[Record]:
        """Cut ``metrics.jsonl`` back to a checkpoint and return the records that are left.

        Raises:
            ConfigError: the file is shorter than the checkpoint says, or damaged.
        """
        if self.size() < size:
            raise ConfigError(
                f"{self.metrics} has {self.size()} bytes, but the checkpoint was made at {size}; "
                "it was changed since: restore it, or start again in another folder with --out"
            )
        with writing(self.path), self.metrics.open("r+b") as file:
            file.truncate(size)
        return read_records(self.metrics)

    def append(self, records: Iterable[Record]) -> None:
        """Append records, one JSON object a line, and hand them to the disk."""
        lines = "".join(map(_line, records))
        with writing(self.path), self.metrics.open("a", encoding="utf-8") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())

    def event(self, text: str) -> None:
        """Append a line with the time to ``events.log``."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        with writing(self.path), (self.path / "events.log").open("a", encoding="utf-8") as file:
            file.write(f"{stamp} {text}\n")

    def summary(self) -> dict[str, Any] | None:
        """Return the summary of a finished run, or None.

        Raises:
            ConfigError: it is damaged.
        """
        file = self.path / "summary.json"
        if not file.exists():
            return None
        try:
            found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            _ = found["headline"]["readout"], found["headline"]["predict"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{file} cannot be read ({error!r}); remove it: the command that made the run then "
                "goes on with it"
            ) from None
        return found

    def write_privacy(self, report: dict[str, Any]) -> None:
        """Write the privacy ledger: what was claimed, spent, and not covered."""
        write_text(self.path / "privacy.json", json.dumps(report, indent=2, sort_keys=True) + "\n")

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write the result; its presence means that the run is finished."""
        write_text(self.path / "summary.json", json.dumps(summary, indent=2, sort_keys=True) + "\n")


class writing:  # noqa: N801 - reads as a statement: with writing(folder)
    """Turn an error of the file system into a message with the folder and the fix."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):
            raise RunError(
                f"cannot write to {self.path}: {error.strerror or error}; nothing finished was "
                "lost: make room or give another folder with --out, then go on with --resume"
            ) from error


def write_text(path: Path, text: str) -> None:
    """Write a file aside and rename it, so that no reader ever sees half of it."""
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(path.name + ".part")
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)


def read_records(path: Path) -> list[Record]:
    """Return the records of a ``metrics.jsonl``; a last line cut off by a kill is left out.

    Raises:
        ConfigError: a line in the middle is damaged.
    """
    records = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            records.append(Record(**json.loads(line)))
        except (ValueError, TypeError) as error:
            if number == len(lines):
                break
            raise ConfigError(f"{path} line {number} is damaged: {error}") from None
    return records


def _line(record: Record) -> str:
    """Return a record as a line; fields that are not set have their defaults when read.

    Raises:
        ValueError: its value is not finite.
    """
    if not math.isfinite(record.value):
        raise ValueError(f"a value that is not finite cannot be written down: {record}")
    metric, rest = _words(record.metric, record.split, record.readout, record.predict)
    client = "" if record.client == -1 else f', "client": {int(record.client)}'
    value = float(record.value)
    return (
        f'{{"round": {int(record.round)}, "metric": {metric}, "value": {value!r}{client}{rest}}}\n'
    )


@lru_cache(maxsize=4096)
def _words(metric: str, split: str, readout: str, predict: str) -> tuple[str, str]:
    """Return the strings of a record in JSON: most records have those of others."""
    rest = {"split": split, "readout": readout, "predict": predict}
    said = [f', "{name}": {json.dumps(text)}' for name, text in rest.items() if text]
    return json.dumps(metric), "".join(said)
