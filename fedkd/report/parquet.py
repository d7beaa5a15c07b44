"""Every measured value of a collection as one tidy Parquet file, for tools of one's own.

Runs are written one after another, a row group each, so that a large sweep needs little memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedkd.axes import named
from fedkd.engine.folder import read_records, writing
from fedkd.errors import ConfigError
from fedkd.report.collection import Collection, Group, Value
from fedkd.report.runs import RunView


def write(collection: Collection, file: Path) -> Path:
    """Write one row for each value: label, axes, seed, where it was measured, metric and value.

    Columns: ``label``, one for each axis (float64 where all its values are numbers, else text),
    ``seed``, ``round``, ``client`` (-1: the federation), ``split``, ``readout``, ``predict``,
    ``metric``, ``value``. The file is written aside and renamed.

    Raises:
        ConfigError: pyarrow is not installed.
        RunError: the disk is full or not writable.
    """
    require(file)
    import pyarrow as pa
    import pyarrow.parquet as pq

    numeric = {key: _numbers(values) for key, values in collection.axes.items()}
    points = {key: pa.float64() if number else pa.string() for key, number in numeric.items()}
    where = dict.fromkeys(("split", "readout", "predict", "metric"), pa.string())
    columns: dict[str, Any] = {
        **{"label": pa.string(), **points},
        **{"seed": pa.int64(), "round": pa.int64(), "client": pa.int64()},
        **{**where, "value": pa.float64()},
    }
    schema = pa.schema(list(columns.items()))
    with writing(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_name(file.name + ".part")
        with pq.ParquetWriter(aside, schema) as writer:
            for group in collection.groups:
                point = {
                    key: float(value) if numeric[key] else named(value)
                    for key, value in group.point.items()
                }
                for run in group.runs:
                    writer.write_table(pa.table(_columns(group, point, run), schema=schema))
        aside.replace(file)
    return file


def require(file: Path) -> None:
    """Refuse to write ``file`` where pyarrow is missing, before anything else is made.

    Raises:
        ConfigError: pyarrow is not installed.
    """
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise ConfigError(
            f"{file.name} needs pyarrow, which is not installed: pip install 'fedkd[parquet]', or "
            "leave Parquet out"
        ) from None


def _columns(group: Group, point: dict[str, float | str], run: RunView) -> dict[str, list[Any]]:
    # Not run.log, which would keep the records of every run in memory.
    records = read_records(run.folder / "metrics.jsonl")
    same = {"label": group.label, **point, "seed": run.seed}
    return {
        **{key: [value] * len(records) for key, value in same.items()},
        **{
            key: [getattr(record, key) for record in records]
            for key in ("round", "client", "split", "readout", "predict", "metric", "value")
        },
    }


def _numbers(values: Sequence[Value]) -> bool:
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
