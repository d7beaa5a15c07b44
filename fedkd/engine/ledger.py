"""Communication is a result: bytes by round, phase, direction and kind of knowledge.

Two counts, never mixed: *tensor* bytes (shape times item size: what a paper's formula gives) and
*wire* bytes (the whole content as protobuf, with names, metrics and configuration).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from flwr.app import ArrayRecord, RecordDict

from fedkd.engine.flower_private import Layout, arrays_bytes, layout, values_bytes
from fedkd.errors import CheckpointError
from fedkd.types import kind_of

Direction = Literal["down", "up"]


@dataclass
class Bytes:
    """Sums over messages: how many, their wire bytes, their tensor bytes by kind of knowledge."""

    messages: int = 0
    wire: int = 0
    tensors: dict[str, int] = field(default_factory=dict)

    @property
    def tensor(self) -> int:
        """Tensor bytes of all kinds together."""
        return sum(self.tensors.values())

    def include(self, other: Bytes) -> None:
        """Add the counts of ``other`` to these."""
        self.messages += other.messages
        self.wire += other.wire
        for kind, size in other.tensors.items():
            self.tensors[kind] = self.tensors.get(kind, 0) + size


Counted = dict[int, Bytes]
"""What records were counted as, by identity: they must outlive it and not change meanwhile."""


class Ledger:
    """Bytes by (round, phase, direction); ``down`` is server to client.

    ``phase`` is Flower's message type (``train``, ``query.logits``, ...). Round 0 holds what
    belongs to no numbered round. To be called from one thread, in request order.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[int, str, str], Bytes] = {}

    def add(
        self,
        round: int,
        phase: str,
        direction: Direction,
        content: RecordDict,
        known: Counted | None = None,
    ) -> None:
        """Count one message with this content; ``known`` spares to count its records once more."""
        entry = self._entries.setdefault((round, phase, direction), Bytes())
        entry.messages += 1
        for name, record in content.items():
            found = known.get(id(record)) if known is not None else None
            if found is None:
                if isinstance(record, ArrayRecord):
                    found = _arrays(name, layout(record))
                else:
                    found = Bytes(0, values_bytes(name, record))
                if known is not None:
                    known[id(record)] = found
            entry.include(found)

    def totals(
        self,
        *,
        round: int | None = None,
        phase: str | None = None,
        direction: Direction | None = None,
    ) -> Bytes:
        """Return the sums of everything that matches; ``None`` matches all."""
        wanted = (round, phase, direction)
        total = Bytes()
        for address, entry in self._entries.items():
            if all(w is None or w == a for w, a in zip(wanted, address, strict=True)):
                total.include(entry)
        return total

    def by_round(self) -> dict[int, dict[str, Bytes]]:
        """Return for each round, in ascending order, the sums ``down`` and ``up``."""
        rounds = sorted({address[0] for address in self._entries})
        directions: tuple[Direction, Direction] = ("down", "up")
        return {r: {d: self.totals(round=r, direction=d) for d in directions} for r in rounds}

    def state_dict(self) -> list[dict[str, Any]]:
        """Return everything as JSON-able rows, one for each round, phase and direction."""
        return [
            {
                "round": round,
                "phase": phase,
                "direction": direction,
                "messages": entry.messages,
                "wire": entry.wire,
                "tensors": dict(entry.tensors),
            }
            for (round, phase, direction), entry in self._entries.items()
        ]

    def load_state_dict(self, rows: list[dict[str, Any]]) -> None:
        """Replace the counts by those of :meth:`state_dict`.

        Raises:
            CheckpointError: the rows are not what :meth:`state_dict` makes.
        """
        try:
            entries = {
                (int(row["round"]), str(row["phase"]), str(row["direction"])): Bytes(
                    int(row["messages"]),
                    int(row["wire"]),
                    {str(kind): int(size) for kind, size in row["tensors"].items()},
                )
                for row in rows
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"the byte ledger cannot be read: {error!r}") from error
        self._entries = entries


@lru_cache(maxsize=1024)
def _arrays(name: str, arrays: Layout) -> Bytes:
    """Return what a record of arrays adds, with tensor bytes by kind; not to be changed."""
    found = Bytes(0, arrays_bytes(name, arrays))
    for key, dtype, shape, _, stored in arrays:
        kind = kind_of(key)
        found.tensors[kind] = found.tensors.get(kind, 0) + tensor_bytes(dtype, shape, stored)
    return found


def tensor_bytes(dtype: str, shape: tuple[int, ...], stored: int) -> int:
    """Return shape times item size, from an array's description alone.

    A dtype that NumPy does not know (another serialisation than ``.npy``) counts its stored bytes.
    """
    try:
        return math.prod(shape) * np.dtype(dtype).itemsize
    except TypeError:
        return stored
