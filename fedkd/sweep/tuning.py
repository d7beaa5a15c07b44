"""What tuning found, as it is kept in a sweep's folder: every trial, and what was chosen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedkd.errors import ConfigError

FILE = "tuning.json"


def read_tuning(folder: Path) -> dict[str, Any] | None:
    """Return what ``tuning.json`` holds; None where nothing was tuned.

    Raises:
        ConfigError: it is damaged.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        table: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        _ = dict(table["space"])
        for label in table["labels"].values():
            _ = dict(label["chosen"]), [dict(trial)["validation"] for trial in label["trials"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{file} cannot be read ({error!r}); remove it: the same command tunes again from the "
            "runs that are finished"
        ) from None
    return table
