"""What the studies share: resumable runs on worker processes, equal tuning, values from summaries.

A study names its methods and settings; here they are run, tuned with the same number of trials each
and read back. An interrupted command does only what is missing.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedkd.config import experiment, override
from fedkd.engine.folder import read_records
from fedkd.engine.study import slug
from fedkd.metrics.log import Log
from fedkd.types import Estimate

Changes = dict[str, Any]
Found = dict[int, dict[str, Any]]
"""The summaries of one variant by seed."""


@dataclass(frozen=True)
class Job:
    """One run: a name to report it by, the base table, what differs from it, and its folder."""

    name: str
    base: dict[str, Any]
    changes: Changes
    folder: Path


def run_job(job: Job) -> str:
    """Run one experiment in its folder (or find it finished) and say what came out."""
    import torch

    from fedkd.engine.simulation import run

    torch.set_num_threads(1)
    table = json.loads(json.dumps(job.base))
    for key, value in job.changes.items():
        override(table, key, value)
    try:
        summary = run(experiment(table), job.folder, resume=True)
    except Exception as error:  # one failing run must not end a study
        return f"{job.name}: FAILED {error}"
    last = summary["readouts"]["composite"][summary["headline"]["predict"]]["mean_last_k"]
    return f"{job.name}: {last['user_accuracy']:.4f}"


def run_all(jobs: Sequence[Job], workers: int) -> None:
    """Run all jobs on worker processes, reporting each as it ends."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for done, text in enumerate(pool.map(run_job, jobs), start=1):
            print(f"[{done}/{len(jobs)}] {text}", flush=True)


def trials(fixed: Changes, grids: Mapping[str, Sequence[Any]]) -> list[Changes]:
    """Return every combination of the grids' values on top of ``fixed``."""
    keys = list(grids)
    return [
        {**fixed, **dict(zip(keys, values, strict=True))}
        for values in itertools.product(*grids.values())
    ]


def tune(
    methods: Mapping[str, list[Changes]],
    base: dict[str, Any],
    extra: Changes,
    runs: Path,
    out: Path,
    workers: int,
) -> None:
    """Run all trials of every method; write the best of each, by validation, and all scores."""
    jobs, folders = [], {}
    for method, options in methods.items():
        for i, trial in enumerate(options):
            folders[method, i] = runs / "tune" / slug(method) / str(i)
            jobs.append(Job(f"{method} {i}", base, {**trial, **extra}, folders[method, i]))
    run_all(jobs, workers)
    best = {}
    for method, options in methods.items():
        scores = [validation(folders[method, i]) for i in range(len(options))]
        chosen = max(range(len(scores)), key=scores.__getitem__)
        best[method] = {"options": options[chosen], "validation": scores}
    text = json.dumps(best, indent=2)
    out.write_text(text + "\n", encoding="utf-8")
    print(text)


def validation(folder: Path) -> float:
    """Return the mean validation accuracy over clients, mean of the last three evaluations.

    A trial that failed scores -1: it is never chosen.
    """
    file = folder / "summary.json"
    if not file.exists():
        return -1.0
    summary = json.loads(file.read_text(encoding="utf-8"))
    clients = len(next(iter(summary["readouts"]["composite"].values()))["last"]["by_client"])
    log = Log(clients)
    log.add(read_records(folder / "metrics.jsonl"))
    table = log.table("accuracy", "validation", "composite", summary["headline"]["predict"])
    return float(np.mean([np.nanmean(row) for row in table[-3:]]))


def place(runs: Path, setting: str, label: str, seed: int) -> Path:
    """Return the folder of one run."""
    return runs / slug(setting) / slug(label) / f"seed-{seed}"


def load(runs: Path, setting: str, label: str, seeds: Sequence[int]) -> Found:
    """Return the summaries of a variant's finished seeds."""
    found = {}
    for seed in seeds:
        file = place(runs, setting, label, seed) / "summary.json"
        if file.exists():
            found[seed] = json.loads(file.read_text(encoding="utf-8"))
    return found


def values(found: Found, predict: str, key: str, readout: str, rule: str) -> dict[int, float]:
    """Return one value a seed, where the read-out has it."""
    out = {}
    for seed, summary in found.items():
        entry = summary["readouts"].get(readout, {}).get(predict)
        value = entry[rule].get(key) if entry and rule in entry else None
        if value is not None:
            out[seed] = value
    return out


def percent(made: Estimate | None, interval: bool = True, sign: bool = False) -> str:
    """Return an estimate in per cent, with half its interval's width where asked."""
    if made is None or math.isnan(made.value):
        return "-"
    shown = f"{100 * made.value:+.1f}" if sign else f"{100 * made.value:.1f}"
    half = (made.high - made.low) / 2
    return f"{shown} ± {100 * half:.1f}" if interval and not math.isnan(half) else shown
