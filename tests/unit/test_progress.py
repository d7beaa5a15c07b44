import io
import math
from itertools import count
from pathlib import Path

import pytest
from rich.console import Console

from fedkd.cli.progress import Bar, Lines, Silent, Tracker
from fedkd.config import experiment
from fedkd.engine.study import CellResult
from fedkd.metrics.log import Log
from fedkd.types import Record


def judged(round_, values, predict="personal"):
    scores = [
        Record(round=round_, client=k, metric="accuracy", split="test", readout="composite",
               predict=predict, value=v)
        for k, v in enumerate(values)
    ]  # fmt: skip
    sent = [
        Record(round=round_, metric=f"bytes_{way}", split=split, value=500.0)
        for way in ("up", "down")
        for split in ("train", "evaluate")
    ]
    return scores + sent


@pytest.fixture
def cells():
    table = {"rounds": 4, "strategy": "fedavg", "compare": {"alone": {"strategy": "local-only"}}}
    return list(experiment(table).cells())


@pytest.fixture
def lines():
    return []


@pytest.fixture
def tracker(lines):
    seconds = count(step=10)
    return Tracker(Lines(lines.append), now=lambda: next(seconds))


def begin(tracker, cells, folder=Path("out"), done=0):
    tracker.planned(cells)
    tracker.cell_started(cells[0], folder)
    tracker.started(cells[0].experiment, done + 1)


def test_a_line_says_run_round_accuracy_bytes_and_time_left(tracker, cells, lines):
    begin(tracker, cells)
    log = Log(2)
    log.add(judged(1, [0.5, 0.7]))
    tracker.finished_round(1, log, [])
    # Ten seconds for one of eight rounds: seventy are left.
    assert lines == [
        "2 runs, 8 rounds in all",
        "[1/2] fedavg, seed 0  round 1/4  accuracy 60.0 %  1.0 kB  1:10 left",
    ]


def test_accuracy_is_of_the_last_judged_round_and_bytes_add_up(tracker, cells):
    begin(tracker, cells)
    log = Log(2)
    log.add(judged(1, [0.5, 0.7]))
    tracker.finished_round(1, log, [])
    log.add(judged(2, [])[-4:])
    tracker.finished_round(2, log, [])
    assert tracker.standing.accuracy == 0.6
    assert tracker.standing.bytes == 2000


def test_the_headline_predictor_is_shown(tracker):
    table = {"strategy": {"name": "fedd2s", "reading": "cut", "predict": "ensemble"}}
    begin(tracker, list(experiment(table).cells()))
    log = Log(1)
    log.add(judged(1, [0.1]) + judged(1, [0.9], "ensemble"))
    tracker.finished_round(1, log, [])
    assert tracker.standing.accuracy == 0.9


def test_rounds_done_earlier_do_not_make_the_rest_look_fast(tracker, cells):
    begin(tracker, cells, done=3)
    assert tracker.standing.done_rounds == 3
    assert math.isnan(tracker.standing.left)
    tracker.finished_round(4, Log(2), [])
    assert tracker.standing.left == 4 * 10


def test_a_run_that_was_finished_counts_as_done(tracker, cells, lines):
    tracker.planned(cells)
    tracker.cell_started(cells[0], Path("out"))
    tracker.cell_finished(CellResult("fedavg", 0, Path("out"), {}))
    assert tracker.standing.done_rounds == 4
    assert lines[-1] == "was finished: fedavg, seed 0"


def test_a_failed_run_is_told_at_once(tracker, cells, lines):
    begin(tracker, cells)
    tracker.cell_finished(CellResult("fedavg", 0, Path("out"), None, "disk full"))
    assert lines[-1] == "failed: fedavg, seed 0: disk full"


def test_the_first_failing_clients_are_named_and_the_others_counted(
    tracker, cells, lines, tmp_path
):
    begin(tracker, cells, tmp_path)
    tracker.finished_round(1, Log(2), [f"client {k}: oops" for k in range(5)])
    text = "\n".join(lines)
    assert "fedavg, seed 0: round 1: client 0: oops" in text
    assert "client 3: oops" not in text
    assert f"and 2 more, see {tmp_path / 'events.log'}" in text
    assert "5 client failures" in lines[-1]


def test_the_bar_shows_the_standing_and_leaves_nothing_but_notes(cells):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100, color_system=None)
    tracker = Tracker(Bar(console))
    begin(tracker, cells)
    log = Log(1)
    log.add(judged(1, [0.25]))
    tracker.finished_round(1, log, ["client 0: [odd] text"])
    tracker.view.end()
    shown = stream.getvalue()
    assert "1/2 fedavg" in shown
    assert "round 1/4  accuracy 25.0 %  1.0 kB  1 client failure  " in shown
    assert "fedavg, seed 0: round 1: client 0: [odd] text" in shown


def test_silence_still_knows_where_the_run_is(cells):
    tracker = Tracker(Silent())
    begin(tracker, cells)
    tracker.finished_round(1, Log(2), ["client 0: oops"])
    tracker.view.end()
    assert (tracker.standing.title, tracker.standing.round) == ("fedavg, seed 0", 1)
