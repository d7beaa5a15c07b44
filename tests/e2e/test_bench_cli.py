"""``fedkd bench`` as a user meets it: a quick check, comparable results, clear refusals."""

import json
import re

import pytest

from fedkd.bench.contest import Contest
from fedkd.bench.results import Entry, Outcome
from fedkd.cli import main
from fedkd.errors import DataError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_check_passes_on_digits_and_tells_no_seconds(capsys):
    assert main(["bench", "check", "--backends", "serial", "--quiet"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"cnn K=4: serial float64 \d", out)
    assert re.search(r"mlp K=4: serial float64 \S+, float32 \S+, [\d.]+ times bare", out)
    assert not re.search(r"[\d.]+ s\b", out)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "cn"], "did you mean 'cnn'"),
        (["run", "mlp", "--k", "ten"], "--k 'ten'"),
        (["run", "mlp", "--k", "200"], "no more can take part"),
        (["run", "mlp", "--backends", "seriall"], "did you mean 'serial'"),
        (["run", "mlp", "--backends", "bare:"], "is no contender"),
        (["compare", "a.json", "b.json"], "there is no file a.json"),
        (["check", "--backends", "bar", "--quiet"], "did you mean 'bare'"),
    ],
)
def test_bad_input_is_one_message_without_a_traceback(capsys, arguments, said):
    assert main(["bench", *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err and "defect" not in err


def test_an_unknown_source_is_refused(capsys):
    assert main(["bench", "check", "--source", "digit", "--quiet"]) == 2
    err = capsys.readouterr().err
    assert "did you mean 'digits'" in err and "Traceback" not in err


def played(self):
    """What a contest finds, without one."""
    entries = [Entry("bare", seconds=[1.0, 2.0]), Entry("serial", seconds=[1.1, 2.0])]
    if "fedavg-gone" in [c.backend for c in self.who]:
        raise AssertionError
    facts = {"hash": "a" * 16, "source": "digits", "clients": 100, "k": self.plan.k, "kind": "mlp"}
    facts |= {"samples": [10, 12], "parameters": 5, "batch_size": 32}
    return Outcome(self.plan.name, "round", "bare", facts, entries)


def test_a_run_leaves_json_markdown_and_figure_that_can_be_compared(here, monkeypatch, capsys):
    monkeypatch.setattr(Contest, "run", played)
    command = ["bench", "run", "mlp", "--source", "digits", "--k", "10", "--quiet"]
    for _ in range(2):
        assert main(command) == 0
    assert "1.05 (1 to 1.1, n=2)" in capsys.readouterr().out
    first, second = here / "runs" / "bench", here / "runs" / "bench-2"
    assert {f.name for f in first.iterdir()} >= {"bench.json", "bench.md", "bench.png", "bench.svg"}
    assert main(["bench", "compare", str(first / "bench.json"), str(second / "bench.json")]) == 0
    assert "mlp K=10" in capsys.readouterr().out
    text = "".join((first / name).read_text() for name in ("bench.json", "bench.md", "bench.svg"))
    assert str(here) not in text
    assert main([*command, "--json", "--out", "other"]) == 0
    assert json.loads(capsys.readouterr().out)["outcomes"][0]["name"] == "mlp K=10"


def test_a_contender_that_does_other_work_makes_the_command_fail(monkeypatch, capsys):
    def wrong(self):
        made = played(self)
        made.entries[1].status, made.entries[1].problem = "wrong", "weights differ"
        return made

    monkeypatch.setattr(Contest, "run", wrong)
    assert main(["bench", "run", "mlp", "--source", "digits", "--k", "10", "--quiet"]) == 1
    assert "wrong: weights differ" in capsys.readouterr().out


def test_missing_data_are_told_with_the_way_to_get_them(monkeypatch, capsys):
    def missing(self):
        raise DataError("data source 'fashion-mnist' is not here: apt-get install it")

    monkeypatch.setattr(Contest, "run", missing)
    assert main(["bench", "run", "mlp", "--quiet"]) == 2
    assert "apt-get install" in capsys.readouterr().err


def test_everything_that_can_be_measured_is_listed(capsys):
    assert main(["bench", "works"]) == 0
    out = capsys.readouterr().out
    for name in ("tiny", "whole", "dp-step-cnn", "fedd2s", "start-up", "bare-channels-last"):
        assert name in out
