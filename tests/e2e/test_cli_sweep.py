"""``fedkd sweep`` and ``fedkd report`` used wrongly: one message each, no traceback."""

import html
import json

import pytest

from fedkd.cli import main
from fedkd.sweep import run as sweeping

FILE = """
name = "tiny"
rounds = 1
strategy = "fedavg"
model = { name = "mlp", hidden = [16] }
[data]
source = { name = "digits", limit = 160, test_limit = 60 }
[clients]
count = 4
[engine]
executor = "serial"
[sweep.grid]
"clients.participation.ratio" = [0.5, 1.0]
"""


@pytest.fixture
def file(tmp_path):
    place = tmp_path / "tiny.toml"
    place.write_text(FILE)
    return place


def said(capsys, *words):
    code = main([str(word) for word in words])
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return code, " ".join(error.split())


def test_what_is_impossible_leaves_nothing_behind(file, tmp_path, capsys):
    out = tmp_path / "out"
    for given, message in (
        (["--over", "nonsense=1,2"], "unknown key"),
        (["--over", "strategy=fedprox,fd", "--over", "strategy.mu=0.1"], "in 'fd' at"),
        (["--over", "clients.participation.ratio=0.5,1.5"], "ratio = 1.5"),
        (["--zip", "rounds=1,2", "--zip", "clients.count=4,5,6"], "lists of equal length"),
        (["--over", "rounds"], "is no axis"),
        (["--over", "seed=1,2"], "give seeds"),
    ):
        code, error = said(capsys, "sweep", file, "--out", out, *given)
        assert (code, message in error) == (2, True), error
        assert not (out / "commands.txt").exists() and not (out / "sweep.json").exists()


def test_run_does_not_do_a_part_of_a_sweep(file, tmp_path, capsys):
    code, error = said(capsys, "run", file, "--out", tmp_path / "out")
    assert code == 2 and f"fedkd sweep {file}" in error
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_a_file_is_named(file, capsys):
    code, error = said(capsys, "sweep", file, "--out", file)
    assert code == 1 and "cannot write to" in error


def test_ctrl_c_says_how_to_go_on(file, tmp_path, capsys, monkeypatch):
    def stopped(*what):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweeping, "run_all", stopped)
    code, error = said(capsys, "sweep", file, "--out", tmp_path / "out")
    assert code == 130 and "0/2 runs finished" in error and "same command" in error
    assert "tiny.toml" in (tmp_path / "out" / "commands.txt").read_text()
    monkeypatch.setattr(sweeping, "prepare", stopped)
    code, error = said(capsys, "sweep", file, "--out", tmp_path / "other")
    assert code == 130 and "nothing was run" in error


def test_report_refuses_what_it_cannot_do(tmp_path, capsys):
    code, error = said(capsys, "report", tmp_path / "nowhere")
    assert code == 2 and "nowhere" in error
    code, error = said(capsys, "report", tmp_path, "--target", 2)
    assert code == 2 and "--target" in error


def test_strategies_of_the_command_replace_those_that_a_file_compares(file, tmp_path, capsys):
    others = (
        "[compare.alone]",
        'strategy = "local-only"',
        "[compare.prox]",
        'strategy = "fedprox"',
    )
    file.write_text(FILE + "\n".join(others))
    out = tmp_path / "out"
    words = ["sweep", file, "--out", out, "--over", "strategy=fedavg-ft,fd", "--seeds", "1"]
    code, error = said(capsys, *words, "--over", "clients.participation.ratio=1.0")
    assert code == 0 and "left out: fedavg, alone, prox" in error
    index = json.loads((out / "sweep.json").read_text())
    assert index["labels"] == ["fedavg-ft", "fd"] and len(index["runs"]) == 2
    page = (out / "report.html").read_text()
    assert "--over strategy=fedavg-ft,fd" in html.unescape(page)
