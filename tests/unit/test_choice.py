"""What ``auto`` means: the experiment decides where results differ, the machine where not."""

import dataclasses

import pytest
import torch
from torch import nn

from fedkd.engine.executors import (
    Cohort,
    Processes,
    Serial,
    Threads,
    choice,
    choose,
    make_executor,
    process,
)
from fedkd.engine.executors.choice import per_operation
from fedkd.engine.setup import prepare
from fedkd.errors import ConfigError
from fedkd.models.book import ModelBook


def name(made, cores, monkeypatch, workers=None):
    monkeypatch.setattr(choice, "cores", lambda: cores)
    return choose(made, workers).name


@pytest.mark.parametrize("cores", [1, 2, 64])
def test_a_stack_is_chosen_on_every_machine_or_on_none(cores, tiny, monkeypatch):
    assert name(prepare(tiny("fedavg")), cores, monkeypatch) == "cohort"
    assert name(prepare(tiny("fedavg")), cores, monkeypatch, workers=1) == "cohort"
    for other in (
        prepare(tiny("fedavg", {"clients.participation.ratio": 0.75})),
        prepare(tiny("fedgen")),
        prepare(tiny("fedavg", {"model": "cnn"})),
        prepare(tiny("fedavg", {"clients.models": ["mlp", "cnn"], "strategy": "local-only"})),
        prepare(tiny("fedavg", {"clients.training.precision": "bf16"})),
        prepare(tiny("centralized")),
    ):
        assert name(other, cores, monkeypatch) != "cohort"


def test_the_machine_decides_between_those_that_agree_to_the_bit(tiny, monkeypatch):
    few = prepare(tiny("fedavg", {"clients.participation.ratio": 0.5}))
    assert name(few, 1, monkeypatch) == "serial"
    assert name(few, 2, monkeypatch, workers=1) == "serial"
    assert name(few, 2, monkeypatch) == "process"
    assert name(few, 1, monkeypatch, workers=2) == "process"
    monkeypatch.setattr(process.sys, "platform", "darwin")
    assert name(few, 2, monkeypatch) == "thread"


def test_processes_are_forked_only_where_there_is_no_cuda(tiny, monkeypatch):
    few = prepare(tiny("fedavg", {"clients.participation.ratio": 0.5}))
    there = dataclasses.replace(few, device=torch.device("cuda"))
    assert name(there, 2, monkeypatch) == "thread"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert name(few, 2, monkeypatch) == "thread"


def test_large_operations_and_unknown_work_get_threads(tiny, monkeypatch):
    assert name(None, 1, monkeypatch) == "serial"
    assert name(None, 2, monkeypatch) == "thread"
    wide = {"model.hidden": [512, 512], "clients.participation.ratio": 0.5}
    assert name(prepare(tiny("fedavg", {**wide})), 2, monkeypatch) == "process"
    wide["clients.training.batch_size"] = 128
    assert name(prepare(tiny("fedavg", {**wide})), 2, monkeypatch) == "thread"
    assert name(prepare(tiny("centralized")), 2, monkeypatch) == "thread"


def test_double_precision_is_chosen_for_too(tiny):
    made = prepare(tiny("fedavg", {"model": "cnn"}))
    book = made.setting.book
    double = ModelBook(book.task, book.specs, book.seed, torch.float64)
    setting = dataclasses.replace(made.setting, book=double)
    assert choose(dataclasses.replace(made, setting=setting), 2).name == choose(made, 2).name


def test_arithmetic_of_an_operation():
    net = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    # Two products, each with a transposed weight, an activation, four parameters.
    assert per_operation(net, torch.zeros(4, 2, 3)) == pytest.approx(2 * 4 * (30 + 10) / 9)
    conv = nn.Conv2d(1, 3, 3)
    # A convolution and its two parameters.
    assert per_operation(conv, torch.zeros(2, 1, 5, 5)) == pytest.approx(2 * 2 * 3 * 9 * 9 / 3)


@pytest.mark.parametrize("cores", [1, 3])
def test_auto_makes_what_was_chosen(cores, tiny, monkeypatch):
    monkeypatch.setattr(choice, "cores", lambda: cores)
    whole = prepare(tiny("fedavg"))
    few = prepare(tiny("fedavg", {"clients.participation.ratio": 0.5}))
    assert make_executor("auto", None, whole) == Cohort()
    assert make_executor("auto", 2, whole) == Cohort(workers=2)
    assert make_executor("auto", 1, few) == Serial()
    assert make_executor("auto", 2, few) == Processes(workers=2)
    assert make_executor("auto", None, few) == (Serial() if cores == 1 else Processes())
    assert make_executor("auto") == (Serial() if cores == 1 else Threads())
    assert make_executor("auto", 2) == Threads(workers=2)


def test_every_choice_says_why(tiny):
    for made in (None, prepare(tiny("fedavg")), prepare(tiny("fedavg", {"rounds": 1}))):
        assert len(choose(made).why) > 10
    assert (
        "2 clients, fewer than 4"
        in choose(prepare(tiny("fedavg", {"clients.participation.ratio": 0.5}))).why
    )


def test_wrong_numbers_of_workers_are_refused(tiny):
    with pytest.raises(ConfigError, match="workers = -1"):
        make_executor("auto", -1, prepare(tiny("fedavg")))


def test_choosing_leaves_no_threads_that_a_fork_would_lose(tiny, monkeypatch):
    few, used = prepare(tiny("fedavg", {"clients.participation.ratio": 0.5})), []
    known = choice.per_operation
    monkeypatch.setattr(
        choice, "per_operation", lambda *a: used.append(torch.get_num_threads()) or known(*a)
    )
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        choose(few, 2)
        assert used == [1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
