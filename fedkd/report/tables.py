"""The comparison as text: a table that fits the terminal, Markdown, CSV and JSON with everything.

The terminal shows what fits in its width; the files always have all columns. Fractions are shown
as per cent; CSV and JSON hold the plain numbers.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedkd.engine.folder import write_text
from fedkd.privacy.ledger import rounded_up
from fedkd.report.comparison import Comparison, Readout, Row
from fedkd.types import Estimate

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


@dataclass(frozen=True)
class Column:
    """How a value is shown: ``scale`` times the number with ``digits`` after the point.

    Negative ``digits`` are as many significant ones: 39.8, 0.0123. A ``bound`` is rounded up to
    three of them. ``absent`` is shown where there is no number.
    """

    key: str
    title: str
    scale: float = 100.0
    digits: int = 1
    interval: bool = False
    signed: bool = False
    bound: bool = False
    absent: str = "–"

    def show(self, estimate: Estimate | None) -> str:
        """Return the number, with its interval if this column shows it.

        >>> Column("a", "a", interval=True).show(Estimate(0.5, 0.4, 0.6, 3, "t"))
        '50.0 [40.0, 60.0]'
        >>> small, none = (Estimate(v, v, v, 1, "") for v in (12345.6, 0.0))
        >>> [Column("up", "MB up", 1e-6, -3).show(e) for e in (small, none)]
        ['0.0123', '0']
        >>> Column("epsilon", "epsilon", bound=True).show(Estimate(3.511, 0, 0, 1, ""))
        '3.52'
        """
        if estimate is None:
            return self.absent
        if self.bound:
            return rounded_up(estimate.value)
        sign = "+" if self.signed else ""
        value, low, high = (
            f"{self.scale * v:{sign}.{self._decimals(self.scale * v)}f}"
            for v in (estimate.value, estimate.low, estimate.high)
        )
        return f"{value} [{low}, {high}]" if self.interval and not _no_interval(estimate) else value

    def _decimals(self, value: float) -> int:
        if self.digits >= 0:
            return self.digits
        if value == 0 or math.isnan(value):
            return 0
        return max(0, -self.digits - 1 - math.floor(math.log10(abs(value))))


COLUMNS = (
    Column("mean_last_k", "user accuracy", interval=True),
    Column("bits_per_character", "bits per character", 1.0, 3, interval=True),
    Column("difference", "vs local-only", interval=True, signed=True),
    Column("epsilon", "epsilon", bound=True, absent="none"),
    Column("agreement", "as its teacher", interval=True),
    Column("worst_share", "worst 10 %"),
    Column("bytes_up", "MB up", 1e-6, -3),
    Column("bytes_down", "MB down", 1e-6, -3),
    Column("seconds_per_round", "s/round", 1.0, 2),
    Column("std", "std over clients"),
    Column("last", "last round", interval=True),
    Column("chosen_on_validation", "chosen on validation", interval=True),
    Column("own", "own (after local epoch)"),
    Column("weighted", "weighted by examples"),
    Column("jain", "Jain", 1.0, 3),
    Column("global", "global test"),
    Column("global_bits_per_character", "global bits per character", 1.0, 3),
)
READOUT_COLUMNS = (
    Column("mean_last_k", "mean of last k", interval=True),
    Column("last", "last round", interval=True),
    Column("chosen_on_validation", "chosen on validation", interval=True),
    Column("weighted_accuracy", "weighted by examples"),
    Column("std", "std over clients"),
    Column("worst_share", "worst 10 %"),
    Column("jain", "Jain", 1.0, 3),
    Column("loss", "loss", 1.0, 3),
    Column("brier", "Brier", 1.0, 3),
    Column("ece", "ECE", interval=True),
    Column("ece_floor", "ECE by chance"),
    Column("bits_per_character", "bits per character", 1.0, 3),
    Column("global_accuracy", "global test"),
    Column("global_bits_per_character", "global bits per character", 1.0, 3),
    Column("absent_accuracy", "absent classes"),
)
SOMETIMES = (
    *("agreement", "epsilon", "bits_per_character", "global_bits_per_character"),
    *("brier", "ece", "ece_floor"),
)
"""Columns left out where no run has a value: nobody is taught, no mechanism, no
text, calibration not judged."""


def write(shown: Comparison, study_json: bool = True) -> list[Path]:
    """Write ``results`` and ``readouts`` as Markdown and CSV, and ``summary.json`` of a study."""
    folder = shown.folder
    heads = [{"label": r.label, "error": r.error} for r in shown.rows]
    judged: list[dict[str, str]] = [
        {"label": r.label, "readout": r.readout, "predictor": r.predict} for r in shown.readouts
    ]
    texts = {
        "results.md": markdown(shown),
        "results.csv": _csv(COLUMNS, heads, shown.rows),
        "readouts.md": readouts_markdown(shown),
        "readouts.csv": _csv(READOUT_COLUMNS, judged, shown.readouts),
    }
    if study_json:
        texts["summary.json"] = json.dumps(plain(shown), indent=2, allow_nan=False) + "\n"
    for name, content in texts.items():
        write_text(folder / name, content)
    return [folder / name for name in texts]


def text(shown: Comparison, width: int = 100) -> str:
    """Return the table as plain text of at most ``width`` columns."""
    from rich.console import Console

    stream = io.StringIO()
    show(shown, Console(file=stream, width=width, color_system=None, legacy_windows=False))
    return stream.getvalue().rstrip("\n")


def show(shown: Comparison, console: Console) -> None:
    """Print the table with as many columns as fit, and the notes below."""
    from rich.measure import Measurement
    from rich.text import Text

    columns = [c for c in COLUMNS if any(c.key in r.values for r in shown.rows)]
    table = _terminal(shown, columns)
    unbounded = console.options.update(max_width=10_000)
    while len(columns) > 1 and Measurement.get(console, unbounded, table).minimum > console.width:
        columns.pop()
        table = _terminal(shown, columns)
    console.print(table)
    for note in shown.notes:
        console.print(Text(note, style="dim"))
    _show_claims(shown, console)


def _show_claims(shown: Comparison, console: Console) -> None:
    """Print what is claimed about privacy, and what is not covered, one item a paragraph."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    if shown.claims.sentences:
        console.print("\nPrivacy", style="bold")
    for line in shown.claims.lines():
        console.print(Padding(Text(line), (0, 0, 0, 2), expand=False))
    if shown.claims.not_covered:
        console.print("  Not covered:")
        listed = Table.grid(padding=(0, 1))
        for line in shown.claims.open_lines():
            listed.add_row("   -", Text(line, style="dim"))
        console.print(listed)


def _terminal(shown: Comparison, columns: Sequence[Column]) -> RenderableType:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", min_width=min(20, max(len(r.label) for r in shown.rows)))
    for column in columns:
        cells = [column.show(r.values.get(column.key)) for r in shown.rows]
        # Numbers never break over lines: columns are left out instead.
        width = max(len(part) for part in (*cells, *column.title.split()))
        table.add_column(column.title, justify="right", width=width)
    for row in shown.rows:
        if row.values:
            cells = [column.show(row.values.get(column.key)) for column in columns]
            table.add_row(Text(row.label), *cells)
        else:
            blank = [""] * (len(columns) - 1)
            table.add_row(Text(row.label), Text("failed", style="red"), *blank)
    return table


def markdown(shown: Comparison) -> str:
    """Return the table with all columns, and the notes, as Markdown."""
    columns = _held(COLUMNS, shown.rows)
    rows = [
        [r.label, *(c.show(r.values.get(c.key)) for c in columns)]
        if r.values
        else [r.label, f"failed: {r.error}", *[""] * (len(columns) - 1)]
        for r in shown.rows
    ]
    failed = [f"{r.label}: {r.error}" for r in shown.rows if r.values and r.error]
    notes = "\n".join(f"- {note}" for note in (*shown.notes, *failed))
    table = _markdown(["", *(c.title for c in columns)], rows)
    return (
        f"# {shown.name}\n\n{table}\n\n{notes}\n\n{_claims_markdown(shown)}"
        "Every read-out and predictor: [readouts.md](readouts.md). Figures: [plots](plots/).\n"
    )


def _held(columns: Sequence[Column], rows: Sequence[Row] | Sequence[Readout]) -> list[Column]:
    held = {key for row in rows for key in row.values}
    return [c for c in columns if c.key in held or c.key not in SOMETIMES]


def _claims_markdown(shown: Comparison) -> str:
    if not shown.claims.sentences:
        return ""
    text = "## Privacy\n\n" + "".join(f"- {line}\n" for line in shown.claims.lines())
    if shown.claims.not_covered:
        text += "\nNot covered:\n\n"
        text += "".join(f"- {line}\n" for line in shown.claims.open_lines())
    return text + "\n"


def readouts_markdown(shown: Comparison) -> str:
    """Return every read-out and predictor as Markdown."""
    columns = _held(READOUT_COLUMNS, shown.readouts)
    rows = [
        [
            r.label,
            r.readout,
            f"**{r.predict}**" if r.headline else r.predict,
            *(c.show(r.values.get(c.key)) for c in columns),
        ]
        for r in shown.readouts
    ]
    table = _markdown(["", "read-out", "predictor", *(c.title for c in columns)], rows)
    text = any("bits_per_character" in r.values for r in shown.readouts)
    of_text = " Of text: accuracy of the next token, loss in nats a token." if text else ""
    judged = any("ece" in r.values for r in shown.readouts)
    sure = (
        "- ECE (in %) and Brier: of all clients' test examples together in the last round; ECE "
        "over 15 bins of confidence. Chance alone makes it larger than 0: compare with the column "
        "beside it, which is about what a calibrated predictor as sure as this one has. Its 95 % "
        "interval: over seeds (t), of one seed over examples (basic bootstrap).\n"
    )
    return (
        f"# {shown.name}: read-outs and predictors\n\n{table}\n\n"
        "- own: right after a client's local epoch. composite: fresh federated blocks with the "
        "client's own personal ones, after aggregation. stale: as own, with the last value of "
        "clients that sat out.\n"
        "- The headline of each method is in bold. Accuracies in %; loss, global test and absent "
        f"classes are of the last round.{of_text}\n{sure if judged else ''}"
    )


def _markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(" ".join(c.replace("|", "\\|").split()) for c in cells) + " |"

    rule = "|" + "|".join("---" if i == 0 else "--:" for i in range(len(titles))) + "|"
    return "\n".join([line(titles), rule, *(line(row) for row in rows)])


def _csv(
    columns: Sequence[Column], heads: Sequence[dict[str, str]], rows: Sequence[Row | Readout]
) -> str:
    """Return one line a row: value, low, high, n of every column, and how intervals were made."""
    parts = ("value", "low", "high", "n", "method")
    names = [f"{c.key}" if p == "value" else f"{c.key}_{p}" for c in columns for p in parts]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, [*(heads[0] if heads else {}), *names], lineterminator="\n")
    writer.writeheader()
    for head, row in zip(heads, rows, strict=True):
        cells: dict[str, Any] = dict(head)
        for column in columns:
            for part, value in estimate_table(row.values.get(column.key)).items():
                cells[column.key if part == "value" else f"{column.key}_{part}"] = value
        writer.writerow(cells)
    return stream.getvalue()


def plain(shown: Comparison) -> dict[str, Any]:
    """Return the comparison as JSON can say it; what is unknown is null."""
    return {
        "name": shown.name,
        "notes": shown.notes,
        "privacy": shown.claims.lines(),
        "not_covered": shown.claims.open_lines(),
        "rows": [
            {
                "label": r.label,
                "strategy": r.strategy,
                "seeds": list(r.seeds),
                "predict": r.predict,
                "error": r.error,
                **{key: estimate_table(value) for key, value in r.values.items()},
            }
            for r in shown.rows
        ],
        "readouts": [
            {
                "label": r.label,
                "readout": r.readout,
                "predict": r.predict,
                "headline": r.headline,
                **{key: estimate_table(value) for key, value in r.values.items()},
            }
            for r in shown.readouts
        ],
    }


def estimate_table(estimate: Estimate | None) -> dict[str, Any]:
    """Return an estimate as a table without NaN."""
    if estimate is None:
        return {}
    bare = _no_interval(estimate)
    return {
        # JSON has no infinity, which an epsilon can be.
        "value": "inf" if estimate.value == math.inf else estimate.value,
        "low": None if bare else estimate.low,
        "high": None if bare else estimate.high,
        "n": estimate.n,
        "method": None if bare else estimate.method,
    }


def _no_interval(estimate: Estimate) -> bool:
    return math.isnan(estimate.low)
