"""The whole report of some folders: tables, figures, one HTML page; from disk, nothing is run."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedkd.errors import ConfigError
from fedkd.report.collection import Collection, collect
from fedkd.report.measures import Target, default_target
from fedkd.sweep.plan import CONFIG, INDEX

if TYPE_CHECKING:
    from rich.console import Console

    from fedkd.report.drawn import Drawn
    from fedkd.report.sheets import Sheet

PAGE, TABLES, PARQUET = "report.html", "tables", "results.parquet"
LONG = ("paired", "fidelity", "hacking", "calibration", "costs")
"""Tables that are in the files and on the page, but not printed."""
COMMANDS = "commands.txt"
"""File of a sweep's folder that keeps what was typed."""


@dataclass(frozen=True, eq=False)
class Report:
    """What a report is made of."""

    collection: Collection
    target: Target
    sheets: list[Sheet]
    drawn: list[Drawn]
    page: Path


def full(
    folders: Sequence[str | Path],
    out: str | Path,
    *,
    target: float | None = None,
    parquet: bool = False,
    console: Console | None = None,
    workspace: Path | None = None,
) -> Report:
    """Write ``report.html``, ``tables/`` and ``plots/`` of any number of folders into ``out``.

    Args:
        folders: runs, comparisons, sweeps; several are merged into one.
        out: folder of the report.
        target: accuracy in [0, 1] that rounds and bytes are counted to; none: what clients reach
            alone.
        parquet: write all records into ``results.parquet``, too.
        console: tables are printed there.
        workspace: where presets are looked for.

    Raises:
        ConfigError: a folder holds no run, or pyarrow is missing.
        RunError: the disk is full or not writable.
    """
    from fedkd.report import page, sweep_figures, sweep_tables
    from fedkd.report import parquet as records

    out = Path(out)
    if target is not None and not 0 <= target <= 1:
        raise ConfigError(f"target = {target:g} is no accuracy: give 0 to 1, as 0.8 for 80 %")
    if parquet:
        records.require(out / PARQUET)
    collection = collect(folders, workspace=workspace)
    aim = default_target(collection) if target is None else Target(target, "as asked for")
    sheets = sweep_tables.tables(collection, aim)
    if console is not None:
        sweep_tables.show([sheet for sheet in sheets if sheet.name not in LONG], console)
    sweep_tables.write(collection, sheets, out / TABLES)
    if parquet:
        records.write(collection, out / PARQUET)
    drawn = sweep_figures.draw(collection, aim, out)
    content = page.content(collection, sheets, drawn, commands(collection, out), aim)
    html = page.write(page.render(content), out / PAGE)
    return Report(collection, aim, sheets, drawn, html)


def commands(collection: Collection, out: Path) -> list[str]:
    """Return the commands that make these results and this report: as typed, then from the files.

    Folders are named as they were given.
    """
    found: list[str] = []
    for folder in collection.folders:
        typed = folder / COMMANDS
        if typed.is_file():
            found += typed.read_text(encoding="utf-8").splitlines()
        if (folder / INDEX).is_file():
            words = ["fedkd", "sweep", str(folder / CONFIG), "--out", str(folder)]
        else:
            words = ["fedkd", "run", "--resume", "--out", str(folder)]
        found.append(shlex.join(words))
    places = [str(folder) for folder in collection.folders]
    own = [] if [Path(p) for p in places] == [out] else ["--out", str(out)]
    found.append(shlex.join(["fedkd", "report", *places, *own]))
    return list(dict.fromkeys(found))
