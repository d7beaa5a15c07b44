"""Commands on what an earlier run left: report again, replay a client's failure."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedkd.cli import complain
from fedkd.cli.places import RUNS, resume_command
from fedkd.cli.screen import screen
from fedkd.errors import FedkdError

if TYPE_CHECKING:
    from rich.console import Console

SHOWN = 5
"""Unfinished runs that are named; the report names all of them."""


def report(
    folders: Sequence[Path],
    out: Path | None,
    *,
    target: float | None,
    parquet: bool,
    workspace: Path,
) -> int:
    """Write and print tables, figures and the page; return 1 if a run is not finished.

    Of a single comparison or run the tables and figures of ``fedkd run`` are made again, too.
    """
    from fedkd.report.full import full
    from fedkd.sweep.plan import INDEX

    place = out or (folders[0] if len(folders) == 1 else workspace / RUNS / "report")
    console = screen()
    alone = len(folders) == 1 and not (folders[0] / INDEX).is_file()
    if alone:
        _comparison(folders[0], console, workspace)
    made = full(
        folders,
        place,
        target=target,
        parquet=parquet,
        console=None if alone else console,
        workspace=workspace,
    )
    missing = [(g, m) for g in made.collection.groups for m in g.missing]
    if missing:
        said = ", ".join(f"{g.label} (seed {m.seed})" for g, m in missing[:SHOWN])
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        how = resume_command(folders[0], workspace) if alone else "the fedkd sweep that began it"
        complain(f"not finished: {said}{more}. Go on with: {how}")
    console.print(f"\nReport: {made.page}", soft_wrap=True)
    return 1 if missing else 0


def _comparison(folder: Path, console: Console, workspace: Path) -> None:
    """Write and print the tables and figures of a comparison, or of a single run."""
    from fedkd import report as reports
    from fedkd.report import tables

    tables.show(reports.write(reports.load(folder, workspace)), console)


def replay(folder: Path, workspace: Path) -> int:
    """Replay a failure; print its traceback and return 1 if it fails again.

    Raises:
        ConfigError: the folder holds no failure.
    """
    from fedkd.engine.failures import replay as again
    from fedkd.engine.setup import load_workspace
    from fedkd.errors import ConfigError

    load_workspace(workspace)
    try:
        found = again(folder)
    except ConfigError:
        raise
    except FedkdError as error:
        complain(str(error))
        return 1
    except Exception:
        complain(f"the client fails again:\n{traceback.format_exc()}")
        return 1
    sent = ", ".join(found["sent"]) or "nothing"
    screen().print(
        f"client {found['client']} of round {found['round']} does not fail (any more); it sends "
        f"{sent}"
    )
    return 0
