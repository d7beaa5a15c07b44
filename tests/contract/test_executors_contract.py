"""Every strategy gives the same under every executor: to the bit, or as one stacked model."""

import dataclasses
import json
import logging
import os
import signal

import numpy as np
import pytest
import torch
from test_strategies import CASES

from fedkd.clients.client import Client
from fedkd.engine.checkpoint import from_bytes
from fedkd.engine.executors import choose, make_executor
from fedkd.engine.executors.choice import ALONE
from fedkd.engine.folder import RunFolder
from fedkd.engine.setup import prepare
from fedkd.engine.simulation import Run
from fedkd.errors import ConfigError, RunError
from fedkd.strategies.base import strategies

every = pytest.mark.parametrize("strategy", CASES)
TWO = {"rounds": 2, "clients.participation.ratio": 0.75}
WHOLE = {"rounds": 2, "clients.participation.ratio": 1.0}
CLOSE = 1e-4
"""Two rounds of single precision, in which sums of equal numbers were ordered otherwise."""


@pytest.fixture(scope="module")
def under(tiny, play):
    """Return ``under(strategy, executor, workers, **changes)``: a played run, each one once."""
    known = {}

    def get(strategy, executor, workers=1, changes=TWO):
        key = json.dumps([strategy, executor, workers, changes])
        if key not in known:
            engine = {"engine.executor": executor, "engine.workers": workers}
            if executor == "serial":
                engine = {"engine.executor": executor}
            known[key] = play(tiny(strategy, {**changes, **engine}))
            known[key].close()
        return known[key]

    return get


@every
@pytest.mark.parametrize(("executor", "workers"), [("thread", 2), ("process", 3)])
def test_workers_give_the_bits_of_serial(strategy, executor, workers, under, bits, values):
    one, other = under(strategy, "serial"), under(strategy, executor, workers)
    assert bits(other) == bits(one)
    assert values(other) == values(one)
    assert other.ledger.state_dict() == one.ledger.state_dict()


@every
def test_a_stack_gives_the_same_whatever_the_number_of_workers(
    strategy, under, bits, values, monkeypatch
):
    # Four clients are two parts then, which two workers do side by side.
    monkeypatch.setattr("fedkd.engine.executors.cohort.SMALLEST", 2)
    one, two = (under(strategy, "cohort", workers, WHOLE) for workers in (1, 2))
    assert bits(two) == bits(one)
    assert values(two) == values(one)
    assert two.ledger.state_dict() == one.ledger.state_dict()


def test_a_stack_is_close_to_serial(under, bits):
    one, stack = bits(under("fedprox", "serial")), bits(under("fedprox", "cohort"))
    assert one["server"] != stack["server"], "nothing was stacked"
    for name, raw in one.items():
        mine, others = from_bytes(raw), from_bytes(stack[name])
        assert list(mine) == list(others)
        for key, value in mine.items():
            assert np.abs(value - others[key]).max() < CLOSE, key


@pytest.mark.parametrize("executor", ["process", "cohort"])
@pytest.mark.parametrize("strategy", ["ditto", "fedd2s", "fedmd"])
def test_a_resumed_run_ends_with_the_same_bits(strategy, executor, under, tiny, play, bits, values):
    changes = {**TWO, "engine.executor": executor, "engine.workers": 2}
    experiment = tiny(strategy, {**changes, "engine.checkpoint_every": 1})
    first = play(experiment, rounds=1)
    first.close()
    resumed = Run(prepare(experiment), RunFolder(first.folder.path))
    play(experiment, run=resumed)
    resumed.close()
    whole = under(strategy, executor, 3)
    assert bits(resumed) == bits(whole)
    assert values(resumed) == values(whole)


@pytest.mark.parametrize("executor", ["thread", "process", "cohort"])
def test_a_failing_client_leaves_what_it_was_given(executor, tiny, play, monkeypatch, caplog):
    fit = Client.fit

    def failing(self, *args, **kwargs):
        logging.getLogger("fedkd.clients").warning("client %d begins", self.info.id)
        if self.info.id == 2:
            raise ValueError("no such file")
        return fit(self, *args, **kwargs)

    monkeypatch.setattr(Client, "fit", failing)
    run = play(tiny("ditto", {"rounds": 2, "engine.executor": executor, "engine.workers": 2}))
    run.close()
    folder = run.folder.path
    for round_ in (1, 2):
        note = json.loads((folder / f"failures/round-{round_}-client-2/failure.json").read_text())
        assert note["error"] == "ValueError('no such file')"
    events = (folder / "events.log").read_text()
    assert "client 2: ValueError('no such file'); replay it with: fedkd replay" in events
    assert 'raise ValueError("no such file")' in events
    said = [r.getMessage() for r in caplog.records if r.name == "fedkd.clients"]
    assert said.count("client 2 begins") == 2
    assert said.count("client 1 begins") == 4, "ditto trains twice"


@pytest.mark.parametrize("executor", ["process", "cohort"])
def test_a_killed_worker_ends_the_run_with_its_clients_name(executor, tiny, play, monkeypatch):
    def dying(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Client, "fit", dying)
    with pytest.raises(
        RunError, match=r"killed by signal 9 .* while client \d answered 'train' of"
    ):
        play(tiny("fedavg", {"engine.executor": executor, "engine.workers": 2}))


def test_a_device_is_not_shared_with_processes(tiny):
    there = dataclasses.replace(prepare(tiny("fedavg")), device=torch.device("cuda"))
    with pytest.raises(ConfigError, match="'process' cannot share the device 'cuda'"):
        make_executor("process", 2, there)


@pytest.mark.parametrize("name", strategies.names())
def test_auto_stacks_what_can_be_stacked(name, tiny):
    """Which strategies cannot is a list; ``test_stacked_strategies`` says which terms they have."""
    prepared = prepare(tiny(name))
    expected = name not in ALONE and not prepared.strategy.pooled
    assert (choose(prepared).name == "cohort") is expected
