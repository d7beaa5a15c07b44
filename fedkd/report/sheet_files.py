"""Sheets as files: Markdown to read, CSV to sort, LaTeX for a paper, JSON for programs.

The same results give the same bytes: no times, dates or paths, except in sheets that are of time.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedkd.engine.folder import write_text
from fedkd.report import latex
from fedkd.report.collection import Collection
from fedkd.report.sheets import Cell, Sheet
from fedkd.report.tables import estimate_table

JSON = "results.json"


def write(collection: Collection, sheets: Sequence[Sheet], folder: Path) -> list[Path]:
    """Write each sheet as ``NAME.md``, ``.csv`` and ``.tex``, and all of them as ``results.json``.

    ``results.json`` leaves out what is of time; that has a JSON file of its own. Files of sheets
    that there were before and are no more, as ``missing``, are removed.

    Raises:
        RunError: the disk is full or not writable.
    """
    texts: dict[str, str] = {}
    for sheet in sheets:
        texts[f"{sheet.name}.md"] = markdown(sheet)
        texts[f"{sheet.name}.csv"] = csv_text(sheet)
        texts[f"{sheet.name}.tex"] = latex.table(sheet)
        if sheet.timed:
            texts[f"{sheet.name}.json"] = _json({"sheets": [plain(sheet)]})
    axes = {key: list(values) for key, values in collection.axes.items()}
    results = [plain(sheet) for sheet in sheets if not sheet.timed]
    texts[JSON] = _json({"axes": axes, "labels": list(collection.labels), "sheets": results})
    for name, text in texts.items():
        write_text(folder / name, text)
    if not any(sheet.name == "missing" for sheet in sheets):
        for suffix in (".md", ".csv", ".tex"):
            (folder / f"missing{suffix}").unlink(missing_ok=True)
    return [folder / name for name in texts]


def markdown(sheet: Sheet) -> str:
    """Return a sheet as Markdown, the best numbers in bold."""
    titles = [escaped(column.title) for column in sheet.columns]
    rule = "|".join("---" if column.kind == "text" else "--:" for column in sheet.columns)
    lines = [f"| {' | '.join(titles)} |", f"|{rule}|"]
    lines += [f"| {' | '.join(_marked(cell) for cell in row)} |" for row in sheet.rows]
    notes = "".join(f"- {escaped(note)}\n" for note in sheet.notes)
    table = "\n".join(lines)
    return f"# {escaped(sheet.title)}\n\n{table}\n" + (f"\n{notes}" if notes else "")


def escaped(text: str) -> str:
    r"""Return text that Markdown shows as it is, on one line.

    >>> print(escaped("a|b <script> x_y & *z*"))
    a\|b &lt;script&gt; x\_y &amp; \*z\*
    """
    kept = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_|$~]|\[(?=[^\d+-]))", r"\\\1", kept)


def _marked(cell: Cell) -> str:
    text = escaped(cell.text)
    return f"**{text}**" if cell.best else text


def csv_text(sheet: Sheet) -> str:
    """Return a sheet as CSV: of each estimate value, low, high, n and method, unrounded."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    parts = ("value", "low", "high", "n", "method")
    names: list[str] = []
    for column in sheet.columns:
        of_estimate = [column.key if p == "value" else f"{column.key}_{p}" for p in parts]
        names += of_estimate if column.kind == "estimate" else [column.key]
    writer.writerow(names)
    for row in sheet.rows:
        cells: list[Any] = []
        for column, cell in zip(sheet.columns, row, strict=True):
            if column.kind == "estimate":
                found = estimate_table(cell.estimate)
                cells += [found.get(part) for part in parts]
            else:
                cells.append(_plain(cell))
        writer.writerow("" if value is None else value for value in cells)
    return stream.getvalue()


def plain(sheet: Sheet) -> dict[str, Any]:
    """Return a sheet as JSON can say it; what is unknown is null, and infinity is text."""
    rows = []
    for row in sheet.rows:
        entry: dict[str, Any] = {}
        for column, cell in zip(sheet.columns, row, strict=True):
            if column.kind == "estimate":
                found = estimate_table(cell.estimate)
                entry[column.key] = {**found, "best": cell.best} if found else None
            else:
                entry[column.key] = _plain(cell)
        rows.append(entry)
    return {
        "name": sheet.name,
        "title": sheet.title,
        "columns": [{"key": column.key, "title": column.title} for column in sheet.columns],
        "rows": rows,
        "notes": list(sheet.notes),
    }


def _plain(cell: Cell) -> Any:
    return cell.text if cell.value is None else cell.value


def _json(table: dict[str, Any]) -> str:
    return json.dumps({"version": 1, **table}, indent=1, allow_nan=False) + "\n"
