"""Averaging where clients have different architectures: one global network for each of them.

Distillation on the server joins what averaging cannot: knowledge crosses from one architecture to
another through the ensemble, never through weights.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedkd.options import options
from fedkd.rng import Rng
from fedkd.strategies.averaging import LAST_ROUND, ModelAveraging, average
from fedkd.strategies.base import Setting
from fedkd.types import Arrays, ClientInfo, Metrics, Upload, prefixed, select


@options
class GroupedAveraging(ModelAveraging):
    """FedAvg within each architecture: ``w_a = sum_{k in a} p_k w_k``.

    The first client's architecture is kept under ``model/``, others under ``models/<label>/``; with
    one architecture every bit is FedAvg's. Networks travel whole.
    """

    mixed = True

    def problems(self, setting: Setting) -> list[str]:
        """Nothing stands against mixed architectures."""
        return []

    def alone(self, setting: Setting) -> list[str]:
        found = super().alone(setting)
        if len(self.labels(setting)) > 1:
            found.append(
                "it averages within each architecture, and a sum over clients would not show whose "
                "network it is; give all clients one model, or set privacy.trust = 'local'"
            )
        return found

    def place(self, label: str, setting: Setting) -> str:
        """Return where the server keeps the global network of an architecture."""
        return "model" if label == setting.clients[0].model else f"models/{label}"

    def labels(self, setting: Setting) -> list[str]:
        """Return the architectures that clients have, the first client's first."""
        return list(dict.fromkeys(c.model for c in setting.clients))

    def init(self, setting: Setting, rng: Rng) -> Arrays:
        state = super().init(setting, rng)
        for label in self.labels(setting)[1:]:
            state.update(prefixed(self.place(label, setting), setting.book.initial(label)))
        return state

    def broadcast(self, state: Arrays, client: ClientInfo, round_: int, setting: Setting) -> Arrays:
        return prefixed("model", select(state, self.place(client.model, setting)))

    def aggregate(
        self, state: Arrays, uploads: Sequence[Upload], round_: int, setting: Setting
    ) -> tuple[Arrays, Metrics]:
        averaged: Arrays = {}
        for label in self.labels(setting):
            group = [u for u in uploads if u.client.model == label]
            weights = [u.client.examples if self.weighting == "examples" else 1 for u in group]
            fused = average([select(u.arrays, "model") for u in group], weights)
            averaged.update(prefixed(self.place(label, setting), fused))
        last = state[LAST_ROUND].copy()
        last[[k for u in uploads for k in u.clients]] = round_
        return {**state, **averaged, LAST_ROUND: last}, {}
