"""The live view of a sweep: where runs stand, the time that is left, and what fits on a screen."""

import io
import math
from pathlib import Path

import pytest
from rich.console import Console

from fedkd.cli.sweep_view import Board, SweepLines, SweepTable
from fedkd.config import experiment
from fedkd.sweep.plan import PlannedRun


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def run(label, ratio, seed=0, rounds=10):
    made = experiment(
        {
            "rounds": rounds,
            "clients": {"count": 9, "participation": {"scheme": "fixed", "ratio": ratio}},
        }
    )
    digest = f"{label}-{ratio}-{seed}"
    return PlannedRun(label, {"clients.participation.ratio": ratio}, seed, made, digest, Path())


def at(round_, rounds=10, accuracy=0.5, failures=()):
    what = {"round": round_, "rounds": rounds, "accuracy": accuracy, "bytes": 0.0}
    return ("round", {**what, "failures": list(failures)})


DONE = ("done", {"accuracy": 0.5})


@pytest.fixture
def clock():
    return Clock()


def test_nothing_is_known_before_the_first_round(clock):
    board = Board(1, clock)
    board.planned([run("a", 1.0)], [])
    assert math.isnan(board.left())
    board.told(board.runs[0], at(0))
    clock.now = 5.0
    assert math.isnan(board.left())
    assert board.line() == "0/1 runs finished"


def test_what_is_left_goes_by_label_and_by_the_size_of_the_cohort(clock):
    board = Board(1, clock)
    big, small, other = run("a", 1.0), run("a", 1 / 9), run("b", 1.0)
    board.planned([big, small, other], [])
    board.told(big, at(0))
    clock.now = 100.0
    board.told(big, DONE)
    # 10 rounds of 1 + 9 clients in 100 s; the others: 10 rounds of 1 + 1 clients, and of 1 + 9.
    assert board.left() == pytest.approx(20 + 100)
    board.told(small, at(0))
    clock.now = 110.0
    board.told(small, at(5))
    # 110 s for 110 units of label a; of all labels the same pace.
    assert board.left() == pytest.approx(5 * 2 + 100)


def test_several_jobs_share_what_is_left_but_not_one_run(clock):
    board = Board(4, clock)
    runs = [run("a", 1.0, seed) for seed in range(3)]
    board.planned(runs, [])
    board.told(runs[0], at(0))
    clock.now = 10.0
    board.told(runs[0], DONE)
    assert board.left() == pytest.approx(10.0)
    board.told(runs[1], at(0))
    clock.now = 20.0
    board.told(runs[1], DONE)
    assert board.left() == pytest.approx(10.0)


def test_rounds_before_a_resumption_say_nothing_of_the_pace(clock):
    board = Board(1, clock)
    board.planned([run("a", 1.0)], [])
    board.told(board.runs[0], at(8))
    clock.now = 3.0
    board.told(board.runs[0], at(9))
    assert board.left() == pytest.approx(3.0)


def test_failed_runs_are_not_waited_for_and_failures_of_clients_counted(clock):
    board = Board(2, clock)
    runs = [run("a", 1.0, seed) for seed in range(2)]
    board.planned(runs, [])
    for one in runs:
        board.told(one, at(0))
    clock.now = 4.0
    board.told(runs[0], at(2, failures=["client 3"]))
    board.told(runs[0], ("failed", {"error": "x"}))
    clock.now = 8.0
    board.told(runs[1], DONE)
    assert board.left() == 0.0
    assert board.line() == "1/2 runs finished, 1 failed, 1 client failure"


def test_a_run_that_stands_for_two_points_counts_once():
    one, two = run("a", 1.0), run("b", 1.0)
    same = PlannedRun("b", two.point, 0, one.experiment, one.digest, one.folder)
    board = Board(1)
    board.planned([one, same], [one.digest])
    assert board.line() == "1/1 runs finished"


@pytest.mark.parametrize("width", [60, 100, 200])
@pytest.mark.parametrize("labels", [1, 30])
def test_the_table_fits_the_screen_and_the_last_line_is_seen(width, labels):
    stream = io.StringIO()
    console = Console(file=stream, width=width, height=24, color_system=None)
    board = Board(2)
    table = SweepTable(board, console)
    runs = [
        run(f"a label with a name [red] of its own {i}", ratio, seed)
        for i in range(labels)
        for ratio in (0.05, 0.1, 0.2, 0.5, 0.75, 0.9, 1.0)
        for seed in range(3)
    ]
    board.planned(runs, [])
    board.told(runs[0], at(3))
    console.print(table._draw())
    lines = stream.getvalue().splitlines()
    assert len(lines) <= console.height and all(len(line) <= width for line in lines)
    assert f"0/{len(runs)} runs finished" in lines[-1]
    assert any("round 3/10" in line for line in lines)
    shown = any("a label" in line and "round" not in line for line in lines)
    assert shown == (labels == 1)


def test_what_is_checked_is_said_before_there_is_a_plan(capsys):
    board = Board(1)
    lines = SweepLines(board)
    lines.checking(0, 12)
    lines.checking(1, 12)
    assert "12 points" in capsys.readouterr().err
    assert board.line() == "checking 2 of 12 labels and points"
    lines.planned([run("a", 1.0)], [])
    assert capsys.readouterr().err == "1 run, 0 finished before\n"
    lines.told(board.runs[0], at(1))
    assert capsys.readouterr().err == ""
    lines.told(board.runs[0], DONE)
    assert capsys.readouterr().err.startswith("a, ratio=1, seed 0: 50.0 %; 1/1 runs finished")
