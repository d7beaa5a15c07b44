"""The figures of runs and comparisons: accuracy by round, bytes, fairness, who holds what.

Each is a view of ``metrics.jsonl`` (what clients hold: of the data), drawn with matplotlib's
objects; no state is shared with figures of the caller's own.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedkd.data.preview import plot_holdings
from fedkd.engine.folder import writing
from fedkd.engine.setup import gather
from fedkd.engine.study import StudyResult
from fedkd.errors import DataError
from fedkd.metrics.intervals import mean_t
from fedkd.report.runs import RunView, views
from fedkd.report.style import colour, figure, legend

PLOTS = "plots"
USER, TOKENS = "user accuracy in %", "next-token accuracy in %"


@dataclass(frozen=True)
class Measure:
    """What stands on an axis: ``scale`` times a metric, which has values from ``low`` to ``high``.

    ``note`` is added to titles.
    """

    metric: str
    title: str
    scale: float
    low: float
    high: float
    note: str = ""


ACCURACY = Measure("accuracy", USER, 100, -4, 104)
NEXT_TOKEN = Measure("accuracy", TOKENS, 100, -4, 104)
BITS = Measure("bits_per_character", "bits per character", 1, 0, math.inf, note="; lower is better")


def write(study: StudyResult) -> list[Path]:
    """Draw the figures of a study and of each of its runs into their ``plots`` folders.

    Raises:
        RunError: the disk is full or not writable.
    """
    groups = {label: found for label, found in views(study).items() if found}
    runs = [run for found in groups.values() for run in found]
    if not runs:
        return []
    own, shared = study.folder / PLOTS, study.folder != runs[0].folder
    with writing(study.folder):
        made = labels(runs)
        for run in runs:
            made += accuracy_of_clients(run, run.folder / PLOTS / "accuracy", measured([run]))
            if of_text(run):
                made += accuracy_of_clients(run, run.folder / PLOTS / "bits", BITS)
        if shared:
            first = runs[0].folder / PLOTS
            for stem in ("labels", "rows"):
                made += _copied([first / f"{stem}{suffix}" for suffix in (".png", ".pdf")], own)
            made += accuracy(groups, own / "accuracy", measured(runs))
            if all(map(of_text, runs)):
                made += accuracy(groups, own / "bits", BITS)
        made += traffic(groups, own / "bytes")
        made += clients(groups, own / "clients")
    return made


def of_text(run: RunView) -> bool:
    """Return whether a run predicts text, where classes mean nothing and bits do."""
    return "bits_per_character" in run.entry("last")


def measured(runs: Iterable[RunView]) -> Measure:
    """Return the accuracy as it is called where all runs are of text, and elsewhere."""
    return NEXT_TOKEN if all(map(of_text, runs)) else ACCURACY


def accuracy_of_clients(run: RunView, stem: Path, measure: Measure = ACCURACY) -> list[Path]:
    """Draw one run's accuracy by round: the mean over clients and the 10-90 % band of them."""
    rounds, table = _judged(run, measure)
    made: list[Path] = []
    if not rounds:
        return made
    low, middle, high = np.nanquantile(table, (0.1, 0.5, 0.9), axis=1)
    with figure(2.8, stem, made) as (drawn, axes):
        style = colour(0)
        axes.fill_between(
            rounds, low, high, color=style["color"], alpha=0.18, linewidth=0,
            label="10 to 90 % of clients",
        )  # fmt: skip
        axes.plot(rounds, np.nanmean(table, axis=1), **style, label="mean over clients")
        axes.plot(rounds, middle, color=style["color"], linewidth=0.9, linestyle=":",
                  label="median client")  # fmt: skip
        readout, predict = run.headline
        title = f"{run.label}, seed {run.seed} ({readout}, {predict}){measure.note}"
        axes.set_title(title, loc="left")
        _rounds(axes, rounds, measure)
        legend(drawn, axes)
    return made


def accuracy(
    groups: dict[str, list[RunView]], stem: Path, measure: Measure = ACCURACY
) -> list[Path]:
    """Draw the accuracy by round of every label: mean over seeds, band its 95 % interval."""
    made: list[Path] = []
    several = max(len(found) for found in groups.values()) > 1
    shade = min(0.15, 0.5 / len(groups))
    with figure(3.1 + 0.1 * len(groups), stem, made) as (drawn, axes):
        longest: list[int] = []
        for i, (label, runs) in enumerate(groups.items()):
            rounds, means = _over_seeds([_series(run, measure) for run in runs])
            if not rounds:
                continue
            longest = max(longest, rounds, key=len)
            estimates = [mean_t(column) for column in means.T]
            axes.plot(rounds, [e.value for e in estimates], **colour(i), label=label)
            if len(means) > 1:
                low, high = ([getattr(e, bound) for e in estimates] for bound in ("low", "high"))
                axes.fill_between(
                    rounds, low, high, color=colour(i)["color"], alpha=shade, linewidth=0
                )
        title = "mean over seeds with 95 % interval" if several else "mean over clients, one seed"
        axes.set_title(title + measure.note, loc="left")
        _rounds(axes, longest, measure)
        legend(drawn, axes)
    return made


def traffic(groups: dict[str, list[RunView]], stem: Path) -> list[Path]:
    """Draw accuracy against the bytes sent until then, both ways; a dashed line sends nothing."""
    made: list[Path] = []
    with figure(3.1 + 0.1 * len(groups), stem, made) as (drawn, axes):
        silent, sent = [], []
        for i, (label, runs) in enumerate(groups.items()):
            rounds, means = _over_seeds([_series(run, ACCURACY) for run in runs])
            if not rounds:
                continue
            _, bytes_ = _over_seeds([_sent(run, rounds) for run in runs])
            megabytes, values = bytes_.mean(0) / 1e6, means.mean(0)
            if megabytes[-1] == 0:
                silent.append((i, label, values[-1]))
                continue
            sent.append(megabytes[-1])
            axes.plot(megabytes, values, **colour(i), label=label)
            axes.plot(megabytes[-1], values[-1], "o", color=colour(i)["color"], markersize=4)
        for i, label, value in silent:
            axes.axhline(
                value, color=colour(i)["color"], linestyle=(0, (5, 3)), linewidth=1.2,
                label=label,
            )  # fmt: skip
        if sent and max(sent) > 20 * min(sent):
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("MB of training sent until then, up and down")
        axes.set_ylabel(measured(run for runs in groups.values() for run in runs).title)
        across = "; a line all across sends nothing" if silent else ""
        axes.set_title(f"accuracy against traffic{across}", loc="left")
        legend(drawn, axes)
    return made


def clients(groups: dict[str, list[RunView]], stem: Path) -> list[Path]:
    """Draw the accuracy of every client, worst first: a flat line serves all alike."""
    made: list[Path] = []
    with figure(3.1 + 0.1 * len(groups), stem, made) as (drawn, axes):
        for i, (label, runs) in enumerate(groups.items()):
            ordered = [np.sort(v[~np.isnan(v)]) for v in (r.by_client("mean_last_k") for r in runs)]
            size = min(len(v) for v in ordered)
            values = 100 * np.mean([v[:size] for v in ordered], axis=0)
            marker = {"marker": "o", "markersize": 2.5} if size <= 40 else {}
            axes.plot(np.arange(1, size + 1), values, **colour(i), **marker, label=label)
        axes.set_xlabel("client, from the worst to the best of each method")
        everything = [run for runs in groups.values() for run in runs]
        axes.set_ylabel(TOKENS if all(map(of_text, everything)) else "accuracy in %")
        axes.set_title("accuracy of each client, mean of the last rounds", loc="left")
        axes.locator_params(axis="x", integer=True)
        legend(drawn, axes)
    return made


def labels(runs: Sequence[RunView]) -> list[Path]:
    """Draw who holds which class, once for each division of the data, into each run's folder.

    Rows of text have no class: of those it is how many each client has, canaries apart.
    Where the data are no longer at hand the figure is left out.
    """
    drawn: dict[str, list[Path]] = {}
    made: list[Path] = []
    for run in runs:
        key = json.dumps([run.data, run.seed, run.experiment.table()["canaries"]])
        if key in drawn:
            made += _copied(drawn[key], run.folder / PLOTS)
            continue
        try:
            federation, _, canaries = gather(run.experiment)
        except DataError:
            drawn[key] = []
            continue
        data = run.experiment.data
        title = f"{data.source.name}, {data.manifest or data.partition.name}, seed {run.seed}"
        stem = run.folder / PLOTS / ("rows" if federation.task.sequence else "labels")
        planted = [0] * federation.clients
        if canaries is not None:
            put = [canaries.planted(k, n) for k, n in enumerate(canaries.sizes)]
            planted = [0 if p is None else len(p.y) for p in put]
        drawn[key] = plot_holdings(federation, stem, title, planted)
        made += drawn[key]
    return made


def _copied(files: Sequence[Path], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    return [Path(shutil.copyfile(file, folder / file.name)) for file in files if file.is_file()]


def _judged(run: RunView, measure: Measure) -> tuple[list[int], np.ndarray]:
    """Return the judged rounds and a metric of the headline (rounds, clients), scaled."""
    rounds, table = run.judged()
    if measure.metric != "accuracy" and rounds:
        readout, predict = run.headline
        table = run.log.table(measure.metric, "test", readout, predict)
        every = run.log.rounds("accuracy", "own" if readout == "stale" else readout)
        table = table[[every.index(t) for t in rounds]]
    return rounds, measure.scale * table


def _series(run: RunView, measure: Measure) -> dict[int, float]:
    rounds, table = _judged(run, measure)
    means = np.nanmean(table, axis=1) if rounds else []
    return dict(zip(rounds, map(float, means), strict=True))


def _sent(run: RunView, rounds: Sequence[int]) -> dict[int, float]:
    """Return the bytes sent in training up to each round."""
    both = [run.log.series(f"bytes_{way}", "train") for way in ("up", "down")]
    return {
        t: sum(value for way in both for round_, value in way.items() if round_ <= t)
        for t in rounds
    }


def _over_seeds(series: Sequence[dict[int, float]]) -> tuple[list[int], np.ndarray]:
    """Return the rounds that all seeds have, and the values (seeds, rounds)."""
    rounds = sorted(set.intersection(*(set(s) for s in series)))
    return rounds, np.array([[s[t] for t in rounds] for s in series])


def _rounds(axes: Any, rounds: Sequence[int], measure: Measure) -> None:
    axes.set_xlabel("round")
    axes.set_ylabel(measure.title)
    if len(rounds) == 1:
        for line in axes.lines:
            line.set_marker("o")
    axes.locator_params(axis="x", integer=True)
    # Intervals may leave what is possible; the axis need not follow them.
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, measure.low), min(high, measure.high))
