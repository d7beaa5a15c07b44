"""A round of FedD2S beside one of FedAvg: what deep-to-shallow distillation costs on top."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import cycle
from typing import Any

from fedkd.bench.operations.base import Operations
from fedkd.bench.registries import operations
from fedkd.errors import RunError

CLIENTS, EXAMPLES, ROUNDS = 20, 12_000, 20


@operations.register("fedd2s")
class FedD2S(Operations):
    """A round of FedD2S beside one of FedAvg: 20 clients, CNN, all take part."""

    title = "FedD2S beside FedAvg, CNN, 20 clients"
    unit = "round"
    reference = "fedavg"

    def start(self, source: str, seed: int) -> None:
        from fedkd.bench.playing import begun, federation
        from fedkd.engine.simulate import in_process

        self.open, self.source = ExitStack(), source
        self.open.enter_context(in_process())
        self.played = {
            name: begun(
                self.open,
                {
                    "seed": seed,
                    "strategy": name,
                    "rounds": ROUNDS + 1,
                    "data": federation(source, CLIENTS, EXAMPLES),
                    "clients": {"count": CLIENTS},
                },
            )
            for name in ("fedavg", "fedd2s")
        }
        # The last round would be judged; each strategy goes through the others by itself.
        self.next = {name: cycle(range(1, ROUNDS + 1)) for name in self.played}
        for name in self.played:
            self._play(name)

    def steps(self) -> dict[str, Callable[[], None]]:
        return {name: partial(self._play, name) for name in self.played}

    def facts(self) -> dict[str, Any]:
        federation = self.played["fedavg"].prepared.federation
        examples = sum(map(federation.train_size, range(CLIENTS)))
        return {"source": self.source, "clients": CLIENTS, "examples": examples}

    def close(self) -> None:
        self.open.close()

    def _play(self, name: str) -> None:
        failures = self.played[name].play(next(self.next[name]))
        if failures:
            raise RunError(failures[0])
