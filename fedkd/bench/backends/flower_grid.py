"""The same unmodified Flower app on fedkd's Grid, in one process."""

from __future__ import annotations

from typing import Any

from fedkd.bench.backends.flower_base import FlowerBackend
from fedkd.bench.registries import backends


@backends.register("flower-grid")
class FlowerGrid(FlowerBackend):
    """An unmodified Flower app under ``fedkd.simulate``, one client after the other."""

    def simulate(self, server: Any, client: Any, threads: int, workers: int) -> None:
        """Run the app with fedkd's engine."""
        from fedkd.engine.simulate import simulate

        simulate(server, client, self.work.clients, seed=None)
