"""The summary of a run: each read-out at the end, as mean of the last k, chosen on validation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedkd.metrics.accuracy import user_accuracy, weighted_accuracy
from fedkd.metrics.fairness import spread
from fedkd.metrics.log import READOUTS, Log
from fedkd.metrics.selection import chosen_on_validation


def summarise(log: Log, last_k: int) -> dict[str, Any]:
    """Return accuracies by read-out and predictor, with fairness, loss, bytes and seconds.

    Each entry of ``readouts`` has ``last`` (the last judged round), ``mean_last_k`` and
    ``chosen_on_validation`` (the round with the best mean validation accuracy; never the best on
    test). Each has ``user_accuracy`` (unweighted mean over clients), ``weighted_accuracy`` (by
    test examples), ``std``, ``worst_share``, ``jain`` and, last only, ``by_client``.

    Of text accuracies are those of the next token, and there is ``bits_per_character`` as well, the
    unweighted mean over clients; lower is better.

    ``last`` has ``ece``, ``ece_floor`` and ``brier`` of all clients' test examples together, and
    ``mean_last_k`` has ``ece``, where calibration was judged. ``agreement`` with teachers, where
    soft targets taught anybody, is by measure: the mean over clients, and ``server/MEASURE/MODEL``.
    """
    readouts: dict[str, Any] = {}
    for readout in READOUTS:
        source = "own" if readout == "stale" else readout
        for predict in log.predictors(source):
            entry = _readout(log, readout, predict, last_k)
            if entry:
                readouts.setdefault(readout, {})[predict] = entry
    found = {"readouts": readouts, "bytes": _bytes(log), "seconds": _seconds(log)}
    agreement = _agreement(log)
    return {**found, "agreement": agreement} if agreement else found


def _readout(log: Log, readout: str, predict: str, last_k: int) -> dict[str, Any]:
    test = log.table("accuracy", "test", readout, predict)
    if test.size == 0 or np.isnan(test).all():
        return {}
    examples = log.by_client("examples", "test")
    rounds = log.rounds("accuracy", "own" if readout == "stale" else readout)
    with_values = [i for i in range(len(test)) if not np.isnan(test[i]).all()]
    final = with_values[-1]
    found: dict[str, Any] = {
        "last": {"round": rounds[final], **_judged(test[final], examples)},
        "mean_last_k": _mean([_judged(test[i], examples) for i in with_values[-last_k:]]),
    }
    found["last"]["by_client"] = [None if np.isnan(v) else float(v) for v in test[final]]
    validation = log.table("accuracy", "validation", readout, predict)
    if not np.isnan(validation).all():
        usable = [i for i in with_values if not np.isnan(validation[i]).all()]
        best, _ = chosen_on_validation(
            [float(np.nanmean(validation[i])) for i in usable],
            [float(np.nanmean(test[i])) for i in usable],
        )
        row = usable[best]
        found["chosen_on_validation"] = {
            "round": rounds[row],
            **_judged(test[row], examples),
        }
    loss = log.table("loss", "test", readout, predict)
    found["last"]["loss"] = _nanmean(loss[final])
    for split, metric in (
        ("global", "accuracy"),
        ("absent", "accuracy"),
        ("global", "bits_per_character"),
    ):
        values = log.table(metric, split, readout, predict)[final]
        if not np.isnan(values).all():
            found["last"][f"{split}_{metric}"] = _nanmean(values)
    _add_bits(found, log.table("bits_per_character", "test", readout, predict), rounds, last_k)
    _add_calibration(found, log, (readout, predict), [rounds[i] for i in with_values[-last_k:]])
    return found


def _add_calibration(
    found: dict[str, Any], log: Log, of: tuple[str, str], rounds: Sequence[int]
) -> None:
    """Add what the pooled bins gave in the last ``rounds``; ``stale`` answers were not pooled."""
    for metric in ("ece", "ece_floor", "brier"):
        by_round = log.series(metric, "test", *of)
        if rounds[-1] in by_round:
            found["last"][metric] = by_round[rounds[-1]]
        judged = [by_round[t] for t in rounds if t in by_round]
        if metric == "ece" and judged:
            found["mean_last_k"][metric] = float(np.mean(judged))


def _add_bits(found: dict[str, Any], table: np.ndarray, rounds: Sequence[int], last_k: int) -> None:
    """Add bits per character, of the rounds that accuracies are of, where text was judged."""
    means = {t: _nanmean(row) for t, row in zip(rounds, table, strict=True)}
    judged = [value for value in means.values() if value is not None]
    if not judged:
        return
    found["mean_last_k"]["bits_per_character"] = float(np.mean(judged[-last_k:]))
    for rule in ("last", "chosen_on_validation"):
        if rule in found:
            found[rule]["bits_per_character"] = means[found[rule]["round"]]


def _agreement(log: Log) -> dict[str, float]:
    """Return how students do as their teachers in the last round in which any was compared."""
    found: dict[str, dict[int, list[float]]] = {}
    for r in log.records:
        before, _, name = r.metric.partition("agreement/")
        if name and before in ("", "server/"):
            found.setdefault(before + name, {}).setdefault(r.round, []).append(r.value)
    return {name: float(np.mean(by[max(by)])) for name, by in sorted(found.items())}


def _judged(row: np.ndarray, examples: np.ndarray) -> dict[str, float]:
    seen = ~np.isnan(row)
    values = row[seen]
    weights = np.where(np.isnan(examples[seen]), 1.0, examples[seen])
    return {
        "clients": float(seen.sum()),
        "user_accuracy": user_accuracy(values),
        "weighted_accuracy": weighted_accuracy(values, weights),
        **spread(values),
    }


def _mean(entries: list[dict[str, float]]) -> dict[str, float]:
    return {key: float(np.mean([e[key] for e in entries])) for key in entries[0]}


def _nanmean(values: np.ndarray) -> float | None:
    return None if np.isnan(values).all() else float(np.nanmean(values))


def _bytes(log: Log) -> dict[str, float]:
    """Return bytes of training by direction: tensors in all, by kind, and on the wire."""
    totals: dict[str, float] = {}
    for r in log.records:
        if r.metric.startswith(("bytes_", "wire_bytes_")) and r.split in ("train", "evaluate"):
            name = r.metric if r.split == "train" else f"evaluate/{r.metric}"
            totals[name] = totals.get(name, 0.0) + r.value
    return totals


def _seconds(log: Log) -> dict[str, float]:
    totals: dict[str, float] = {}
    for r in log.records:
        if r.metric == "seconds":
            totals[r.split] = totals.get(r.split, 0.0) + r.value
    rounds = len(log.series("seconds", "train"))
    if rounds:
        totals["train_per_round"] = totals["train"] / rounds
    return totals
