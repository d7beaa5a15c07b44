"""A finished figure with its files: what draws it and what shows it agree on this and no more."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Drawn:
    """One figure: ``name`` is its file stem, ``caption`` says what it shows and what it lacks.

    ``svg`` follows the page's colours (light or dark) by CSS variables; some figures have none.
    ``section`` groups figures: accuracy, axis, fairness, teachers, traffic, costs, time, privacy,
    clients, exposure, data, differences.
    """

    name: str
    title: str
    caption: str
    svg: Path | None
    png: Path
    pdf: Path
    section: str
