"""Why a run of a sweep has no result: kept beside it, so that a report can say so."""

from __future__ import annotations

import json
from pathlib import Path

from fedkd.engine.folder import write_text

FILE = "failed.json"


def keep_reason(folder: Path, error: str, trace: str = "") -> None:
    """Write down why a run failed, with the traceback of what is a defect."""
    table = {"error": error, **({"traceback": trace} if trace else {})}
    write_text(folder / FILE, json.dumps(table, indent=1) + "\n")


def forget_reason(folder: Path) -> None:
    """Forget an earlier failure: the run is tried again."""
    (folder / FILE).unlink(missing_ok=True)


def reason_of(folder: Path) -> str:
    """Return why a run failed, or nothing."""
    file = folder / FILE
    if not file.is_file():
        return ""
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["error"])
    except (OSError, ValueError, KeyError, TypeError):
        return "failed, for a reason that is no longer known"
