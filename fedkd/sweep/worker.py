"""One worker process of a sweep: it gets runs one after the other and tells how each goes.

It ends with its parent: when nobody listens any more, the next round's report fails.
"""

from __future__ import annotations

import signal
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from fedkd.config import Experiment
from fedkd.engine.folder import RunFolder
from fedkd.errors import FedkdError
from fedkd.metrics.log import Log
from fedkd.sweep.failed import forget_reason, keep_reason

PATIENCE = 60.0
"""Seconds that a run waits for a process that is still at work in its folder."""
Kind = Literal["round", "done", "failed"]
Told = tuple[Kind, dict[str, Any]]


class Messenger:
    """Tells a listener of every round of a run: the watcher of :func:`fedkd.run`."""

    def __init__(self, tell: Any) -> None:
        self.tell, self.predict = tell, ""
        self._seen, self._accuracy = 0, float("nan")

    def started(self, experiment: Experiment, first_round: int) -> None:
        """Say with which round the run begins."""
        self.predict = experiment.predict
        self._tell(first_round - 1, ())

    def finished_round(self, round_: int, log: Log, failures: Sequence[str]) -> None:
        """Say what a round came to."""
        wanted = (round_, "accuracy", "test", "composite", self.predict)
        judged = [
            r.value
            for r in log.records[self._seen :]
            if (r.round, r.metric, r.split, r.readout, r.predict) == wanted
        ]
        self._seen = len(log.records)
        if judged:
            self._accuracy = sum(judged) / len(judged)
        self._tell(round_, failures)

    def _tell(self, round_: int, failures: Sequence[str]) -> None:
        said = {"round": round_, "accuracy": self._accuracy, "failures": list(failures)}
        self.tell(("round", said))


def run_one(experiment: Experiment, folder: Path, tell: Any) -> None:
    """Run one experiment, or go on with it; tell of its rounds and of what became of it.

    What concerns this run only is told and kept; nothing is raised but Ctrl-C.
    """
    from fedkd.engine.simulation import run

    try:
        forget_reason(folder)
        begun = RunFolder(folder).exists()
        summary = run(experiment, folder, resume=begun, watcher=Messenger(tell), patience=PATIENCE)
    except BrokenPipeError:
        raise
    except Exception as error:
        ours = isinstance(error, FedkdError)
        text = str(error) if ours else f"{type(error).__name__}: {error}"
        with suppress(FedkdError):  # A full disk: the reason is told all the same.
            keep_reason(folder, text, "" if ours else traceback.format_exc())
        tell(("failed", {"error": text}))
        return
    last = summary["readouts"].get(summary["headline"]["readout"], {})
    entry = last.get(summary["headline"]["predict"], {}).get("mean_last_k", {})
    tell(("done", {"accuracy": entry.get("user_accuracy", float("nan"))}))


def serve(connection: Connection, workspace: str, threads: int) -> None:
    """Do what comes through the connection until it is closed; for a process of its own."""
    # Ctrl-C reaches the whole group: the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        import logging

        from fedkd.config import experiment
        from fedkd.engine.setup import load_workspace

        logging.getLogger("fedkd.engine.grid").setLevel(logging.CRITICAL)
        load_workspace(Path(workspace))
        while True:
            task = connection.recv()
            if task is None:
                return
            made = experiment(task["table"])
            run_one(shared(made, threads), Path(task["folder"]), connection.send)
    except (EOFError, OSError):
        return


def shared(experiment: Experiment, threads: int) -> Experiment:
    """Return an experiment that uses its job's share of the cores, unless it says otherwise."""
    engine = experiment.engine
    if engine.workers or engine.executor not in ("auto", "thread", "process", "cohort"):
        return experiment
    return replace(experiment, engine=replace(engine, workers=threads))
