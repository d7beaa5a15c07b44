"""What the machine says of itself while a contender runs: whose CPU time it was, whose memory.

Read from Linux' ``/proc``. Elsewhere there is none: then nothing is dropped and no memory is told.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
BUSY = (0, 1, 2, 5, 6)
"""Columns of ``/proc/stat`` that are work: user, nice, system, irq, softirq."""
STEAL = 7


@dataclass(frozen=True)
class Reading:
    """CPU seconds since the machine began: of all, taken by the hypervisor, of our process tree."""

    at: float
    busy: float
    steal: float
    own: float


@dataclass(frozen=True)
class Load:
    """What happened between two readings: cores that our own kept busy, others' shares of all."""

    cores: float
    foreign: float
    steal: float

    @property
    def total(self) -> float:
        """The share of the machine's CPU time that was not to be had."""
        return self.foreign + self.steal


class Machine:
    """The machine's counters, as far as ``root`` has them."""

    def __init__(self, root: Path = PROC) -> None:
        self.root = root
        self.known = (root / "stat").is_file() and (root / "self" / "stat").exists()
        self._tick = os.sysconf("SC_CLK_TCK") if self.known else 100
        self._cpus = _allowed()

    def read(self, pid: int) -> Reading | None:
        """Return the counters, ``pid`` and all below it being our own; None: there are none."""
        if not self.known:
            return None
        busy = steal = 0.0
        for line in (self.root / "stat").read_text(encoding="ascii").splitlines():
            name, *columns = line.split()
            if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in self._cpus:
                ticks = [int(c) for c in columns]
                busy += sum(ticks[i] for i in BUSY if i < len(ticks))
                steal += ticks[STEAL] if len(ticks) > STEAL else 0
        own = sum(self._ticks(p) for p in {*self.tree(pid), os.getpid()})
        return Reading(time.perf_counter(), *(n / self._tick for n in (busy, steal, own)))

    def load(self, before: Reading | None, after: Reading | None) -> Load | None:
        """Return what happened in between."""
        if before is None or after is None:
            return None
        wall = max(after.at - before.at, 1e-9)
        own, busy = after.own - before.own, after.busy - before.busy
        every = wall * max(1, len(self._cpus))
        return Load(own / wall, max(0.0, busy - own) / every, (after.steal - before.steal) / every)

    def tree(self, pid: int) -> list[int]:
        """Return a process and all that descend from it."""
        children: dict[int, list[int]] = {}
        for entry in self.root.iterdir():
            if entry.name.isdigit():
                fields = self._stat(int(entry.name))
                if fields:
                    children.setdefault(int(fields[1]), []).append(int(entry.name))
        found = [pid]
        for each in found:
            found += children.get(each, [])
        return found

    def pss(self, pid: int) -> float:
        """Return the MiB that a process tree holds; shared pages count by their share."""
        total = 0
        for each in self.tree(pid):
            try:
                text = (self.root / str(each) / "smaps_rollup").read_text(encoding="ascii")
            except OSError:
                # It ended, or is not ours to look at.
                continue
            total += sum(int(row.split()[1]) for row in text.splitlines() if row[:4] == "Pss:")
        return total / 1024

    @contextmanager
    def peak(self, pid: int, every: float = 0.02) -> Iterator[list[float]]:
        """Give a list that holds the largest :meth:`pss` seen while the block runs."""
        most, end = [0.0], threading.Event()

        def look() -> None:
            while not end.is_set():
                most[0] = max(most[0], self.pss(pid))
                end.wait(every)

        if not self.known:
            yield most
            return
        watcher = threading.Thread(target=look, name="fedkd-bench-memory", daemon=True)
        watcher.start()
        try:
            yield most
        finally:
            end.set()
            watcher.join()

    def _stat(self, pid: int) -> list[str]:
        """Return the fields of ``/proc/PID/stat`` from the state on; none if it ended."""
        try:
            text = (self.root / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return []
        # The name, in brackets, may hold blanks.
        return text.rpartition(")")[2].split()

    def _ticks(self, pid: int) -> int:
        fields = self._stat(pid)
        # Its own user and system time, and those of its children that have ended.
        return sum(int(n) for n in fields[11:15]) if fields else 0


def _allowed() -> frozenset[int]:
    """Return the numbers of the cores that we may use."""
    try:
        return frozenset(os.sched_getaffinity(0))
    except AttributeError:
        return frozenset(range(os.cpu_count() or 1))
