"""What a reader has to know to read the tables of a sweep, as sentences below them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from fedkd.report.collection import Collection, Group, axis_title
from fedkd.report.comparison import BASELINES
from fedkd.report.measures import Target

NOTHING = "No run has finished, so there is nothing to compare."
BOLD = (
    "Bold: the best label of a point, and every label whose paired difference to it has an "
    "interval with 0 in it (t over seeds; with one seed the bootstrap over clients)."
)
MANY = "Intervals are not corrected for the number of comparisons."


def headline(collection: Collection, target: Target, bold: bool) -> tuple[str, ...]:
    """Return the notes of the headline table."""
    finished = _finished(collection)
    if not finished:
        return (NOTHING,)
    notes = [*collection.notes, _accuracy(collection), intervals(collection)]
    notes += _differences(finished)
    notes += [_target(finished, target), *([BOLD] if bold else [])]
    notes.append(
        "Worst 10 %: mean accuracy of the worst 10 % of the clients; std: standard deviation over "
        "clients, in percentage points; Jain: 1 where all clients are equally well served. MB are "
        "those of training, all clients and rounds together."
    )
    if any(curves.bits is not None for g in finished for curves in g.curves):
        notes.append(
            "Text: accuracy is next-token accuracy, the share of tokens that are predicted right. "
            "Bits per character: lower is better, and tokenizers can be compared by it."
        )
    return (*notes, *_lacks(collection))


def by_axis(collection: Collection, bold: bool) -> tuple[str, ...]:
    """Return the notes of the table along the main axis."""
    if not _finished(collection):
        return (NOTHING,)
    return (_accuracy(collection), intervals(collection), *([BOLD] if bold else []))


def caption(collection: Collection, bold: bool, target: Target | None = None) -> str:
    """Return in one paragraph what the numbers are: it goes below a table in a paper."""
    finished = _finished(collection)
    if not finished:
        return NOTHING
    parts = [_accuracy(collection), intervals(collection)]
    if target is not None:
        parts.append(_target(finished, target))
    return " ".join([*parts, *([BOLD] if bold else [])])


def paired(collection: Collection, dropped: int) -> tuple[str, ...]:
    """Return the notes of the paired differences; ``dropped`` pairs have nothing in common."""
    if not _finished(collection):
        return (NOTHING,)
    numbers = [key for key, values in collection.axes.items() if len(values) > 1]
    notes = [
        "Difference: user accuracy of the label minus that of what it stands against, on the same "
        "seeds and clients; positive is better.",
        *_how_paired(collection),
        f"An interval without 0 is hardly chance, of t with few seeds. {MANY}",
    ]
    if numbers:
        named = ", ".join(axis_title(key) for key in numbers)
        notes.append(f"Against a value of an axis ({named}): the same label at its largest value.")
    if not any(g.strategy in BASELINES for g in _finished(collection)):
        notes.append(f"Without {' and '.join(BASELINES)} labels stand against the first.")
    if dropped:
        notes.append(
            f"{dropped} differences are left out: the two have no seed in common, or their [data] "
            "differ, so that they cannot be paired."
        )
    return tuple(notes)


def paired_caption(collection: Collection) -> str:
    """Return what the paired differences are, in one paragraph."""
    lead = "Differences of user accuracy in percentage points, paired by seed and client."
    return " ".join([lead, *_how_paired(collection), MANY])


def intervals(collection: Collection) -> str:
    """Return how intervals of single labels were made, and of how many seeds."""
    counts = sorted({len(g.runs) for g in _finished(collection)})
    if counts[-1] == 1:
        return (
            "Intervals: 95 %, bootstrap over the clients of one seed. They do not say how much "
            "another seed would change; for that add --seeds 3."
        )
    text = f"Intervals: 95 %, Student's t over {_span(counts, 'to')} seeds."
    if counts[0] == 1:
        text += " Where there is one seed: bootstrap over its clients, which says less."
    return text


def _how_paired(collection: Collection) -> list[str]:
    counts = sorted({len(g.runs) for g in _finished(collection)})
    if not counts:
        return []
    if counts[-1] == 1:
        return [
            "Intervals: 95 %, percentile bootstrap over the clients of one seed; other seeds are "
            "not covered."
        ]
    notes = [
        "Bootstrap: 95 %, percentiles of resampled seeds, and of clients within each. t over "
        "seeds: 95 %, Student's t of the seeds' mean differences."
    ]
    if counts[0] < 10:
        notes.append(
            f"With {_span([c for c in counts if c > 1], 'to')} seeds rely on t: the bootstrap is "
            "too narrow where seeds differ (of its 95 %, 72 % were measured with 3 seeds, 82 % "
            "with 5, 90 % with 10)."
        )
    return notes


def _accuracy(collection: Collection) -> str:
    runs = [run for group in _finished(collection) for run in group.runs]
    readouts = ", ".join(sorted({run.headline[0] for run in runs}))
    last_k = _span(sorted({run.experiment.evaluate.last_k for run in runs}), "or")
    return (
        "Accuracy: mean over clients, each on its own test data, after aggregation "
        f"({readouts}), mean of the last {last_k} judged rounds, in %."
    )


def _differences(finished: list[Group]) -> list[str]:
    there = [name for name in BASELINES if any(g.strategy == name for g in finished)]
    if not there:
        return []
    return [
        f"vs {' and '.join(there)}: percentage points above it at the same point, on the same "
        "data, paired by seed and client; bootstrap over both, and Student's t over seeds, which "
        f"is the one to rely on with few seeds: its interval without 0 is hardly chance. {MANY}"
    ]


def _target(finished: list[Group], target: Target) -> str:
    coarse = max((_step(c.rounds) for g in finished for c in g.curves), default=1)
    text = (
        f"To {target} ({target.origin}): the first judged round whose mean over clients is at or "
        "above it, and the bytes both ways until then; mean over the seeds that reach it, which "
        "flatters where not all do."
    )
    if coarse > 1:
        text += f" Rounds are judged every {coarse}, so it can be up to {coarse - 1} too late."
    return text


def _step(rounds: np.ndarray) -> int:
    return int(np.diff(rounds).max()) if len(rounds) > 1 else 1


def _lacks(collection: Collection) -> list[str]:
    """Return what the collection lacks, or mixes."""
    notes = []
    finished = _finished(collection)
    runs = [run for group in finished for run in group.runs]
    if any(run.experiment.canaries.kind != "none" for run in runs):
        notes.append(
            "Canaries were planted in the training data (canaries.json of each run), so these are "
            "not the accuracies without them."
        )
    if any(_mixed(g for g in finished if g.point == point) for point in collection.points()):
        notes.append(
            "Not all labels of a point have the same [data] (a public pool is taken out of the "
            "training data, for instance): accuracies that differ in it cannot be compared. Set "
            "the same data.public for all."
        )
    strategies = {group.strategy for group in finished}
    lacking = [name for name in BASELINES if name not in strategies]
    if lacking:
        added = " ".join(f"compare.{name}.strategy={name}" for name in lacking)
        added += f", or {','.join(lacking)} where strategy is an axis"
        notes.append(
            f"This comparison lacks {' and '.join(lacking)}, without which nobody can say what "
            f"federation is worth here. Add: {added}"
        )
    short = [g for g in collection.groups if g.missing]
    if short:
        runs_ = sum(len(g.missing) for g in short)
        notes.append(f"{runs_} runs have no result yet, see missing: numbers are of the others.")
    return notes


def _mixed(groups: Iterable[Group]) -> bool:
    return len({group.runs[0].data for group in groups}) > 1


def _finished(collection: Collection) -> list[Group]:
    return [group for group in collection.groups if group.runs]


def _span(counts: list[int], word: str) -> str:
    ends = dict.fromkeys((counts[0], counts[-1]))
    return f" {word} ".join(str(count) for count in ends)
