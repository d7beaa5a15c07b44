"""The comparison of a study: one row a label, every number with its interval, honest captions.

Seeds are the independent units where there are two or more; with one seed only the clients are, and
the caption says what such an interval cannot tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedkd.engine.calibration import written
from fedkd.engine.study import StudyResult
from fedkd.metrics.intervals import bootstrap_mean, mean_t, paired_t
from fedkd.report.claims import Claims, claims, spent
from fedkd.report.runs import RunView, views
from fedkd.rng import stream
from fedkd.types import Estimate

REFERENCE = "local-only"
BASELINES = ("local-only", "fedavg-ft")
RULES = ("mean_last_k", "last", "chosen_on_validation")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One label; ``values`` by column name, see :data:`fedkd.report.tables.COLUMNS`."""

    label: str
    strategy: str = ""
    seeds: tuple[int, ...] = ()
    predict: str = ""
    values: dict[str, Estimate] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Readout:
    """One read-out and predictor of one label."""

    label: str
    readout: str
    predict: str
    headline: bool
    values: dict[str, Estimate]


@dataclass(frozen=True)
class Comparison:
    """All rows of a study with what a reader has to know to read them."""

    name: str
    folder: Path
    rows: list[Row]
    readouts: list[Readout]
    notes: list[str]
    claims: Claims = field(default_factory=Claims)

    def row(self, label: str) -> Row:
        """Return the row of a label."""
        return next(row for row in self.rows if row.label == label)

    def __str__(self) -> str:
        from fedkd.report.tables import text

        return text(self)


def comparison(study: StudyResult) -> Comparison:
    """Return the comparison of all labels of a study, in the order of the experiment file."""
    runs = views(study)
    rows = [_row(study, label, found, _reference(found, runs)) for label, found in runs.items()]
    readouts = [entry for found in runs.values() for entry in _readouts(found)]
    notes = _notes(study, runs)
    return Comparison(study.experiment.name, study.folder, rows, readouts, notes, claims(runs))


def _row(
    study: StudyResult, label: str, runs: Sequence[RunView], reference: Sequence[RunView]
) -> Row:
    errors = [f"seed {c.seed}: {c.error}" for c in study.failed if c.label == label]
    error = "; ".join(errors)
    if not runs:
        return Row(label=label, error=error)
    if not all(r.entry("mean_last_k") for r in runs):
        readout, predict = runs[0].headline
        return Row(label=label, error=f"never judged in read-out {readout}, predictor {predict}")
    values = {rule: _accuracy(runs, rule) for rule in RULES if all(r.entry(rule) for r in runs)}
    for key, name in (
        ("weighted", "weighted_accuracy"),
        ("std", "std"),
        ("worst_share", "worst_share"),
        ("jain", "jain"),
    ):
        values[key] = mean_t([r.entry("mean_last_k")[name] for r in runs])
    own = [_own(r) for r in runs]
    last = [r.entry("last") for r in runs]
    values |= _means({"own": own, "global": [e.get("global_accuracy") for e in last]})
    values |= _bits(runs)
    values |= _agreement(runs)
    for key in ("bytes_up", "bytes_down"):
        values[key] = mean_t([r.summary["bytes"].get(key, 0.0) for r in runs])
    speeds = [r.summary["seconds"].get("train_per_round") for r in runs]
    values |= _means({"seconds_per_round": speeds})
    difference = _difference(runs, reference)
    if difference is not None:
        values["difference"] = difference
    epsilon = spent(runs)
    if epsilon is not None:
        values["epsilon"] = epsilon
    return Row(
        label=label,
        strategy=runs[0].summary["strategy"],
        seeds=tuple(r.seed for r in runs),
        predict=runs[0].headline[1],
        values=values,
        error=error,
    )


def _accuracy(runs: Sequence[RunView], rule: str) -> Estimate:
    """Return the user accuracy over seeds; over clients where there is one seed only."""
    means = [r.entry(rule)["user_accuracy"] for r in runs]
    if len(runs) > 1:
        return mean_t(means)
    values = runs[0].by_client(rule)
    over_clients = _over_clients(values[~np.isnan(values)], runs[0].seed)
    # The value is the summary's to the last bit: its mean is taken in another order.
    return replace(over_clients, value=means[0])


def _bits(runs: Sequence[RunView]) -> dict[str, Estimate]:
    """Return bits per character, own and global, where all runs are of text."""
    key = "bits_per_character"
    found = _means({
        key: [r.entry("mean_last_k").get(key) for r in runs],
        f"global_{key}": [r.entry("last").get(f"global_{key}") for r in runs],
    })  # fmt: skip
    if key in found and len(runs) == 1:
        values = runs[0].log.table(key, "test", *runs[0].headline)
        rows = values[~np.isnan(values).all(1)][-runs[0].experiment.evaluate.last_k :]
        seen = ~np.isnan(rows)
        each = np.where(seen, rows, 0).sum(0)[seen.any(0)] / seen.sum(0)[seen.any(0)]
        found[key] = replace(_over_clients(each, runs[0].seed), value=found[key].value)
    return found


def _agreement(runs: Sequence[RunView]) -> dict[str, Estimate]:
    """Return how often students answer as their teachers, where soft targets taught any."""
    from fedkd.report.agreement import overall
    from fedkd.report.collection import Group

    if not all(run.summary.get("agreement") for run in runs):
        return {}
    found = overall(Group(runs[0].label, {}, list(runs)))
    return {} if found is None else {"agreement": found}


def _over_clients(values: np.ndarray, seed: int) -> Estimate:
    made = bootstrap_mean(values, stream(seed, "report", "bootstrap"))
    return replace(made, method=f"{made.method} over clients")


def _means(columns: dict[str, list[Any]]) -> dict[str, Estimate]:
    """Return the mean over runs of each column that every run has."""
    return {
        key: mean_t(values)
        for key, values in columns.items()
        if values and all(v is not None for v in values)
    }


def _own(run: RunView) -> float | None:
    _, predict = run.headline
    by_predictor = run.summary["readouts"].get("own", {})
    entry = by_predictor.get(predict, by_predictor.get("personal", {})).get("mean_last_k")
    return float(entry["user_accuracy"]) if entry else None


def _reference(runs: Sequence[RunView], everything: dict[str, list[RunView]]) -> list[RunView]:
    """Return the runs of local-only on the same data as ``runs``, or none."""
    if not runs:
        return []
    same = [
        others
        for others in everything.values()
        if others and others[0].summary["strategy"] == REFERENCE and others[0].data == runs[0].data
    ]
    # The plain one, if there are variants with label smoothing, is what others are measured by.
    plain = min(same, key=lambda others: _smoothing(others[0]), default=[])
    return [] if plain and plain[0].label == runs[0].label else plain


def _smoothing(run: RunView) -> float:
    return float(run.experiment.strategy.options.get("label_smoothing", 0.0))


def _difference(runs: Sequence[RunView], reference: Sequence[RunView]) -> Estimate | None:
    """Return by how much ``runs`` is better, paired by seed, or by client with one seed."""
    theirs = {r.seed: r for r in reference}
    pairs = [(r, theirs[r.seed]) for r in runs if r.seed in theirs]
    if len(pairs) > 1:
        first, second = zip(*pairs, strict=True)
        return paired_t(_user_accuracies(first), _user_accuracies(second))
    if not pairs:
        return None
    ours, others = (r.by_client("mean_last_k") for r in pairs[0])
    if ours.shape != others.shape:
        return None
    both = ~np.isnan(ours) & ~np.isnan(others)
    if not both.any():
        return None
    return _over_clients((ours - others)[both], pairs[0][0].seed)


def _user_accuracies(runs: Sequence[RunView]) -> list[float]:
    return [r.entry("mean_last_k")["user_accuracy"] for r in runs]


def _readouts(runs: Sequence[RunView]) -> list[Readout]:
    """Return every read-out and predictor that all runs of a label have."""
    found = []
    first = runs[0].summary["readouts"] if runs else {}
    for readout, by_predictor in sorted(first.items()):
        for predict in sorted(by_predictor, key=lambda name: (name != "personal", name)):
            entries = [r.summary["readouts"].get(readout, {}).get(predict) for r in runs]
            if any(e is None for e in entries):
                continue
            columns = {
                rule: [e.get(rule, {}).get("user_accuracy") for e in entries] for rule in RULES
            }
            for key in ("weighted_accuracy", "std", "worst_share", "jain"):
                columns[key] = [e["mean_last_k"].get(key) for e in entries]
            for key in (
                *("loss", "bits_per_character", "brier", "ece", "ece_floor"),
                *("global_accuracy", "global_bits_per_character", "absent_accuracy"),
            ):
                columns[key] = [e["last"].get(key) for e in entries]
            values = _means(columns)
            if "ece" in values:
                values["ece"] = _ece(runs, readout, predict) or values["ece"]
            found.append(
                Readout(
                    label=runs[0].label,
                    readout=readout,
                    predict=predict,
                    headline=(readout, predict) == runs[0].headline,
                    values=values,
                )
            )
    return found


def _ece(runs: Sequence[RunView], readout: str, predict: str) -> Estimate | None:
    """Return the calibration error of a single run with its interval over examples."""
    from fedkd.report.calibration import over_examples

    bins = written(runs[0].log.records, readout, predict) if len(runs) == 1 else None
    return None if bins is None else over_examples(bins, runs[0].seed)


def _notes(study: StudyResult, runs: dict[str, list[RunView]]) -> list[str]:
    """Say what the numbers are, what the intervals mean, and what the comparison lacks."""
    finished = [r for found in runs.values() for r in found]
    if not finished:
        return ["No run has finished, so there is nothing to compare."]
    k = study.experiment.evaluate.last_k
    notes = [
        f"Accuracy: mean over clients, each on its own test data, after aggregation "
        f"({finished[0].headline[0]}), mean of the last {k} judged rounds, in %.",
        _interval_note(runs),
    ]
    if any("bits_per_character" in r.entry("last") for r in finished):
        notes.append(
            "Text: accuracy is next-token accuracy, the share of tokens that are predicted right. "
            "Bits per character: -log2 p of the text over its characters, mean over clients and "
            "rounds as accuracy; lower is better, and tokenizers can be compared by it."
        )
    if any(r.summary.get("agreement") for r in finished):
        notes.append(
            "As its teacher: how often a student's answer is that of its targets on what it was "
            "taught, in the last round, in %; mean over the clients that were taught, or where "
            "none was over the server's models. Not the share of right answers."
        )
    if any(r.experiment.canaries.kind != "none" for r in finished):
        notes.append(
            "Canaries were planted in the training data (canaries.json of each run), so these are "
            f"not the accuracies without them. What is remembered of them: fedkd audit "
            f"{study.folder}"
        )
    strategies = {r.summary["strategy"] for r in finished}
    several = max(len(found) for found in runs.values()) > 1
    if REFERENCE in strategies and len(runs) > 1:
        notes.append(
            f"Difference: percentage points above {REFERENCE} on the same data, paired by "
            f"{'seed' if several else 'client'}; an interval without 0 is hardly chance."
        )
    if len({r.data for r in finished}) > 1:
        notes.append(
            "Not all rows have the same [data] (a public pool is taken out of the training data, "
            "for instance): accuracies of rows that differ in it cannot be compared. Set the same "
            "data.public for all."
        )
    lacking = [name for name in BASELINES if name not in strategies]
    if lacking:
        added = " ".join(f"compare.{name}.strategy={name}" for name in lacking)
        notes.append(
            f"This comparison lacks {' and '.join(lacking)}, without which nobody can say what "
            f"federation is worth here. Add: {added}"
        )
    return notes


def _interval_note(runs: dict[str, list[RunView]]) -> str:
    counts = sorted({len(found) for found in runs.values() if found})
    if counts[0] > 1:
        seeds = " to ".join(str(c) for c in dict.fromkeys((counts[0], counts[-1])))
        return f"Intervals: 95 %, Student's t over {seeds} seeds."
    return (
        "Intervals: 95 %, bootstrap over the clients of one seed. They do not say how much "
        "another seed would change; for that add seeds=0,1,2."
    )
