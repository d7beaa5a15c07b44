"""Flower's own simulation with Ray: what most researchers run today."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from fedkd.bench.backends.flower_base import FlowerBackend
from fedkd.bench.registries import backends


@backends.register("flower-ray")
class FlowerRay(FlowerBackend):
    """Flower's ``run_simulation`` with a Ray actor of one core for each worker."""

    external = True
    workers = 2

    def available(self) -> str:
        """Return an empty string, or in a few words why it cannot run here."""
        if importlib.util.find_spec("ray") is None:
            return "ray is not installed: pip install 'fedkd[bench-flower]'"
        return ""

    def simulate(self, server: Any, client: Any, threads: int, workers: int) -> None:
        """Run the app with Flower's simulation runtime."""
        os.environ.update(
            FLWR_TELEMETRY_ENABLED="0",
            OMP_NUM_THREADS=str(threads),
            RAY_USAGE_STATS_ENABLED="0",
        )
        from flwr.simulation import run_simulation

        given = {"num_cpus": workers, "include_dashboard": False, "log_to_driver": False}
        run_simulation(
            server_app=server,
            client_app=client,
            num_supernodes=self.work.clients,
            backend_config={
                "init_args": given,
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            },
        )
