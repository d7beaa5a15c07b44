"""Forked workers: what crosses between processes, and how they end."""

from __future__ import annotations

import copy
import ctypes
import logging
import os
import re
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ConfigRecord, Context, Message, RecordDict

from fedkd.engine.contexts import FIRST_NODE_ID, Task
from fedkd.engine.executors import Homed, Processes
from fedkd.engine.executors.channel import Channel, address, pack
from fedkd.engine.executors.process import DeadWorkerError
from fedkd.engine.executors.shares import Shares
from fedkd.engine.grid import LocalGrid
from fedkd.engine.simulate import in_process

ONES = [1.0] * 6


@pytest.fixture
def crew() -> Iterator[Processes]:
    executor = Processes(workers=2)
    yield executor
    executor.close()


def pid(_: object) -> int:
    return os.getpid()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def pids(crew: Processes) -> set[int]:
    return {o.get() for o in crew.map(pid, range(6), ONES)}


def test_workers_are_kept_and_leave_nothing_behind(crew: Processes) -> None:
    first, second = pids(crew), pids(crew)
    assert len(first) == 2
    assert first == second
    assert os.getpid() not in first
    crew.close()
    assert not any(map(alive, first))
    assert len(pids(crew)) == 2


def test_a_forgotten_executor_ends_its_workers() -> None:
    executor = Processes(workers=2)
    workers = pids(executor)
    del executor
    assert not any(map(alive, workers))


def test_there_are_no_more_workers_than_pieces(crew: Processes) -> None:
    assert len({o.get() for o in crew.map(pid, [0], [1.0])}) == 1
    assert len(pids(crew)) == 2


def test_another_function_gets_workers_that_know_it(crew: Processes) -> None:
    before = pids(crew)
    limit = 5
    assert [o.get() for o in crew.map(lambda x: x + limit, [1, 2], [1, 1])] == [6, 7]
    assert not any(map(alive, before))


class StubbornError(Exception):
    """Cannot be read by another process: it needs two arguments."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


def test_errors_and_values_that_cannot_travel_are_told_of(crew: Processes) -> None:
    def work(item: int) -> object:
        if item == 0:
            raise StubbornError("no", "way")
        return (lambda: item) if item == 1 else item

    outcomes = crew.map(work, [0, 1, 2], [1, 1, 1])
    assert repr(outcomes[0].error) == repr(StubbornError("no", "way"))
    assert 'raise StubbornError("no", "way")' in outcomes[0].traceback
    assert "lambda" in repr(outcomes[1].error)
    assert outcomes[2].get() == 2


@dataclass(frozen=True)
class Piece(Homed):
    own: np.ndarray
    shared: np.ndarray


def test_arrays_keep_values_order_and_permission(crew: Processes) -> None:
    shared = np.asfortranarray(np.arange(20_000.0).reshape(100, 200))
    shared.flags.writeable = False
    pieces = [Piece(home=k, own=np.full((3, 2, k), k), shared=shared) for k in range(6)]

    def work(piece: Piece) -> tuple[np.ndarray, np.ndarray, bool]:
        piece.own[:] += 1
        return piece.own, piece.shared, piece.shared.flags.writeable

    for k, outcome in enumerate(crew.map(work, pieces, ONES)):
        own, same, writable = outcome.get()
        assert np.array_equal(own, np.full((3, 2, k), k + 1))
        assert own.flags.writeable
        assert np.array_equal(same, shared)
        assert same.flags.f_contiguous
        assert not writable
        assert np.array_equal(pieces[k].own, np.full((3, 2, k), k)), "the parent's own"


def test_what_several_pieces_hold_is_sent_to_a_worker_once(
    crew: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[list[int]] = []
    send = Channel.send

    def counted(self: Channel, said: object, buffers: tuple[memoryview, ...] = ()) -> None:
        sent.append([buffer.nbytes for buffer in buffers])
        send(self, said, buffers)

    monkeypatch.setattr(Channel, "send", counted)
    shared = np.zeros(1000)
    pieces = [Piece(home=k, own=np.zeros(5 + k), shared=shared) for k in range(6)]
    crew.map(lambda piece: float(piece.shared.sum()), pieces, ONES)
    sizes = [size for message in sent for size in message]
    assert sizes.count(8000) == 2, "once for each worker"
    assert sorted(set(sizes) - {8000}) == [40, 48, 56, 64, 72, 80]


def test_clients_come_back_to_the_worker_that_has_their_data(crew: Processes) -> None:
    pieces = [Piece(home=k, own=np.zeros(1), shared=np.zeros(1)) for k in range(8)]
    costs = [8.0, 7, 6, 5, 4, 3, 2, 1]
    found = []
    # Where the system holds a worker up, the other rightly does its work: not five times in a row.
    for _ in range(5):
        first = [o.get() for o in crew.map(pid, pieces, costs)]
        again = [o.get() for o in crew.map(pid, pieces[::-1], costs[::-1])][::-1]
        same = sum(a == b for a, b in zip(first, again, strict=True))
        found.append((len(set(first)) == 2, same >= 6))
    assert (True, True) in found


def test_plain_flower_arrays_and_tensors_travel() -> None:
    array = Array(np.arange(6.0).reshape(2, 3))
    packed = pack([array, copy.copy(array), torch.ones(3)])
    assert [b.nbytes for b in packed.buffers] == [len(array.data)] * 2
    assert address(packed.buffers[0]) == address(packed.buffers[1])
    received = [bytes(buffer) for buffer in packed.buffers]
    one, two, tensor = packed.unpack(received)
    assert one == two == array
    assert one.data is received[0], "no copy"
    assert torch.equal(tensor, torch.ones(3))


def test_large_and_empty_messages_go_through_a_channel() -> None:
    ours, theirs = Channel.pair()
    answer = Processes(workers=1).map(lambda n: np.ones((n, 100_000)), [30, 0], [1, 1])
    assert [o.get().shape for o in answer] == [(30, 100_000), (0, 100_000)]
    theirs.close()
    with pytest.raises(EOFError):
        ours.receive()
    ours.close()


def test_what_a_client_logs_is_logged_here(
    crew: Processes, caplog: pytest.LogCaptureFixture
) -> None:
    def work(item: int) -> None:
        try:
            raise ValueError("of no use")
        except ValueError:
            logging.getLogger("a.client").warning("client %d says", item, exc_info=item == 1)

    with caplog.at_level(logging.INFO):
        crew.map(work, range(3), ONES[:3])
    assert sorted(r.getMessage().split("\n")[0] for r in caplog.records) == [
        f"client {k} says" for k in range(3)
    ]
    assert caplog.text.count("ValueError: of no use") == 1
    assert {r.name for r in caplog.records} == {"a.client"}


@pytest.mark.parametrize(
    ("end", "says"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), r"killed by signal 9 \(out of memory\?\)"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), "killed by signal 15"),
        (lambda: os._exit(3), "ended with exit code 3"),
    ],
)
def test_a_dead_worker_is_said_so_and_ends_the_others(crew: Processes, end, says: str) -> None:
    workers = list[int]()

    def work(item: int) -> int:
        if item == 4:
            end()
        return os.getpid()

    with pytest.raises(DeadWorkerError, match=says) as caught:
        crew.map(work, range(6), [1.0, 1, 1, 1, 9, 1])
    assert caught.value.index == 4
    workers += [o.get() for o in crew.map(work, range(4), ONES[:4])]
    crew.close()
    assert not any(map(alive, workers))


def test_work_that_has_a_process_of_its_own_does_not_hide_its_death(crew: Processes) -> None:
    def work(item: int) -> None:
        if item == 1:
            if os.fork() == 0:
                time.sleep(30)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedkd.engine.executors.process.PATIENCE", 0.2)
        with pytest.raises(DeadWorkerError, match="signal 9"):
            crew.map(work, range(3), ONES[:3])


@pytest.mark.parametrize("with_signal", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_workers_end_with_their_parent(with_signal: signal.Signals, tmp_path) -> None:
    def work(item: int) -> None:
        (tmp_path / str(os.getpid())).touch()
        time.sleep(60)

    parent = os.fork()
    if parent == 0:
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            Processes(workers=2).map(work, range(4), ONES[:4])
        finally:
            os._exit(9)
    workers = until(lambda: len(f := list(tmp_path.iterdir())) == 2 and [int(x.name) for x in f])
    assert all(map(alive, workers))
    os.kill(parent, with_signal)
    os.waitpid(parent, 0)
    assert until(lambda: not any(map(alive, workers)))


def until(true):
    """Wait until something is true, and return it."""
    end = time.monotonic() + 30
    while not (found := true()) and time.monotonic() < end:
        time.sleep(0.02)
    return found


def test_shares_are_longest_first_at_home_where_that_is_fair() -> None:
    assert Shares([5, 1, 4, 2], 2).left == [[0, 1], [2, 3]]
    assert Shares([5, 1, 4, 2], 2, [1, 1, 0, 0]).left == [[2, 3], [0, 1]]
    costs = [5.0, 5.0, 1.0, 1.0]
    crowded = Shares(costs, 2, [0, 0, 0, 0]).left
    assert sorted(sum(costs[i] for i in part) for part in crowded) == [6, 6]
    assert Shares([1, 1, 1], 2, [7, 7, 7]).left == [[0, 2], [1]], "a worker that is no more"


@pytest.mark.parametrize("cost", [1.0, 0.0])
def test_shares_come_in_few_batches_and_who_is_done_helps(cost: float) -> None:
    shares = Shares([cost] * 100, 2)
    own = [shares.take(0) for _ in range(8)]
    assert [len(batch) for batch in own] == [37, 9, 3, 1, 1, 1, 1, 1]
    helped = {index for batch in own for index in batch} - set(range(0, 100, 2))
    assert helped == {99, 97, 95, 93}, "the last of the other's"
    left = []
    while batch := shares.take(1):
        left += batch
    assert sorted(left) == sorted(set(range(1, 100, 2)) - helped)
    assert shares.take(0) == []


def test_a_client_has_one_torch_thread_whatever_it_asks_for() -> None:
    def in_parallel(item: int) -> tuple[int, float]:
        torch.set_num_threads(2)
        return torch.get_num_threads(), float(torch.ones(200_000).sin().sum())

    def forks() -> None:
        # As torch is in a program that used several threads before: its pool is not forked.
        torch.set_num_threads(2)
        torch.ones(200_000).sin().sum()
        crew = Processes(workers=2)
        found = [o.get() for o in crew.map(in_parallel, range(2), ONES[:2])]
        crew.close()
        assert [threads for threads, _ in found] == [1, 1]
        assert torch.get_num_threads() == 2

    assert in_child(forks) == 0


def in_child(work: Callable[[], None]) -> int:
    """Run something in a fork of its own; return its exit code, a signal's where it hangs."""
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_openmp_is_held_at_one_thread(crew: Processes) -> None:
    def threads(item: int) -> list[object]:
        maps = Path("/proc/self/maps").read_text()
        loaded = set(re.findall(r"/\S*/libg?omp\S*", maps))
        told = [ctypes.CDLL(path).omp_get_max_threads() for path in loaded]
        return [os.environ["OMP_NUM_THREADS"], *told]

    assert set(crew.map(threads, [0], [1])[0].get()) <= {"1", 1}


def test_a_long_silence_names_those_who_are_at_work(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fedkd.engine.executors.process.PATIENCE", 0.05)
    monkeypatch.setattr("fedkd.engine.executors.process.SILENCE", 0.1)
    crew, tasks = Processes(workers=2), [Task(FIRST_NODE_ID + 7, (), RecordDict()), "plain"]
    crew.map(lambda item: time.sleep(0.4), tasks, [1, 1])
    crew.close()
    assert caplog.messages
    assert "client 7, piece 1. If they hang" in caplog.messages[0]
    assert "engine.executor = 'thread' or 'serial'" in caplog.messages[0]
    assert len(caplog.messages) <= 3, "twice as long each time"


def test_a_signal_right_after_the_fork_finds_no_code_of_the_parent(
    crew: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork, seen = os.fork, tmp_path / "seen"

    def interrupted() -> int:
        pid = fork()
        if pid == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return pid

    def handler(*_: object) -> None:
        seen.touch()

    before = signal.signal(signal.SIGINT, handler)
    try:
        monkeypatch.setattr(os, "fork", interrupted)
        assert len(pids(crew)) == 2
        assert not seen.exists()
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
        os.kill(os.getpid(), signal.SIGINT)
        assert seen.exists(), "the parent hears again"
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_fork_of_the_program_leaves_its_parents_workers_alone(crew: Processes) -> None:
    workers = pids(crew)

    def forked() -> None:
        assert pids(crew).isdisjoint(workers), "it gets its own"
        crew.close()

    assert in_child(forked) == 0
    assert in_child(crew.close) == 0
    assert pids(crew) == workers


def test_where_torch_is_built_for_gpus_all_workers_are_forked_at_once(
    crew: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    forked, fork = [], os.fork
    monkeypatch.setattr(os, "fork", lambda: forked.append(1) or fork())
    crew.map(pid, [0], [1.0])
    assert len(forked) == 2
    pids(crew)
    assert len(forked) == 2


@pytest.mark.parametrize("values", [(0, False), (1, 1.0), (0.0, -0.0), ([0], [False])])
def test_values_that_are_equal_but_not_the_same_come_back(values: tuple[object, object]) -> None:
    def answer(message: Message, context: Context) -> Message:
        state = context.state
        state["n"] = ConfigRecord({"v": values[1] if "n" in state else values[0]})
        return Message(RecordDict({"n": state["n"]}), reply_to=message)

    crew = Processes(workers=1)
    grid = LocalGrid(answer, 1, executor=crew)
    with in_process():
        for value in (*values, values[1]):
            grid.send_and_receive([Message(RecordDict(), FIRST_NODE_ID, "train")])
            kept = grid.contexts.state(FIRST_NODE_ID)["n"]["v"]
            assert repr(kept) == repr(value)
    crew.close()
