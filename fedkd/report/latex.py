"""Sheets as LaTeX tables with the rules of ``booktabs``, to be put into a paper as they are."""

from __future__ import annotations

import re

from fedkd.report.sheets import Cell, Sheet

SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "–": "--",
    "±": r"$\pm$",
    "≥": r"$\geq$",
    **{sign: f"\\{sign}" for sign in "_%&#${}"},
}


def escaped(text: str) -> str:
    r"""Return text that LaTeX sets as it is, on one line.

    >>> print(escaped("50 % of a_b & c"))
    50 \% of a\_b \& c
    """
    return "".join(SPECIAL.get(letter, letter) for letter in " ".join(text.split()))


def table(sheet: Sheet) -> str:
    """Return a ``table`` environment; its preamble needs ``booktabs`` only.

    Columns that are not for papers are left out, and named in a comment.
    """
    shown = [i for i, column in enumerate(sheet.columns) if column.paper]
    columns = [sheet.columns[i] for i in shown]
    left_out = [column.title for column in sheet.columns if not column.paper]
    lines = ["% \\usepackage{booktabs}"]
    if left_out:
        listed = " ".join(", ".join(left_out).split())
        lines.append(f"% left out here, see {sheet.name}.csv: {listed}")
    lines += [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escaped(sheet.caption or sheet.title)}}}",
        rf"\label{{tab:{sheet.name.replace('_', '-')}}}",
        r"\small",
        rf"\begin{{tabular}}{{{''.join(_alignment(sheet, i) for i in shown)}}}",
        r"\toprule",
        _row([escaped(column.title) for column in columns]),
        r"\midrule",
    ]
    for number, row in enumerate(sheet.rows):
        if number and sheet.block_of(number) != sheet.block_of(number - 1):
            lines.append(r"\midrule")
        lines.append(_row([_set(row[i], sheet.columns[i].kind != "text") for i in shown]))
    lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def _alignment(sheet: Sheet, column: int) -> str:
    if sheet.columns[column].kind != "text":
        return "r"
    longest = max((len(row[column].text) for row in sheet.rows), default=0)
    return r"p{0.5\linewidth}" if longest > 50 else "l"


def _row(cells: list[str]) -> str:
    # A row that begins with a bracket would be taken for an option of the line break before it.
    guarded = [f"{{}}{cell}" if cell.startswith(("[", "*")) else cell for cell in cells]
    return " & ".join(guarded) + r" \\"


def _set(cell: Cell, number: bool) -> str:
    text = escaped(cell.text)
    if number:
        text = re.sub(r"(?<![\w.-])-(?=\d)", "$-$", text)
    return rf"\textbf{{{text}}}" if cell.best else text
