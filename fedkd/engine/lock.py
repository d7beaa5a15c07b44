"""One process at a time works in a folder: a lock that ends with the process that holds it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedkd.engine.folder import writing
from fedkd.errors import RunError

FILE = "lock"
PAUSE = 0.2
PATIENCE = 2.0
"""Seconds: whoever asks whether a lock is held holds it for a moment."""


@contextmanager
def locked(folder: Path, patience: float = PATIENCE) -> Iterator[None]:
    """Hold a folder's lock, waiting up to ``patience`` seconds for another process to end.

    Raises:
        RunError: another process is at work in the folder, or it cannot be written to.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        until = time.monotonic() + patience
        while not _take(handle):
            if time.monotonic() > until:
                raise RunError(
                    f"another process is at work in {folder}; wait until it has ended, or give "
                    "another folder with --out"
                )
            time.sleep(PAUSE)
        yield
    finally:
        os.close(handle)


def held(folder: Path) -> bool:
    """Return whether a process is at work in a folder."""
    file = folder / FILE
    if not file.is_file():
        return False
    try:
        handle = os.open(file, os.O_RDWR)
    except OSError:
        return False
    try:
        return not _take(handle)
    finally:
        os.close(handle)


def _take(handle: int) -> bool:
    try:
        import fcntl
    except ImportError:  # No such locks here: two processes in one folder go unnoticed.
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
