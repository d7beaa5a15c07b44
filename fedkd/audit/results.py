"""What an audit finds, as the numbers of ``audit.json``: exposure, attacks, bounds, reductions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from fedkd.audit.attacks import PREFERRED
from fedkd.audit.subjects import Subject
from fedkd.privacy.auditing.bound import Bound, per_copy
from fedkd.privacy.auditing.bounds import all_bounds
from fedkd.privacy.auditing.options import USUAL_DELTA, Audit
from fedkd.privacy.auditing.roc import auc, roc, tpr_at
from fedkd.privacy.canaries.draw import CanarySet
from fedkd.privacy.exposure import Exposure, exposure, mean, reduction
from fedkd.rng import Rng
from fedkd.types import Estimate

JUDGED = 0.8
"""Bounds are taken by an attack that judges at least this share of the canaries."""
POINTS = 400
"""At most so many points of a curve are written: enough for any figure."""


def exposures(
    subject: Subject, canaries: CanarySet, audit: Audit
) -> tuple[np.ndarray, np.ndarray, list[Exposure]]:
    """Return exposure in bits (m,), whether it is saturated (m,), and how it was estimated."""
    m = len(canaries.x)
    bits, saturated, how = np.empty(m), np.zeros(m, dtype=bool), []
    for group in subject.groups:
        who = np.arange(len(group.canaries))
        mine, others = group.scores.bits, group.references.bits
        if group.space is not None and group.planted is not None:
            who, mine, others = group.canaries, group.planted, group.space
        found = exposure(mine, others, canaries.space, audit.estimator)
        bits[group.canaries], saturated[group.canaries] = found.bits[who], found.saturated[who]
        how.append(found)
    return bits, saturated, how


def exposure_table(
    bits: np.ndarray,
    saturated: np.ndarray,
    how: Sequence[Exposure],
    canaries: CanarySet,
    audit: Audit,
    rng: Rng,
) -> dict[str, Any]:
    """Return exposure by level of repetition, of canaries planted and of those that were not."""

    def estimate(which: np.ndarray, *purpose: str | int) -> dict[str, Any] | None:
        if not which.any():
            return None
        return plain(mean(bits[which], rng.child("mean", *purpose), audit.confidence))

    levels: dict[str, Any] = {}
    for r in sorted(set(canaries.repetitions.tolist())):
        level = canaries.repetitions == r
        into, out = level & canaries.inside, level & ~canaries.inside
        levels[str(r)] = {
            "inside": estimate(into, "inside", r),
            "outside": estimate(out, "outside", r),
            "saturated": float(saturated[into].mean()) if into.any() else None,
            "bits": [float(b) for b in bits[into]],
        }
    fits = [h.fit for h in how if not math.isnan(h.fit)]
    notes = list(dict.fromkeys(note for h in how for note in h.notes))
    return {
        "method": "/".join(dict.fromkeys(h.method for h in how)),
        "ceiling": number(min(h.ceiling for h in how)),
        "fit": number(min(fits)) if fits else None,
        "levels": levels,
        "all": estimate(canaries.inside, "all"),
        "null": estimate(~canaries.inside, "null"),
        "notes": notes,
    }


def label_exposure(
    subject: Subject, canaries: CanarySet, classes: int, audit: Audit, rng: Rng
) -> dict[str, Any] | None:
    """Return ``log2 K - log2 rank`` of the assigned label among K, of images; None of text.

    Weak: at most log2 K bits, and nothing that text has. Exposure ranks a canary among others.
    """
    rank = subject.scores.rank
    if not rank.all():
        return None
    bits = math.log2(classes) - np.log2(rank)
    found: dict[str, Any] = {"ceiling": math.log2(classes)}
    for name, which in (("inside", canaries.inside), ("outside", ~canaries.inside)):
        estimate = mean(bits[which], rng.child(name), audit.confidence) if which.any() else None
        found[name] = plain(estimate) if estimate is not None else None
    return found


def attack_table(
    scores: Mapping[str, np.ndarray], inside: np.ndarray, confidence: float
) -> dict[str, Any]:
    """Return AUC, TPR at 1 % and 0.1 % FPR, and the curve of every attack."""
    table = {}
    for name, values in scores.items():
        known = np.isfinite(values)
        into, out = values[known & inside], values[known & ~inside]
        if not len(into) or not len(out):
            continue
        curve = roc(into, out)
        keep = np.unique(np.linspace(0, len(curve.fpr) - 1, POINTS).round().astype(int))
        table[name] = {
            "auc": plain(auc(into, out, confidence=confidence)),
            "tpr": {
                f"{fpr:g}": plain(tpr_at(into, out, fpr, confidence=confidence))
                for fpr in (0.01, 0.001)
            },
            "judged": int(known.sum()),
            "inside": len(into),
            "outside": len(out),
            "roc": {
                "fpr": [float(v) for v in curve.fpr[keep]],
                "tpr": [float(v) for v in curve.tpr[keep]],
            },
        }
    return table


def bound_table(
    scores: Mapping[str, np.ndarray],
    canaries: CanarySet,
    audit: Audit,
    unit: str,
    adjacency: str = "add-remove",
) -> list[dict[str, Any]]:
    """Return lower bounds on epsilon by the preferred attack: of all canaries, and of each level.

    What a coin changes is a group of protected units, see :func:`_group`; the bound of a group of
    r is divided by r (group privacy); over all levels, by the largest.
    """
    name = _preferred(scores)
    values, found = scores[name], []
    known = np.isfinite(values)
    levels = sorted(set(canaries.repetitions.tolist()))
    delta = USUAL_DELTA if audit.delta is None else audit.delta
    for level in ["all", *levels] if len(levels) > 1 else levels:
        chosen = known & ((canaries.repetitions == level) | (level == "all"))
        into, out = values[chosen & canaries.inside], values[chosen & ~canaries.inside]
        if not len(into) or not len(out):
            continue
        size, about = _group(canaries, chosen, unit, adjacency)
        for bound in all_bounds(into, out, confidence=audit.confidence, delta=delta):
            one = per_copy(bound, size) if size > 1 else bound
            one = replace(one, assumes=f"{one.assumes}; {about}")
            found.append({**of_bound(one), "attack": name, "level": str(level), "group": size})
    return found


def _preferred(scores: Mapping[str, np.ndarray]) -> str:
    """Return the first preferred attack that judges most canaries, which no target's coin tells.

    A stronger attack on half of them certifies less than a weaker one on all.
    """
    able = [n for n in PREFERRED if n in scores and np.isfinite(scores[n]).mean() >= JUDGED]
    return able[0] if able else next(iter(scores))


def _group(canaries: CanarySet, chosen: np.ndarray, unit: str, adjacency: str) -> tuple[int, str]:
    """Return how many neighbouring steps a coin is, and in words what it changes.

    Under unit ``example`` every row that it adds or removes. Under ``client`` each holder is there
    in either case and sends something else: one step where neighbours replace a client, but two
    where they add, remove or silence one.
    """
    rows = int(canaries.changed[chosen].max())
    if unit == "example":
        if canaries.options.share:
            return rows, f"a coin replaces {rows // 2} examples at most"
        return rows, f"a coin adds {rows} copies at most, and clients' sizes are public"
    if unit == "client":
        steps = canaries.options.clients * (1 if adjacency == "replace-one" else 2)
        return steps, f"a coin changes what {canaries.options.clients} holders send: {steps} steps"
    return 1, f"epsilon is that of a whole canary, of up to {rows} rows: nothing smaller is claimed"


def reductions(
    bits: Mapping[str, np.ndarray], inside: np.ndarray, rng: Rng, confidence: float
) -> dict[str, Any]:
    """Return by how much each student remembers less than the teacher, raw and as excess.

    Also against the student named ``plain``, where there is one: the published comparison.
    """
    table: dict[str, Any] = {}
    for name, own in bits.items():
        if not name.startswith("student:"):
            continue
        for against in ("teacher", "student:plain"):
            if against not in bits or against == name:
                continue
            raw, excess = reduction(
                bits[against][inside], own[inside], rng.child("reduction"), confidence
            )
            key = name.removeprefix("student:")
            key = key if against == "teacher" else f"{key} against plain"
            table[key] = {"raw": plain(raw), "excess": plain(excess)}
    return table


def of_bound(bound: Bound) -> dict[str, Any]:
    """Return a bound as JSON."""
    return {k: number(v) if isinstance(v, float) else v for k, v in asdict(bound).items()}


def plain(estimate: Estimate) -> dict[str, Any]:
    """Return an estimate as JSON, without numbers that JSON does not have."""
    return {k: number(v) if isinstance(v, float) else v for k, v in asdict(estimate).items()}


def number(value: float) -> float | str | None:
    """Return a number as JSON has it: ``"inf"`` for infinity, None for NaN."""
    if math.isnan(value):
        return None
    return float(value) if math.isfinite(value) else "inf"
