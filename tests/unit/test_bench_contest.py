"""A contest: who does other work is found out and not timed, whatever becomes of the others."""

import dataclasses
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedkd.bench.backends.bare import Bare
from fedkd.bench.check import problems
from fedkd.bench.child import Host
from fedkd.bench.contest import Contest, Options, contestants
from fedkd.bench.operations.base import Operations
from fedkd.bench.process import Child, without_paths
from fedkd.bench.readings import Machine
from fedkd.bench.registries import backends, operations
from fedkd.bench.single import run_operations
from fedkd.bench.whole import run_whole
from fedkd.bench.work import Plan
from fedkd.errors import ConfigError, FedkdError, RunError

PLAN = Plan("mlp", source="digits", clients=4, k=2, block=1)
BRIEF = Options(passes=2, least=0.0, starts=1, memory_rounds=1)


class Inside:
    """Answers as a process of its own would, without one."""

    def __init__(self, log):
        self.host, self.born, self.pid = Host(), time.perf_counter(), os.getpid()

    def ask(self, do, **arguments):
        try:
            return self.host.answer({"do": do, **arguments})
        except FedkdError:
            raise
        except Exception as error:
            raise RunError(f"{type(error).__name__}: {error}") from None

    def close(self):
        self.ask("close")
        return 0.25

    def kill(self):
        self.host.close()


@backends.register("faster-lr")
class FasterLr(Bare):
    def start(self, work, dtype, threads, workers):
        other = dataclasses.replace(work, plan=dataclasses.replace(work.plan, lr=0.051))
        super().start(other, dtype, threads, workers)


@backends.register("short")
class Short(Bare):
    def samples(self):
        return super().samples() - 1


@backends.register("other-hash")
class OtherHash(Bare):
    def hash(self, work):
        return "0" * 16


@backends.register("broken")
class Broken(Bare):
    def round(self, round_):
        raise ZeroDivisionError("no clients")


@backends.register("absent")
class Absent(Bare):
    def available(self):
        return "it is not installed"


@backends.register("tired")
class Tired(Bare):
    played = 0

    def round(self, round_):
        self.played += 1
        if self.played > 2:
            raise RuntimeError("too many rounds")
        super().round(round_)


def contest(tmp_path, *names, options=BRIEF, **known):
    return Contest(
        PLAN, contestants(names), tmp_path, options, machine(), print, process=Inside, **known
    )


def machine():
    """Counters that nobody else moves."""
    return SimpleNamespace(
        read=lambda pid: None, load=lambda before, after: None, peak=Machine(Path("no-such")).peak
    )


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    names = ("serial", "faster-lr", "short", "other-hash", "broken", "absent", "tired")
    return contest(tmp_path_factory.mktemp("contest"), *names).run()


def test_who_does_the_same_work_is_timed_in_every_pass(outcome):
    assert outcome.entries[0].label == outcome.reference == "bare"
    for label in ("bare", "serial"):
        entry = outcome.entry(label)
        assert entry.status == "ok" and entry.hash == outcome.facts["hash"]
        assert entry.apart_fp64 < 1e-12 and entry.apart_fp32 < 1e-6
        assert len(entry.seconds) == 2 and entry.samples == outcome.facts["samples"][0]
        assert len(entry.start_up) == len(entry.first) == 1 and entry.shutdown == [0.25]
    found = outcome.ratio("serial")
    assert found.n == 2 and found.low <= found.median <= found.high
    assert outcome.ratio("bare").median == 1


@pytest.mark.parametrize(
    ("label", "status", "problem"),
    [
        ("faster-lr", "wrong", "float64: weights differ"),
        ("short", "wrong", "examples in round 1, not on"),
        ("other-hash", "wrong", "its work has the hash 0000000000000000, not"),
        ("broken", "failed", "no clients"),
        ("absent", "skipped", "not installed"),
        ("tired", "failed", "too many rounds"),
    ],
)
def test_who_does_not_is_told_and_gets_no_ratio(outcome, label, status, problem):
    entry = outcome.entry(label)
    assert entry.status == status and problem in entry.problem
    assert outcome.ratio(label) is None and not entry.start_up
    assert bool([p for p in problems(outcome) if f" {label}: " in p]) == (status != "skipped")


def test_a_learning_rate_that_is_off_by_a_fiftieth_is_far_beyond_the_gate(outcome):
    assert outcome.entry("faster-lr").apart_fp64 > 1e-6
    assert outcome.entry("faster-lr").apart_fp32 is None, "it must not come that far"


def test_without_its_reference_a_contest_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(Bare, "round", Broken.round)
    with pytest.raises(RunError, match=r"the reference 'bare' did not run.*no clients"):
        contest(tmp_path, "serial").run()


def test_whole_processes_are_timed_from_start_to_end(tmp_path):
    plan = dataclasses.replace(PLAN, block=3)
    made = dataclasses.replace(contest(tmp_path, "faster-lr"), plan=plan)
    outcome = run_whole(made)
    assert outcome.name == "whole mlp K=2" and len(outcome.entry("bare").seconds) == 2
    assert outcome.entry("faster-lr").status == "wrong" and not outcome.entry("faster-lr").timed


def test_contenders_have_names_and_stand_once(tmp_path):
    found = contestants(["thread:1x3", "bare", "bare:2"])
    assert [(c.label, c.threads, c.workers) for c in found] == [
        ("bare", 1, 1),
        ("thread:1x3", 1, 3),
        ("bare:2", 2, 1),
    ]
    with pytest.raises(ConfigError, match="did you mean 'serial'"):
        contestants(["seriall"])
    with pytest.raises(ConfigError, match="asked for 2 times"):
        contestants(["serial", "serial"])


def test_ours_takes_workers_not_threads(tmp_path):
    outcome = contest(tmp_path, "thread:2", options=Options(passes=1, starts=0)).run()
    entry = outcome.entry("thread:2")
    assert entry.status == "failed" and "thread:1x2" in entry.problem


@operations.register("counting")
class Counting(Operations):
    title, unit, reference = "counting", "count", "slow"

    def start(self, source, seed):
        if source == "nowhere":
            raise RunError("nothing to count")
        self.counted = {"slow": 0, "fast": 0}

    def steps(self):
        def count(name):
            self.counted[name] += 1
            time.sleep(0.004 if name == "slow" else 0.001)

        return {name: lambda name=name: count(name) for name in self.counted}

    def facts(self):
        return {"seed": 3, "values": {"fast": {"size": 2.0}}}


def test_operations_are_timed_in_turn_in_one_process(tmp_path):
    given = {"source": "here", "seed": 0}
    outcome = run_operations("counting", given, tmp_path, BRIEF, machine(), print, Inside)
    assert outcome.facts == {"title": "counting", "seed": 3}
    assert outcome.entry("fast").values == {"size": 2.0}
    assert outcome.ratio("fast").median < 1 and outcome.ratio("fast").n == 2


def test_operations_that_cannot_begin_are_a_failed_entry(tmp_path):
    given = {"source": "nowhere", "seed": 0}
    outcome = run_operations("counting", given, tmp_path, BRIEF, machine(), print, Inside)
    assert [(e.status, e.problem) for e in outcome.entries] == [("failed", "nothing to count")]


def test_a_process_answers_refuses_and_ends(tmp_path):
    child = Child(tmp_path / "log")
    try:
        with pytest.raises(RunError, match="KeyError"):
            child.ask("dance")
        with pytest.raises(ConfigError, match="did you mean 'bare'"):
            child.ask("start", folder=".", backend="bar", dtype="float32", threads=1, workers=1)
        assert child.close() > 0
    finally:
        child.kill()


def test_the_last_words_of_a_process_that_died_are_told(tmp_path):
    child = Child(tmp_path / "log")
    try:
        with pytest.raises(RunError, match=r"ended with exit code 1; json\.decoder\.JSON"):
            child.ask_line(b"no json")
    finally:
        child.kill()


def test_no_folder_of_this_machine_is_published():
    place = "/" + "usr/lib/python/site.py"
    assert without_paths(f"File {place}, line 3: a/b of 1/2") == "File site.py, line 3: a/b of 1/2"
