"""The work that every contender of a bench does: fixed once, saved as plain arrays, and hashed.

It imports neither torch nor the engine, so that what hosts another framework needs nothing of ours,
and so that the process that looks on stays small: it must not share memory with those it measures.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fedkd.errors import ConfigError, DataError, unknown

ARRAYS, FACTS = "work.safetensors", "work.json"
Kind = Literal["mlp", "cnn", "tiny"]
KINDS: dict[Kind, str] = {
    "mlp": "784-64-10 perceptron on whole images",
    "cnn": "fedkd's small CNN, two 5x5 convolutions",
    "tiny": "49-16-10 perceptron on images averaged to 7x7, one batch a client, all take part",
}
BLOCKS = 5
"""A work has rounds for a first one and so many blocks; later passes begin with them again."""
ONE_BATCH = 32
TYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "I64": np.dtype("<i8")}


@dataclass(frozen=True)
class Plan:
    """Which work: all that it follows from.

    ``block`` is the number of rounds that a timed sample plays, and plays again until it has taken
    long enough. With ``tiny`` all ``clients`` take part and ``k`` is not looked at.
    """

    kind: Kind
    source: str = "fashion-mnist"
    clients: int = 100
    k: int = 10
    block: int = 2
    seed: int = 0
    lr: float = 0.05
    batch_size: int = ONE_BATCH
    alpha: float = 0.3

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("work", self.kind, KINDS)
        for name in ("clients", "k", "block"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)}: at least 1 is needed")
        if self.k > self.clients:
            raise ConfigError(
                f"k = {self.k} of {self.clients} clients: no more can take part than there are"
            )

    @property
    def rounds(self) -> int:
        """How many rounds are laid down: the first, and all blocks."""
        return 1 + BLOCKS * self.block

    @property
    def name(self) -> str:
        """How the work is called in tables."""
        who = f"N=K={self.clients}" if self.kind == "tiny" else f"K={self.k}"
        return f"{self.kind} {who}"

    def rounds_of(self, pass_: int) -> range:
        """Return the rounds of a pass's samples; passes count from 0.

        >>> Plan("cnn").rounds_of(1), Plan("cnn").rounds_of(6)
        (range(4, 6), range(4, 6))
        """
        first = 2 + (pass_ % BLOCKS) * self.block
        return range(first, first + self.block)


@dataclass(frozen=True, eq=False)
class Work:
    """Data, owners, initial weights, cohorts and the order of examples of every round.

    Attributes:
        plan: what it was made from.
        x: float32 ``(n, ...)``, row-major; a loaded work's are read from disk where they are used.
        y: int64 ``(n,)``.
        owners: for each client the indices of its examples.
        initial: initial weights by name, float32.
        cohorts: who takes part in rounds 1, 2, ..., in ascending order.
        orders: by round, for each member of the cohort, the permutation of its examples.
        folder: where it was loaded from.
    """

    plan: Plan
    x: np.ndarray
    y: np.ndarray
    owners: Sequence[np.ndarray]
    initial: Mapping[str, np.ndarray]
    cohorts: Sequence[Sequence[int]]
    orders: Sequence[Mapping[int, np.ndarray]]
    folder: Path = Path()

    @property
    def kind(self) -> Kind:
        """Which model: ``mlp``, ``cnn`` or ``tiny``."""
        return self.plan.kind

    @property
    def lr(self) -> float:
        """The learning rate of plain SGD."""
        return self.plan.lr

    @property
    def batch_size(self) -> int:
        """Examples a step; the last batch of an epoch may be smaller."""
        return self.plan.batch_size

    @property
    def clients(self) -> int:
        """The number of clients."""
        return len(self.owners)

    def cohort(self, round_: int) -> list[int]:
        """Return the clients of a round, in ascending order; rounds count from 1."""
        return list(self.cohorts[round_ - 1])

    def order(self, round_: int, client: int) -> np.ndarray:
        """Return the order, int64 ``(n_k,)``, in which a client reads its examples in a round."""
        return self.orders[round_ - 1][client]

    def size(self, client: int) -> int:
        """Return how many examples a client has."""
        return len(self.owners[client])

    def samples(self, round_: int) -> int:
        """Return how many examples are trained on in a round."""
        return sum(self.size(k) for k in self.cohort(round_))

    @cached_property
    def hash(self) -> str:
        """16 hexadecimal digits that change with any value of it."""
        digest = hashlib.blake2b(digest_size=8)
        facts = dataclasses.asdict(self.plan)
        digest.update(json.dumps(facts, sort_keys=True).encode())
        for name, array in sorted(self._arrays().items()):
            digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def facts(self) -> dict[str, Any]:
        """Return what a result says of the work."""
        return {
            "name": self.plan.name,
            "hash": self.hash,
            **dataclasses.asdict(self.plan),
            "parameters": sum(w.size for w in self.initial.values()),
            "samples": [self.samples(r) for r in range(1, len(self.cohorts) + 1)],
        }

    def save(self, folder: Path) -> None:
        """Write it into a folder."""
        from safetensors.numpy import save_file

        save_file(self._arrays(), folder / ARRAYS)
        text = json.dumps({"plan": dataclasses.asdict(self.plan), "hash": self.hash}, indent=2)
        (folder / FACTS).write_text(text + "\n", encoding="utf-8")

    def _arrays(self) -> dict[str, np.ndarray]:
        return {
            "x": np.ascontiguousarray(self.x),
            "y": self.y,
            **_joined("owners", self.owners),
            **_joined("cohorts", [np.asarray(c, dtype=np.int64) for c in self.cohorts]),
            **_joined("orders", [o for orders in self.orders for o in orders.values()]),
            **{f"initial/{name}": weight for name, weight in self.initial.items()},
        }


def load(folder: Path) -> Work:
    """Read a work; the hash is that of what was read, not what the file says.

    Raises:
        DataError: there is none, or it was changed since.
    """
    try:
        plan, _ = recorded(folder)
        arrays = _mapped(folder / ARRAYS)
        parts = {n: _parted(arrays, n) for n in ("owners", "cohorts", "orders")}
        orders, cohorts = iter(parts["orders"]), [c.tolist() for c in parts["cohorts"]]
        return Work(
            plan=plan,
            x=arrays["x"],
            y=np.array(arrays["y"]),
            owners=parts["owners"],
            initial={
                name.split("/", 1)[1]: np.array(weight)
                for name, weight in arrays.items()
                if name.startswith("initial/")
            },
            cohorts=cohorts,
            orders=[{k: next(orders) for k in cohort} for cohort in cohorts],
            folder=folder,
        )
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise DataError(f"cannot read the work of this bench: {error}; begin again") from error


def recorded(folder: Path) -> tuple[Plan, str]:
    """Return the plan and the hash of the work in a folder; its arrays are not read."""
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    return Plan(**facts["plan"]), str(facts["hash"])


def _joined(name: str, parts: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    none = np.empty(0, dtype=np.int64)
    return {
        f"{name}/all": np.concatenate([none, *parts]).astype(np.int64),
        f"{name}/sizes": np.array([len(part) for part in parts], dtype=np.int64),
    }


def _mapped(file: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a safetensors file as they lie on disk: who needs none, reads none.

    The images are large, and a backend with data of its own must not be charged for them.
    """
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    found: dict[str, np.ndarray] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            kind: np.dtype[Any] = TYPES[entry["dtype"]]
            (begin, end), shape = entry["data_offsets"], tuple(map(int, entry["shape"]))
            if end > begin:
                found[name] = np.memmap(file, kind, "r", 8 + length + begin, shape)
            else:
                found[name] = np.empty(shape, kind)
    return found


def _parted(arrays: Mapping[str, np.ndarray], name: str) -> list[np.ndarray]:
    ends = np.cumsum(arrays[f"{name}/sizes"])
    return np.split(np.array(arrays[f"{name}/all"]), ends[:-1]) if len(ends) else []
