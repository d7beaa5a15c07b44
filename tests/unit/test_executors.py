from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from fedkd.engine.executors import (
    Cohort,
    Executor,
    Outcome,
    Processes,
    Serial,
    Threads,
    attempt,
    cores,
    make_executor,
    one_torch_thread,
)
from fedkd.engine.registries import executors
from fedkd.errors import ConfigError

SIX = range(6)
ONES = [1.0] * 6
KINDS = {
    "serial": Serial(),
    "thread": Threads(workers=3),
    "process": Processes(workers=3),
    "cohort": Cohort(workers=3),
}
every = pytest.mark.parametrize("name", KINDS)
parallel = pytest.mark.parametrize("name", [name for name in KINDS if name != "serial"])


@pytest.fixture
def executor(name: str) -> Iterator[Executor]:
    yield KINDS[name]
    KINDS[name].close()


def train_a_conv_net(client: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(client)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 36, 4)
    )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    x = torch.randn(16, 1, 14, 14, generator=generator)
    y = torch.randint(4, (16,), generator=generator)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@parallel
def test_workers_train_bit_identically_to_serial(executor: Executor) -> None:
    costs = [1.0, 5.0, 2.0, 4.0, 3.0, 6.0]
    with one_torch_thread():
        serial = [o.get() for o in Serial().map(train_a_conv_net, SIX, costs)]
        others = [o.get() for o in executor.map(train_a_conv_net, SIX, costs)]
    assert all(torch.equal(a, b) for a, b in zip(serial, others, strict=True))
    assert not torch.equal(serial[0], serial[1])


def torch_threads(_: int) -> int:
    return torch.get_num_threads()


@every
def test_every_worker_has_one_torch_thread(executor: Executor) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with one_torch_thread():
            inside = torch.get_num_threads()
            seen = [o.get() for o in executor.map(torch_threads, SIX, ONES)]
        assert (inside, set(seen), torch.get_num_threads()) == (1, {1}, 2)
    finally:
        torch.set_num_threads(before)


def test_one_torch_thread_is_undone_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), one_torch_thread():
        raise KeyError
    assert torch.get_num_threads() == before


@every
def test_outcomes_come_in_order_and_errors_harm_nobody(executor: Executor) -> None:
    def work(item: str) -> str:
        if item == "b":
            raise ValueError("bad client")
        if item == "c":
            raise SystemExit(3)
        return 2 * item

    outcomes = executor.map(work, ["a", "b", "c", "d"], [1, 9, 9, 2])
    assert [o.value for o in outcomes] == ["aa", None, None, "dd"]
    assert "ValueError: bad client" in outcomes[1].traceback
    assert "in work" in outcomes[1].traceback
    assert isinstance(outcomes[2].error, SystemExit)
    with pytest.raises(ValueError, match="bad client"):
        outcomes[1].get()
    assert executor.map(work, [], []) == []
    assert [o.get() for o in executor.map(work, "xy", [1, 1])] == ["xx", "yy"]


def test_longest_work_starts_first() -> None:
    started: list[int] = []
    Threads(workers=1).map(started.append, range(4), [1.0, 3.0, 2.0, 3.0])
    assert started == [1, 3, 2, 0]


def test_serial_stays_in_the_callers_thread() -> None:
    outcomes = Serial().map(lambda _: threading.get_ident(), [1, 1], [1, 1])
    assert {o.value for o in outcomes} == {threading.get_ident()}


def test_threads_run_at_the_same_time() -> None:
    executor = Threads(workers=3)
    barrier = threading.Barrier(3, timeout=30)
    outcomes = executor.map(lambda _: barrier.wait(), range(3), [1, 1, 1])
    assert sorted(o.get() for o in outcomes) == [0, 1, 2]
    executor.close()


def test_threads_are_kept_until_they_are_closed() -> None:
    executor = Threads(workers=2)
    before = set(threading.enumerate())

    def work(_: int) -> str:
        return threading.current_thread().name

    for _ in range(2):
        executor.map(work, SIX, ONES)
    mine = set(threading.enumerate()) - before
    assert 1 <= len(mine) <= 2
    executor.close()
    for thread in mine:
        thread.join(10)
    assert not set(threading.enumerate()) & mine
    assert executor.map(work, [0], [1.0])[0].get().startswith("fedkd")
    executor.close()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let SIGINT raise KeyboardInterrupt, which it does not in a process started in background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_drops_what_has_not_started() -> None:
    started: list[int] = []
    go_on = threading.Event()

    def work(index: int) -> None:
        started.append(index)
        if index == 0:
            os.kill(os.getpid(), signal.SIGINT)
        go_on.wait(30)

    with pytest.raises(KeyboardInterrupt):
        Threads(workers=2).map(work, range(20), [1.0] * 20)
    go_on.set()
    assert set(started) <= {0, 1}


@every
def test_keyboard_interrupt_of_a_client_goes_through(executor: Executor) -> None:
    def work(index: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        executor.map(work, [0, 1], [1.0, 1.0])


def test_attempt_says_where_it_failed() -> None:
    outcome: Outcome[int] = attempt(int, "x")
    assert isinstance(outcome.error, ValueError)
    assert attempt(int, "7").get() == 7


def test_registry() -> None:
    assert executors.names() == sorted(KINDS)
    assert make_executor("thread", 3) == Threads(workers=3)
    assert make_executor("process", 3) == Processes(workers=3) != Processes()
    assert make_executor("cohort") == Cohort()


def test_cores_are_those_we_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5, 7}, raising=False)
    assert cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert cores() == 6


@pytest.mark.parametrize(
    ("name", "workers", "says"),
    [
        ("thread", 0, "executor thread.workers = 0"),
        ("serial", 2, "engine.workers = 2: engine.executor = 'serial' has one worker; set"),
        ("threads", None, "did you mean 'thread'"),
        ("aut", None, r"did you mean 'auto'\? \(allowed: auto, cohort, process"),
        ("auto", -1, "workers = -1"),
    ],
)
def test_wrong_choices_are_explained(name: str, workers: int | None, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make_executor(name, workers)
