"""The one-shot audit on the screen: what is claimed, estimated and certified, run by run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

NOTE = (
    "Canary clients sent random directions into the server's sum. estimated: between their "
    "cosines with the final update and the null N(0, 1/d); certified for no mechanism, and too "
    "high for few canaries. at least: a lower bound, with the confidence of audit.confidence. "
    "claimed: for a client, by the ledger; canary clients come on top of the others."
)


def rows(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Return label, seed, claimed, estimated and certified epsilon, mean cosine, of each run."""
    found: list[tuple[str, ...]] = []
    for result in results:
        shot = result.get("one_shot")
        if not shot:
            continue
        claimed = result["theory"]["epsilon"]
        found.append(
            (
                str(result["run"]["label"]),
                str(result["run"]["seed"]),
                claimed if isinstance(claimed, str) else f"{claimed:.3g}",
                f"{float(shot['estimate']['epsilon']):.3g}",
                f"{float(shot['lower']['epsilon']):.3g} ({float(shot['lower']['ceiling']):.3g})",
                f"{float(shot['mean']):.4f} ± {float(shot['std']):.4f}",
                f"{float(shot['dimension']) ** -0.5:.4f}",
            )
        )
    return found


def show(results: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print the table, or nothing where no run has canary clients."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    lines = rows(results)
    if not lines:
        return
    drawn = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    titles = ("", "seed", "claimed", "estimated", "at least (of)", "cosine", "its std if absent")
    for i, title in enumerate(titles):
        drawn.add_column(title, justify="right" if i else "left")
    for line in lines:
        drawn.add_row(*(Text(cell) for cell in line))
    console.print(drawn)
    console.print(Text(NOTE, style="dim"))
