"""What a client costs before it takes part: beside the list of its examples, hardly anything."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from fedkd.bench.operations.base import Operations
from fedkd.bench.registries import operations

FEW, MANY = 50, 350
LISTED = 8 * (600 + 100)
"""Bytes of the list of a client of the reference federation: 600 training, 100 test examples."""


@operations.register("idle")
class Idle(Operations):
    """Bytes of a client that has not taken part, beside those of its list of examples."""

    title = "bytes of a client that has not taken part"
    unit = "client"
    reference = ""
    timed = False

    def start(self, source: str, seed: int) -> None:
        # Once before, so that what is made only once is there already.
        self._bytes(source, seed, FEW)
        few, many = (self._bytes(source, seed, n) for n in (FEW, MANY))
        # The same examples are divided both times: their lists are as long, taken together.
        self.beside = (many - few) / (MANY - FEW)

    def steps(self) -> dict[str, Callable[[], None]]:
        return {"idle client": lambda: None}

    def facts(self) -> dict[str, Any]:
        share = (LISTED + self.beside) / LISTED
        values = {"bytes beside its list": self.beside, "bytes / its list of indices": share}
        return {"bytes of a list": LISTED, "values": {"idle client": values}}

    def _bytes(self, source: str, seed: int, clients: int) -> float:
        """Return the bytes of a run after a round of five clients, without what these learned from.

        Of the same examples fewer clients have more each: that is none of an idle one's.
        """
        import gc
        import tracemalloc

        from fedkd.bench.playing import begun
        from fedkd.engine.simulate import in_process

        table = {
            "seed": seed,
            "strategy": "fedavg",
            "model": {"name": "mlp", "hidden": [16]},
            "data": {
                "source": {"name": source, "limit": 20 * MANY},
                "partition": "iid",
                "validation": 0.0,
            },
            "clients": {"count": clients, "participation": {"ratio": 5 / clients}},
        }
        gc.collect()
        tracemalloc.start()
        try:
            with ExitStack() as open_:
                open_.enter_context(in_process())
                run = begun(open_, table)
                run.play(1)
                gc.collect()
                federation = run.prepared.federation
                splits = [federation.client(k).train for k in run.strategy.cohort(1)]
                taken = sum(split.x.nbytes + split.y.nbytes for split in splits)
                return float(tracemalloc.get_traced_memory()[0] - taken)
        finally:
            tracemalloc.stop()
