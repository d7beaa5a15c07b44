"""Fusing what clients say about a class into what one client is taught, absences masked.

An absent class is never averaged in as zeros: it lowers neither a sum nor a divisor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ClassTable:
    """What one client says about the classes it holds.

    ``labels`` (P,) the classes present, ``probs`` (P, C) a soft label for each (or ``(P, d)``, a
    mean feature, where that is what is exchanged), ``counts`` (P,) the examples behind each.
    """

    labels: np.ndarray
    probs: np.ndarray
    counts: np.ndarray


def class_means(values: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (labels (P,), means (P, d), counts (P,)) of the rows of ``values`` (n, d) by class.

    >>> labels, means, counts = class_means(np.array([[1.0], [3.0], [5.0]]), np.array([2, 2, 0]))
    >>> labels.tolist(), means.tolist(), counts.tolist()
    ([0, 2], [[5.0], [2.0]], [1, 2])
    """
    labels, inverse, counts = np.unique(y, return_inverse=True, return_counts=True)
    sums = np.zeros((len(labels), values.shape[1]), dtype=np.float64)
    np.add.at(sums, inverse, values.astype(np.float64))
    means = (sums / counts[:, None]).astype(np.float32)
    return labels.astype(np.int32), means, counts.astype(np.int32)


def fuse_classes(
    tables: Mapping[int, ClassTable],
    classes: int,
    *,
    leave_out: int | None = None,
    weighting: str = "uniform",
) -> tuple[np.ndarray, np.ndarray]:
    """Return the fused row of every class, (C, d), and a mask (C,) of those that have one.

    ``q_c = sum_k w_kc p_kc / sum_k w_kc`` over the clients k that hold class c, with w = 1
    (``uniform``, Jeong et al. 2018, FD) or the number of examples n_kc (``examples``). Rows are
    soft labels (d = C) or features; without any table d = C. With ``leave_out`` that client's own
    table is not counted: leave-one-out, as FD does. Clients are summed in ascending order, so
    their order in ``tables`` cannot change a bit.
    """
    width = next((t.probs.shape[1] for t in tables.values()), classes)
    sums = np.zeros((classes, width), dtype=np.float64)
    weights = np.zeros(classes, dtype=np.float64)
    for k in sorted(tables):
        if k == leave_out:
            continue
        table = tables[k]
        w = (
            table.counts.astype(np.float64)
            if weighting == "examples"
            else np.ones(len(table.labels))
        )
        sums[table.labels] += w[:, None] * table.probs
        weights[table.labels] += w
    mask = weights > 0
    fused = sums / np.where(mask, weights, 1.0)[:, None]
    return fused.astype(np.float32), mask


def lessons(
    tables: Mapping[int, ClassTable], classes: int, share: str, weighting: str
) -> dict[int, ClassTable]:
    """Return what each client is taught about the classes it holds, and -1 for newcomers.

    ``share``: ``own`` gives a client its own table back (a control: no communication),
    ``mean`` the fusion over all clients, ``leave_one_out`` over all others. A class that nobody
    (else) holds is left out of the table. Key -1 is the mean over everybody, for every class; it
    is missing under ``own``, where nobody learns from others.
    """
    taught = {}
    for k in sorted(tables):
        own = tables[k]
        if share == "own":
            taught[k] = own
            continue
        left_out = k if share == "leave_one_out" else None
        probs, mask = fuse_classes(tables, classes, leave_out=left_out, weighting=weighting)
        known = own.labels[mask[own.labels]]
        taught[k] = ClassTable(known, probs[known], np.ones(len(known), dtype=np.int32))
    if share == "own":
        return taught
    probs, mask = fuse_classes(tables, classes, weighting=weighting)
    every = np.flatnonzero(mask).astype(np.int32)
    taught[-1] = ClassTable(every, probs[every], np.ones(len(every), dtype=np.int32))
    return taught


def over_points(tables: list[ClassTable]) -> ClassTable:
    """Return the mean of several points' tables, class by class over the points that know it."""
    numbered = fuse_classes(dict(enumerate(tables)), tables[0].probs.shape[1])
    known = np.flatnonzero(numbered[1]).astype(np.int32)
    return ClassTable(known, numbered[0][known], np.ones(len(known), dtype=np.int32))
