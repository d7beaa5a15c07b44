"""What one client uploads in a round, as a mechanism has to know it: public shapes, no values.

A mechanism adds noise where nobody said anything, too, so it must know from public facts alone
which arrays there are. A strategy says so by one of these descriptions for each part of its upload.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedkd.types import Arrays


@dataclass(frozen=True)
class Weights:
    """Arrays that count as a difference from a public reference: weights after local training.

    ``reference`` maps the keys of the upload to what the client started from. Arrays of integers
    (counters) carry no update: the reference goes on.
    """

    reference: Arrays

    kind = "weights"


@dataclass(frozen=True)
class Scores:
    """One row (K,) for each of Q public examples under ``key``, as ``logits`` or ``probs``.

    ``temperatures`` (Q,) are those at which the server fuses the rows as probabilities; None where
    it averages logits as they are. They may depend on public data only.
    """

    key: str
    rows: int
    classes: int
    space: Literal["logits", "probs"]
    temperatures: np.ndarray | None = None

    kind = "scores"


@dataclass(frozen=True)
class Table:
    """Means by class of a client's own data: ``<prefix>/labels`` (P,), ``<prefix>/<field>`` (P, d).

    ``fields`` gives the width of each field, ``simplex`` names those that are probabilities.
    ``counted``: ``<prefix>/counts`` (P,) travels too and weighs the rows; else each client that
    holds a class counts once.
    """

    prefix: str
    classes: int
    fields: Mapping[str, int]
    simplex: frozenset[str] = frozenset()
    counted: bool = False

    kind = "table"


@dataclass(frozen=True)
class Histogram:
    """Numbers of training examples by class under ``key``, (C,) integers."""

    key: str
    classes: int

    kind = "histogram"


Part = Weights | Scores | Table | Histogram
Payload = tuple[Part, ...]
