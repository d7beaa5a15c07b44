"""Commands on what an earlier run left: report again, replay a client's failure."""

from __future__ import annotations

import traceback
from pathlib import Path

from fedkd.cli import complain
from fedkd.cli.places import resume_command
from fedkd.cli.screen import screen
from fedkd.errors import FedkdError


def report(folder: Path, workspace: Path) -> int:
    """Write and print the tables and figures of a folder; return 1 if a run is not finished."""
    from fedkd import report as reports
    from fedkd.report import tables

    study = reports.load(folder, workspace)
    shown = reports.write(study)
    console = screen()
    tables.show(shown, console)
    if study.failed:
        unfinished = ", ".join(f"{c.label} (seed {c.seed})" for c in study.failed)
        complain(f"not finished: {unfinished}. Go on with: {resume_command(folder, workspace)}")
    console.print(f"\nResults: {folder}", soft_wrap=True)
    return 1 if study.failed else 0


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
