"""What the nodes of a simulation are between messages: an id, a configuration, a state.

A node that nobody has asked anything is none of these yet, and costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import ArrayRecord, Context, Message, RecordDict

from fedkd.engine.executors.base import Homed

RUN_ID = 1
FIRST_NODE_ID = 1000


class Contexts(Mapping[int, Context]):
    """The Flower context of each node by its id, made when it is first asked for."""

    def __init__(
        self,
        num_nodes: int,
        run_config: Mapping[str, Any],
        node_configs: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        self._ids = range(FIRST_NODE_ID, FIRST_NODE_ID + num_nodes)
        self._run_config, self._node_configs = run_config, node_configs
        self._made: dict[int, Context] = {}

    def __getitem__(self, node_id: int) -> Context:
        if node_id not in self._made:
            self._made[node_id] = self.around(node_id, RecordDict())
        return self._made[node_id]

    def __contains__(self, node_id: object) -> bool:
        return node_id in self._ids

    def __iter__(self) -> Iterator[int]:
        return iter(self._ids)

    def __len__(self) -> int:
        return len(self._ids)

    def around(self, node_id: int, state: RecordDict) -> Context:
        """Return a new context of a node around its state.

        Raises:
            KeyError: there is no such node.
        """
        if node_id not in self._ids:
            raise KeyError(node_id)
        partition = node_id - FIRST_NODE_ID
        own = dict(self._node_configs[partition]) if self._node_configs else {}
        return Context(
            run_id=RUN_ID,
            node_id=node_id,
            node_config={"partition-id": partition, "num-partitions": len(self._ids), **own},
            state=state,
            run_config=dict(self._run_config),
        )

    def state(self, node_id: int) -> RecordDict:
        """Return the state of a node, an empty one where it has none yet."""
        return self._made[node_id].state if node_id in self._made else RecordDict()

    def keep(self, node_id: int, state: RecordDict) -> None:
        """Keep what a node left in its state."""
        if node_id in self._made:
            self._made[node_id].state = state
        elif state:
            self._made[node_id] = self.around(node_id, state)


@dataclass(frozen=True)
class Task(Homed):
    """The messages of one node, in order, and the state that they find; ``home`` is its id."""

    messages: tuple[Message, ...]
    state: RecordDict

    @property
    def whose(self) -> str:
        """The client, as messages name it."""
        return f"client {self.home - FIRST_NODE_ID}"


def marks(state: RecordDict) -> list[Any]:
    """Return what :func:`unchanged` compares: what a state is made of, and no copy of any array.

    Values outside of arrays are like nothing else, themselves included: 0, False and -0.0 are
    equal, yet no client would take one for the other.
    """
    found: list[Any] = []
    for name, record in state.items():
        found.append((name, type(record)))
        if isinstance(record, ArrayRecord):
            for key, array in record.items():
                found += [key, *vars(array).values()]
        else:
            found.append(object())
    return found


def unchanged(state: RecordDict, before: list[Any]) -> bool:
    """Return whether a state still is what it was; where that is not certain, it is not."""
    now = marks(state)
    return len(now) == len(before) and all(
        a is b or (isinstance(a, str | tuple) and a == b) for a, b in zip(now, before, strict=True)
    )
