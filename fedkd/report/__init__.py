"""Tables and figures of finished runs; all of it can be made again from the folders on disk.

>>> import fedkd
>>> from fedkd import report
>>> report.write(report.load("runs/quickstart"))  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from fedkd.engine.study import StudyResult
    from fedkd.report.comparison import Comparison


def write(study: StudyResult) -> Comparison:
    """Write the tables and figures of a study into its folder; ``print`` what is returned.

    Raises:
        RunError: the disk is full or not writable.
    """
    from fedkd.report import comparison, figures, tables

    found = comparison.comparison(study)
    tables.write(found, study_json=any(cell.folder != study.folder for cell in study.cells))
    figures.write(study)
    return found


def load(folder: str | Path, workspace: Path | None = None) -> StudyResult:
    """Read a finished comparison, or a single run, from its folder; nothing is run.

    Raises:
        ConfigError: the folder holds none.
    """
    from fedkd.report.runs import load as read

    return read(folder, workspace)
