"""The rendezvous of clients that train together: who waits, who goes on, and what may go wrong."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from fedkd.clients.local import FitResult, fit
from fedkd.engine.cohort import DroppedError, Meeting, Seats
from fedkd.engine.executors import Cohort
from fedkd.engine.executors.base import Homed
from fedkd.engine.executors.cohort import LARGEST, Part, alike, parted
from fedkd.engine.executors.process import DeadWorkerError, cannot_fork
from fedkd.errors import RunError


@pytest.fixture
def seats() -> Iterator[Seats]:
    made = Seats()
    yield made
    made.close()


class Log:
    """Answers every question with its double, and notes who asked together."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def __call__(self, questions: list[int]) -> list[int | Exception]:
        self.asked.append(list(questions))
        return [ValueError("odd") if q % 2 else 2 * q for q in questions]


def ask(seats: Seats, question: int) -> int:
    guest = seats.guest
    assert guest is not None
    answer: int = guest.ask(question)
    return answer


@pytest.mark.parametrize("places", [1, 2, 3, 50])
def test_guests_ask_as_often_as_they_like(seats: Seats, places: int) -> None:
    def work(index: int) -> int:
        return sum(ask(seats, 10 * index) for _ in range(index % 4))

    log = Log()
    outcomes = Meeting[int, int](work, 10, places, seats).hold(log)
    assert [o.get() for o in outcomes] == [20 * k * (k % 4) for k in range(10)]
    asked = [[10 * k for k in range(10) if k % 4 > turn] for turn in range(3)]
    assert log.asked == asked, "together, in their order"
    assert seats.guest is None


@pytest.mark.parametrize("places", [1, 3])
def test_what_one_raises_or_is_answered_harms_nobody(seats: Seats, places: int) -> None:
    def work(index: int) -> object:
        if index == 0:
            raise KeyError("before")
        if index == 5:
            raise SystemExit(1)
        answer = ask(seats, index)
        if index == 4:
            raise KeyError("after")
        return answer

    log = Log()
    outcomes = Meeting[int, int](work, 7, places, seats).hold(log)
    assert [o.value for o in outcomes] == [None, None, 4, None, None, None, 12]
    assert [type(o.error).__name__ for o in outcomes if o.error] == [
        *("KeyError", "ValueError", "ValueError", "KeyError", "SystemExit")
    ]
    assert "in work" in outcomes[3].traceback, "where the client asked"
    assert log.asked == [[1, 2, 3, 4, 6]]


def test_a_guest_may_go_on_after_an_error_as_an_answer(seats: Seats) -> None:
    def work(index: int) -> int:
        try:
            return ask(seats, 1)
        except ValueError:
            return ask(seats, 2 * index)

    assert [o.get() for o in Meeting[int, int](work, 3, 2, seats).hold(Log())] == [0, 4, 8]


def test_no_more_than_places_run_at_a_time(seats: Seats) -> None:
    lock, running, most = threading.Lock(), [0], [0]

    def busy() -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        threading.Event().wait(0.002)
        with lock:
            running[0] -= 1

    def work(index: int) -> None:
        busy()
        ask(seats, 2)
        busy()

    Meeting[int, int](work, 12, 3, seats).hold(Log())
    assert most == [3]


def test_threads_are_reused(seats: Seats) -> None:
    names = set()

    def work(index: int) -> None:
        names.add(threading.get_ident())
        ask(seats, index * 2)

    for _ in range(3):
        Meeting[int, int](work, 5, 2, seats).hold(Log())
    assert len(names) == 5


def interrupt(_: object) -> None:
    raise KeyboardInterrupt


def test_an_interrupt_in_the_middle_of_an_answer_drops_everybody(seats: Seats) -> None:
    left: list[str] = []

    def work(index: int) -> None:
        try:
            ask(seats, 0)
        except Exception:
            left.append("told")
        finally:
            left.append("gone")

    with pytest.raises(KeyboardInterrupt):
        Meeting[int, int](work, 4, 2, seats).hold(interrupt)  # type: ignore[arg-type]
    assert until(lambda: left == ["gone"] * 4)
    assert [o.get() for o in Meeting[int, int](lambda i: i, 3, 2, seats).hold(Log())] == [0, 1, 2]


def test_an_interrupt_of_a_guest_goes_through(seats: Seats) -> None:
    def work(index: int) -> None:
        ask(seats, 2)
        if index == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Meeting[int, int](work, 4, 2, seats).hold(Log())


def test_ctrl_c_does_not_wait_for_those_who_run(seats: Seats) -> None:
    go_on, dropped = threading.Event(), threading.Event()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def work(index: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        go_on.wait(30)
        try:
            ask(seats, 0)
        except DroppedError:
            dropped.set()
            raise

    try:
        with pytest.raises(KeyboardInterrupt):
            Meeting[int, int](work, 1, 1, seats).hold(Log())
    finally:
        signal.signal(signal.SIGINT, before)
    go_on.set()
    assert dropped.wait(10)


def until(true: Callable[[], bool]) -> bool:
    for _ in range(1000):
        if true():
            return True
        threading.Event().wait(0.01)
    return False


def test_parts_follow_from_costs_alone() -> None:
    assert parted([]) == []
    assert parted([9, 1, 1]) == [[0, 1, 2]]
    assert parted([8, 7, 6, 5, 4, 3, 2, 1]) == [[0, 3, 5, 7], [1, 2, 4, 6]]
    assert parted([70, 47, 29, 22, 19, 16, 10, 7]) == [[0, 5], [1, 2, 3, 4, 6, 7]], "steps count"
    assert [len(part) for part in parted([1.0] * 128)] == [LARGEST] * 4
    assert [len(part) for part in parted([0.0] * 64)] == [16] * 4, "work of no cost is shared too"
    assert max(len(part) for part in parted([1000.0] * 2 + [1.0] * 100)) == LARGEST
    assert sorted(i for part in parted(range(77)) for i in part) == list(range(77))


def test_fits_of_equal_keys_are_one_stack() -> None:
    assert alike([]) == []
    assert alike(["a", "b", None, "a", None]) == [[0, 3], [1], [2], [4]]


def test_a_fit_outside_of_an_exchange_is_the_one_loop() -> None:
    executor = Cohort(workers=1)
    assert executor.fitter == executor.fitter
    assert executor.fitter is not fit
    found = executor.fitter(None, [], [], None, 0.1, None)  # type: ignore[arg-type]
    assert found == FitResult(0, 0)
    executor.close()


def test_a_defect_of_the_stack_is_an_error_of_each_of_its_clients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(requests: object) -> None:
        raise MemoryError("too large")

    monkeypatch.setattr("fedkd.clients.stacked.request.key", lambda request: "same")
    monkeypatch.setattr("fedkd.clients.stacked.request.stacked", broken)
    executor = Cohort(workers=2)
    fitter = executor.fitter
    outcomes = executor.map(
        lambda item: fitter(None, [item], [], None, 0.1, None),  # type: ignore[arg-type,list-item]
        range(3),
        [1, 1, 1],
    )
    assert {type(o.error) for o in outcomes} == {RunError}
    assert "the fits of 3 clients at once failed: MemoryError('too large')" in str(
        outcomes[0].error
    )
    assert outcomes[0].error is not outcomes[1].error
    executor.close()


@pytest.mark.parametrize("kind", [lambda r: vars(1), lambda r: [], lambda r: sys.exit(3)])
def test_a_fit_that_cannot_tell_its_kind_is_done_alone(
    kind: Callable[[object], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedkd.clients.stacked.request.key", kind)
    executor = Cohort(workers=2)
    fitter = executor.fitter
    outcomes = executor.map(
        lambda item: fitter(None, [], [], None, 0.1, None),  # type: ignore[arg-type]
        range(3),
        [1, 1, 1],
    )
    executor.close()
    assert [o.get() for o in outcomes] == [FitResult(0, 0)] * 3


@pytest.mark.parametrize(("kind", "found"), [("same", RunError), (None, SystemExit)])
def test_a_fit_that_leaves_the_program_is_an_error_of_its_clients(
    kind: str | None, found: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedkd.clients.stacked.request.key", lambda request: kind)
    monkeypatch.setattr("fedkd.clients.stacked.request.stacked", lambda requests: sys.exit(3))
    monkeypatch.setattr("fedkd.engine.executors.cohort.fit", lambda *args: sys.exit(3))
    executor = Cohort(workers=2)
    fitter = executor.fitter
    outcomes = executor.map(
        lambda item: fitter(None, [item], [], None, 0.1, None),  # type: ignore[arg-type,list-item]
        range(3),
        [1, 1, 1],
    )
    executor.close()
    assert [type(o.error) for o in outcomes] == [found] * 3


forks = pytest.mark.skipif(bool(cannot_fork()), reason=cannot_fork())


class Pids:
    """Work whose result tells where it was done."""

    def __call__(self, item: int) -> tuple[int, int]:
        if item < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return item, os.getpid()


@forks
def test_parts_are_done_in_processes_that_are_kept() -> None:
    executor, work = Cohort(workers=2), Pids()
    assert not executor.shares_memory
    found = [o.get() for o in executor.map(work, range(16), [1.0] * 16)]
    assert [item for item, _ in found] == list(range(16))
    assert len({pid for _, pid in found} | {os.getpid()}) == 3
    again = [o.get() for o in executor.map(work, range(16), [1.0] * 16)]
    assert {pid for _, pid in again} == {pid for _, pid in found}
    executor.close()


def test_one_worker_needs_no_process() -> None:
    executor = Cohort(workers=1)
    assert executor.shares_memory
    assert {o.get()[1] for o in executor.map(Pids(), range(16), [1.0] * 16)} == {os.getpid()}
    executor.close()


@forks
def test_threads_of_before_a_fork_are_not_waited_for() -> None:
    executor = Cohort(workers=2)
    executor.meet(lambda item: item, Part(0, (1, 2)))
    found = executor.map(lambda item: 2 * item, range(8), [1.0] * 8)
    assert [o.get() for o in found] == list(range(0, 16, 2))
    executor.close()


@forks
def test_a_dead_worker_says_whose_work_it_did() -> None:
    executor = Cohort(workers=2)
    with pytest.raises(DeadWorkerError, match="for 4 clients at once was killed by signal 9") as e:
        executor.map(Pids(), [0, 1, -1, 3, 4, 5, 6, 7], [1.0] * 8)
    assert e.value.index in (0, 1, 2, 3)
    executor.close()


@forks
def test_what_cannot_travel_back_is_an_error_of_each_client_of_the_part() -> None:
    executor = Cohort(workers=2)
    found = executor.map(lambda item: lambda: item, range(8), [1.0] * 8)
    assert all(o.error is not None for o in found)
    executor.close()


def test_a_part_is_named_by_its_clients() -> None:
    assert Part(0, (Homed(3), Homed(5))).whose == "the work of 3, the work of 5"


@forks
def test_only_what_cannot_travel_back_is_an_error() -> None:
    executor = Cohort(workers=2)
    found = executor.map(lambda item: (lambda: item) if item == 3 else item, range(8), [1.0] * 8)
    assert [k for k, o in enumerate(found) if o.error is not None] == [3]
    assert [o.get() for k, o in enumerate(found) if k != 3] == [0, 1, 2, 4, 5, 6, 7]
    executor.close()
