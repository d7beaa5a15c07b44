"""MLflow: the server of ``MLFLOW_TRACKING_URI``, or one SQLite file beside the runs; no network.

MLflow reports its use to its makers over the network unless it is told not to: here it is told.
"""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress
from typing import ClassVar, final
from urllib.parse import urlsplit

from fedkd.engine.sinks.base import Sink, Start, sinks
from fedkd.types import Metrics

URI = "MLFLOW_TRACKING_URI"
QUIET = "MLFLOW_DISABLE_TELEMETRY"
BATCH = 100
"""Parameters that MLflow takes at once."""


@sinks.register("mlflow")
@final
class MLflow(Sink):
    """Runs of an MLflow server, or of sinks/mlflow.db in the folder of the comparison or run."""

    extra: ClassVar[str] = "mlflow"

    @classmethod
    def modules(cls) -> tuple[str, ...]:
        return ("mlflow",) if os.environ.get(URI) else ("mlflow", "sqlalchemy", "alembic")

    def start(self, start: Start) -> str:
        os.environ.setdefault(QUIET, "true")
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        uri = os.environ.get(URI)
        if not uri:
            (start.home / "sinks").mkdir(parents=True, exist_ok=True)
            uri = f"sqlite:///{start.home / 'sinks' / 'mlflow.db'}"
        self._client, place = MlflowClient(tracking_uri=uri), _shown(uri)
        known = start.memory.get("run_id", "") if start.memory.get("place") == place else ""
        self._run = known or self._create(start)
        start.memory.update(place=place, run_id=self._run)
        # Values cannot be taken back: rounds that are known already are not sent once more.
        metrics = self._client.get_run(self._run).data.metrics
        self._last = int(metrics.get("round", -1))
        if known:
            self._client.update_run(self._run, status="RUNNING")
        return f"{place}, run {self._run}"

    def write(self, round_: int, values: Metrics) -> None:
        if round_ <= self._last:
            return
        self._log({**values, "round": float(round_)}, round_)

    def finish(self, final: Metrics | None) -> None:
        if final:
            self._log(final, 0)
        self._client.set_terminated(self._run, "KILLED" if final is None else "FINISHED")

    def _create(self, start: Start) -> str:
        """Make a run, in the experiment of this name, and return its id."""
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(start.name)
        if found is None:
            # Another run of the same sweep may be faster; anything else shows below.
            with suppress(MlflowException):
                self._client.create_experiment(start.name)
            found = self._client.get_experiment_by_name(start.name)
        tags = {"fedkd.digest": start.digest}
        run = self._client.create_run(found.experiment_id, run_name=start.title, tags=tags)
        params = [Param(key, str(value)[:500]) for key, value in start.settings.items()]
        for i in range(0, len(params), BATCH):
            self._client.log_batch(run.info.run_id, params=params[i : i + BATCH])
        return str(run.info.run_id)

    def _log(self, values: Metrics, round_: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, round_) for name, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)


def _shown(uri: str) -> str:
    """Return where a server is, without the user and password that may stand in its address.

    >>> _shown("https://me:secret@host:5000/x"), _shown("sqlite:////a@b/mlflow.db")
    ('https://host:5000/x', 'sqlite:////a@b/mlflow.db')
    """
    parts = urlsplit(uri)
    return uri.replace(parts.netloc, parts.netloc.rpartition("@")[2], 1) if parts.netloc else uri
