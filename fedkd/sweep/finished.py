"""The result of a run that may be there, be missing or be damaged: what is damaged is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedkd.engine.folder import RunFolder
from fedkd.errors import ConfigError


def summary_of(folder: Path) -> dict[str, Any] | None:
    """Return the summary of a finished run, None where it is not finished.

    Raises:
        ConfigError: the summary is damaged.
    """
    try:
        summary = RunFolder(folder).summary()
        if summary is not None:
            _ = summary["headline"]["readout"], summary["headline"]["predict"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder / 'summary.json'} cannot be read ({error!r}); remove it: the command that "
            "made the run then goes on with it"
        ) from None
    return summary
