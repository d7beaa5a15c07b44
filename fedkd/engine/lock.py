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
PAUSE = 0.05
PATIENCE = 2.0
"""Seconds: whoever asks whether a lock is held holds it for a moment."""


@contextmanager
def locked(folder: Path, patience: float = PATIENCE) -> Iterator[None]:
    """Hold a folder's lock, waiting up to ``patience`` seconds for another process to end.

    Raises:
        RunError: another process is at work in the folder, or it cannot be written to.
    """
    file, until = folder / FILE, time.monotonic() + patience
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = _opened(file)
    try:
        while not _take(handle) or not _same(handle, file):
            if time.monotonic() > until:
                raise RunError(
                    f"another process is at work in {folder}; wait until it has ended, or give "
                    "another folder with --out"
                )
            time.sleep(PAUSE)
            os.close(handle)
            handle = _opened(file)
        try:
            yield
        finally:
            file.unlink(missing_ok=True)
    finally:
        os.close(handle)


def _opened(file: Path) -> int:
    return os.open(file, os.O_RDWR | os.O_CREAT, 0o644)


def _same(handle: int, file: Path) -> bool:
    """Return whether the file is still the one that was opened: its holder removes it at the end.

    A lock on a file that has gone would be held beside somebody else's.
    """
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False


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
