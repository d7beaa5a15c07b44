"""Many clients' fits at once: clients run as always, and wait for one another where they train.

Each client has a thread, but only a few of them run at a time: who has to wait, or is done, lets
the next one go on. When nobody can go on, all fits that are waited for are done together. So a
client's code needs to know nothing of the others, and what one of them raises is its own.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import torch

from fedkd.engine.executors.base import Outcome, attempt

Q = TypeVar("Q")
A = TypeVar("A")


class DroppedError(BaseException):
    """The exchange was broken off; no error of the client, which has nothing to note down."""


def _taken() -> threading.Lock:
    """Return a lock that one thread waits for and another lets go."""
    lock = threading.Lock()
    lock.acquire()
    return lock


@dataclass(eq=False)
class Guest(Generic[Q, A]):
    """One client in an exchange: what it asks for, and the answer that it goes on with."""

    index: int
    meeting: Meeting[Q, A]
    question: Q | None = None
    answer: A | Exception | SystemExit | None = None
    begun: bool = False
    baton: threading.Lock = field(default_factory=_taken)

    def ask(self, question: Q) -> A:
        """Wait for the answer to a question, in this client's own thread.

        Raises:
            Exception: what came instead of an answer.
            DroppedError: the exchange was broken off meanwhile.
        """
        self.question = question
        self.meeting.pause(self)
        self.baton.acquire()
        self.question, answer, self.answer = None, self.answer, None
        if self.meeting.dropped:
            raise DroppedError
        if isinstance(answer, Exception | SystemExit):
            raise answer
        return answer  # type: ignore[return-value]


class Meeting(Generic[Q, A]):
    """One exchange: guests run, at most ``places`` at a time, until each is done or waits.

    Args:
        work: does what the guest of an index has to do.
        guests: how many there are.
        places: how many run at a time.
        seats: the threads that they run in.
    """

    def __init__(self, work: Callable[[int], Any], guests: int, places: int, seats: Seats) -> None:
        self.work, self.places, self.seats = work, places, seats
        self.outcomes: dict[int, Outcome[Any]] = {}
        self.fatal: BaseException | None = None
        self.dropped = False
        self._guests = [Guest[Q, A](index, self) for index in range(guests)]
        self._ready, self._waiting = deque(self._guests), list[Guest[Q, A]]()
        self._running = 0
        self._lock, self._nobody_can = threading.Lock(), _taken()

    def hold(
        self, answer: Callable[[list[Q]], Sequence[A | Exception | SystemExit]]
    ) -> list[Outcome[Any]]:
        """Return what became of all; ``answer`` answers what is asked, in order of the guests.

        Raises:
            KeyboardInterrupt: at once; guests that wait are dropped, the others when they ask.
        """
        try:
            self._go_on()
            while self._waiting:
                asking = sorted(self._waiting, key=lambda guest: guest.index)
                answers = answer([guest.question for guest in asking])  # type: ignore[misc]
                for guest, given in zip(asking, answers, strict=True):
                    guest.answer = given
                self._waiting = []
                self._ready.extend(asking)
                self._go_on()
        except BaseException:
            self._drop()
            raise
        return [self.outcomes[index] for index in range(len(self._guests))]

    def pause(self, guest: Guest[Q, A]) -> None:
        """Let somebody else run: this guest waits."""
        with self._lock:
            if self.dropped:
                raise DroppedError
            self._waiting.append(guest)
            following = self._next()
        if following is not None:
            self._let_run(following)

    def run(self, guest: Guest[Q, A]) -> Guest[Q, A] | None:
        """Do a guest's work to its end; return one that has not begun, for the same thread."""
        try:
            self.outcomes[guest.index] = attempt(self.work, guest.index)
        except DroppedError:
            return None
        except BaseException as error:
            self.fatal = error
        with self._lock:
            following = self._next()
        if following is not None and following.begun:
            self._let_run(following)
            return None
        return following

    def _go_on(self) -> None:
        """Let guests run until nobody can."""
        with self._lock:
            first = [self._ready.popleft() for _ in range(min(self.places, len(self._ready)))]
            self._running = len(first)
        for guest in first:
            self._let_run(guest)
        if first:
            self._nobody_can.acquire()
        if self.fatal is not None:
            raise self.fatal

    def _next(self) -> Guest[Q, A] | None:
        """Return who takes a place that has become free; the lock is held."""
        if self._ready and self.fatal is None and not self.dropped:
            return self._ready.popleft()
        self._running -= 1
        if self._running == 0:
            self._nobody_can.release()
        return None

    def _let_run(self, guest: Guest[Q, A]) -> None:
        if guest.begun:
            guest.baton.release()
        else:
            self.seats.seat(guest)

    def _drop(self) -> None:
        with self._lock:
            self.dropped = True
        for guest in self._guests:
            if guest.begun and guest.index not in self.outcomes:
                with suppress(RuntimeError):  # It does not wait: it is dropped when it asks.
                    guest.baton.release()


class Seats:
    """The threads in which guests run, kept from exchange to exchange."""

    def __init__(self) -> None:
        self._free: list[_Seat] = []
        self._all: list[_Seat] = []
        self._here = _Here()
        weakref.finalize(self, _dismiss, self._all)

    @property
    def guest(self) -> Guest[Any, Any] | None:
        """The guest that runs in the calling thread."""
        return self._here.guest

    def seat(self, guest: Guest[Any, Any]) -> None:
        """Let a guest begin, in a thread that is free or a new one."""
        guest.begun = True
        try:
            seat = self._free.pop()
        except IndexError:
            seat = _Seat(self._free, self._here)
            self._all.append(seat)
            seat.start()
        seat.guests.put(guest)

    def close(self) -> None:
        """End each thread when it is free; nobody can be seated any more."""
        _dismiss(self._all)


def _dismiss(seats: list[_Seat]) -> None:
    while seats:
        seats.pop().guests.put(None)


class _Here(threading.local):
    guest: Guest[Any, Any] | None = None


class _Seat(threading.Thread):
    """A thread that runs one guest after the other; nobody has to wait for it at the end."""

    def __init__(self, free: list[_Seat], here: _Here) -> None:
        super().__init__(name="fedkd client", daemon=True)
        self.guests: SimpleQueue[Guest[Any, Any] | None] = SimpleQueue()
        self._vacant, self._here = free, here

    def run(self) -> None:
        # The number of torch threads belongs to a thread as well as to the process.
        torch.set_num_threads(1)
        while (guest := self.guests.get()) is not None:
            while guest is not None:
                guest.begun = True
                self._here.guest = guest
                guest = guest.meeting.run(guest)
            self._here.guest = None
            self._vacant.append(self)
