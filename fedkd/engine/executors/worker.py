"""A forked worker's life: it does what it is sent, says what came of it, ends with its parent.

It was forked with the data and the code in its memory; what it changes there nobody else sees.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from logging.handlers import QueueHandler
from pathlib import Path
from typing import Any, NoReturn

import torch

from fedkd.engine.executors.base import Outcome, attempt
from fedkd.engine.executors.channel import Channel, Packed, pack

ALONE = 0.5
"""Seconds after which a busy worker notices that its parent is gone."""
SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM})
"""What must not run the parent's handlers in a worker; blocked around the fork."""


def live(
    function: Callable[[Any], Any], channel: Channel, parent: int, others: Sequence[Channel]
) -> NoReturn:
    """Serve until the other end closes, and leave the process: the parent's code is not for it.

    Signals are blocked until here; ``others`` are the parent's ends of all channels.
    """
    code = 1
    try:
        _settle(parent)
        for other in others:
            other.close()
        serve(function, channel)
        code = 0
    except (EOFError, OSError):
        code = 0
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def serve(function: Callable[[Any], Any], channel: Channel) -> None:
    """Do batch after batch: each piece is answered by its index, its outcome and its log."""
    told = _Kept()
    told.replace_all()
    slots: dict[int, bytes | bytearray] = {}
    while True:
        order, buffers = channel.receive()
        if order is None:
            return
        if order["fresh"]:
            slots.clear()
        for slot, place in order["slots"]:
            slots[slot] = buffers[place]
        for index, body, places in order["pieces"]:
            mine = [buffers[p] if p >= 0 else slots[-p - 1] for p in places]
            try:
                outcome = attempt(_do, function, Packed(body), mine)
            except BaseException as error:
                channel.send((index, type(error).__name__, told.taken()))
                continue
            answer = _packed(outcome)
            channel.send((index, answer.body, told.taken()), answer.buffers)


def _do(function: Callable[[Any], Any], packed: Packed, buffers: list[Any]) -> Any:
    return function(packed.unpack(buffers))


def _packed(outcome: Outcome[Any]) -> Packed:
    """Pack an outcome; a value that cannot travel is an error of the work.

    Of several pieces done as one only those are that cannot.
    """
    packed = attempt(pack, outcome)
    if packed.error is not None and isinstance(outcome.value, list):
        parts = [one for one in outcome.value if isinstance(one, Outcome)]
        if parts and len(parts) == len(outcome.value):
            return pack(Outcome([_packed(one).unpack() for one in parts]))
    if packed.error is not None:
        return pack(Outcome(error=packed.error, traceback=packed.traceback))
    return packed.get()


def _settle(parent: int) -> None:
    """Make a fork of a program into a worker: its signals, its threads, its memory."""
    # Ctrl-C reaches the whole group: the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    # Collecting what was there before would touch, and so copy, every page of it.
    gc.freeze()
    _hold_threads()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _hold_threads() -> None:
    """Keep torch and OpenMP at one thread: those of the parent's pool are not here.

    GNU's OpenMP would wait for them for ever where client code asks for more than one.
    """
    torch.set_num_threads(1)
    torch.set_num_threads = _one_thread
    # Libraries that are still to be loaded read it, those that are here have to be told.
    os.environ["OMP_NUM_THREADS"] = "1"
    with suppress(OSError):
        maps = Path("/proc/self/maps").read_text()
        for path in sorted(set(re.findall(r"/\S*/lib(?:g|i)?omp[^/\s]*\.so\S*", maps))):
            with suppress(OSError, AttributeError):
                ctypes.CDLL(path).omp_set_num_threads(1)


def _one_thread(nthreads: int) -> None:
    """Stand in for ``torch.set_num_threads`` where a client has one thread, whatever it asks."""


def _end_with(parent: int) -> None:
    """End this process, in the middle of whatever it does, soon after its parent did."""
    while os.getppid() == parent:
        time.sleep(ALONE)
    os._exit(1)


class _Kept(QueueHandler):
    """Keeps what is logged here, for the parent to log it: its handlers may be open files."""

    def __init__(self) -> None:
        super().__init__(None)  # type: ignore[arg-type]
        self.records: list[dict[str, Any]] = []

    def enqueue(self, record: logging.LogRecord) -> None:
        plain = {k: v for k, v in vars(record).items() if isinstance(v, str | int | float | None)}
        self.records.append(plain)

    def replace_all(self) -> None:
        """Take the place of every handler of this process."""
        for logger in logging.root.manager.loggerDict.values():
            if isinstance(logger, logging.Logger) and logger.handlers:
                logger.handlers = [] if logger.propagate else [self]
        logging.root.handlers = [self]

    def taken(self) -> list[dict[str, Any]]:
        """Return what was kept, and keep it no longer."""
        records, self.records = self.records, []
        return records


def log_again(records: list[dict[str, Any]]) -> None:
    """Log what a worker logged, as if it had been logged here."""
    for record in records:
        logging.getLogger(record["name"]).handle(logging.makeLogRecord(record))
