"""The page that is shown now, made anew in the background when something has changed on disk.

Requests never wait for it and never start it: they get the last page that could be made.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

READ = (
    *("config.toml", "study.toml", "sweep.toml", "sweep.json", "tuning.json"),
    *("metrics.jsonl", "summary.json", "failed.json", "privacy.json", "audit.json"),
)
"""Files that a page is made of."""
PASSED_BY = {"checkpoint", "failures", "sinks", "plots", "tables"}
EVERY = 2.0
"""Seconds between looks at the folders."""
SHARE = 2.0
"""A page that took a second to make is made again after this many at the earliest: runs under way
need the cores more than their page does."""


@dataclass(frozen=True)
class Rendered:
    """A page: the whole, its ``<main>`` alone, how many runs are in which state.

    ``policy`` says what the page may do (Content-Security-Policy); empty: show text.
    """

    html: str
    main: str
    counts: dict[str, int] = field(default_factory=dict)
    policy: str = ""

    @property
    def version(self) -> str:
        """Differs from that of every other page."""
        return hashlib.sha256(self.main.encode()).hexdigest()[:16]


class Keeper:
    """Holds the page that is shown and replaces it when ``changed()`` gives another text.

    Args:
        first: the page until one has been made.
        build: makes the page; called by one thread, once at a time.
        changed: a text that is another one when the page would be; much cheaper than that.
        every: seconds between calls of ``changed``.
    """

    def __init__(
        self,
        first: Rendered,
        build: Callable[[], Rendered],
        changed: Callable[[], str],
        every: float = EVERY,
    ) -> None:
        self.page = first
        self.problem = ""
        self._build, self._changed, self._every = build, changed, every
        self._seen = ""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work, name="fedkd-watch", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def close(self, patience: float = 20.0) -> None:
        """End it; waits for the page that is being made, at most ``patience`` seconds."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(patience)

    def look(self) -> bool:
        """Make the page anew if something has changed; return whether that was tried."""
        try:
            now = self._changed()
            if now == self._seen:
                return False
            # Noted first: what changes while the page is made has it made once more.
            self._seen = now
            self.page = self._build()
            self.problem = ""
        except Exception as error:
            # Whatever half a file on disk does to the code that reads it: the page stays.
            self.problem = f"{type(error).__name__}: {error}"
        return True

    def _work(self) -> None:
        while not self._end.is_set():
            began = time.monotonic()
            tried = self.look()
            took = time.monotonic() - began
            self._end.wait(max(self._every, SHARE * took if tried else 0.0))


def fingerprint(folders: Sequence[Path]) -> str:
    """Return a hash of names, sizes and times of change of what a page of these folders shows."""
    made = hashlib.sha256()
    for line in sorted(line for folder in folders for line in _states(folder)):
        made.update(line.encode(errors="surrogateescape") + b"\n")
    return made.hexdigest()


def _states(folder: Path) -> Iterator[str]:
    for place, inside, files in os.walk(folder):
        inside[:] = [name for name in inside if name not in PASSED_BY]
        for name in READ:
            if name in files:
                file = Path(place) / name
                try:
                    found = file.stat()
                except OSError:
                    # Replaced or removed in this moment; the next look sees what is there.
                    continue
                yield f"{file} {found.st_size} {found.st_mtime_ns}"
