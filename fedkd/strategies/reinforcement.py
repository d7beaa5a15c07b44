"""A consensus that travels as its likeliest classes, and is kept and taught from again.

The targets of a data set are a part of it that can be stored: computed once, read often. Here a
client keeps what it received of each public example, so that it goes on learning from it in rounds
in which the consensus is on others. It needs nothing that it has not been sent.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedkd.distill.soft_store import Precision, Rest, SoftStore, from_arrays, top_k
from fedkd.types import Arrays, prefixed, select

CACHE = "cache"
"""Where a client keeps targets, of each public example the latest: those of :class:`Kept`."""


@dataclass(frozen=True)
class Packing:
    """How soft targets (n, C) are sent, and for how many rounds a client teaches itself from them.

    ``k`` classes of each, none: all, as they are; ``precision`` of their probabilities, ``rest``
    what becomes of the other classes, none: as :mod:`~fedkd.distill.soft_store` has it by default.
    ``rounds`` is how many rounds after the one in which it came a target is of use; none: 0.

    Source: Faghri et al., Reinforce Data, Multiply Impact, ICCV 2023, arXiv:2303.08983, who store
    the likeliest classes of a data set's targets once; that they come by and by is ours.
    """

    k: int | None = None
    precision: Precision | None = None
    rest: Rest | None = None
    rounds: int | None = None

    def problems(self, classes: int, scores: str = "") -> list[str]:
        """Return what is wrong, given the number of classes.

        ``scores`` says why there are no probabilities to be packed, if so.
        """
        found = []
        if self.k is not None and self.k > classes:
            found.append(
                f"strategy.top_k = {self.k}: must be 1 to {classes}, the number of classes; "
                "left out, all of them travel"
            )
        for name, value in (("top_type", self.precision), ("top_rest", self.rest)):
            if value is not None and self.k is None:
                found.append(
                    f"strategy.{name} = {value!r} says how the likeliest classes travel, but all "
                    "of them do; set strategy.top_k, or leave it out"
                )
        for name, number in (("top_k", self.k), ("cached_rounds", self.rounds)):
            if number is not None and scores:
                found.append(
                    f"strategy.{name} = {number} is of probabilities, but {scores}; set "
                    "strategy.digest_loss = 'kl', or leave it out"
                )
        return found

    def packed(self, probs: np.ndarray) -> Arrays:
        """Return soft targets (n, C) as they travel: values (n, k), classes (n, k), scales.

        All classes are packed in float32, to the last bit.
        """
        usual: Precision = "float32" if self.k is None else "float16"
        return _told(top_k(probs, self.k or probs.shape[-1], self.precision or usual))

    def dense(self, store: SoftStore) -> np.ndarray:
        """Return soft targets (n, C) of what came, float32."""
        return store.dense(self.rest or "smooth")

    def heard(
        self, state: Arrays, sent: Arrays, at: np.ndarray, round_: int, classes: int
    ) -> Kept | None:
        """Return what a client learns from in a round: what it is sent, and what it keeps.

        ``sent`` is of the examples ``at`` (n,), ascending; {}: of none. Of an example that it has
        twice the newer target counts. What is sent is added to ``state``, of which what is older
        than ``rounds`` is dropped then. None: there is nothing to learn from.
        """
        new = None
        if sent:
            new = Kept(at, np.full(len(at), round_), unpacked(sent, classes))
        if not self.rounds:
            return new
        old = kept(state, classes, round_ - self.rounds)
        found = new if old is None else old if new is None else new.beside(old)
        if new is not None and found is not None:
            state.update(found.arrays())
        return found if found is not None and len(found) else None


@dataclass(frozen=True, eq=False)
class Kept:
    """Targets of public examples: where in the pool each is (m,), ascending, and when it came (m,).

    >>> arrays = Packing(k=1).packed(np.array([[0.9, 0.1], [0.2, 0.8]], dtype=np.float32))
    >>> old = Kept(np.array([1, 5]), np.array([2, 2]), unpacked(arrays, 2))
    >>> new = Kept(np.array([3, 5]), np.array([3, 3]), unpacked(arrays, 2))
    >>> both = new.beside(old)
    >>> both.at.tolist(), both.round.tolist(), both.store.ids.ravel().tolist()
    ([1, 3, 5], [2, 3, 3], [0, 0, 1])
    """

    at: np.ndarray
    round: np.ndarray
    store: SoftStore

    def __len__(self) -> int:
        return len(self.at)

    def some(self, chosen: np.ndarray) -> Kept:
        """Return some of them only, by a mask (m,) or their places."""
        return Kept(self.at[chosen], self.round[chosen], self.store.rows(chosen))

    def beside(self, older: Kept) -> Kept:
        """Return these, and what ``older`` has of other examples."""
        others = older.some(~np.isin(older.at, self.at))
        at = np.concatenate([self.at, others.at])
        rounds = np.concatenate([self.round, others.round])
        return Kept(at, rounds, _together(self.store, others.store)).some(np.argsort(at))

    def arrays(self) -> Arrays:
        """Return them as a client keeps them; see :func:`kept`."""
        mine = {"at": self.at.astype(np.int32), "round": self.round.astype(np.int32)}
        return prefixed(CACHE, {**mine, **_told(self.store)})


def unpacked(arrays: Arrays, classes: int) -> SoftStore:
    """Return the store of what travelled.

    Raises:
        DataError: the arrays do not fit together.
    """
    return from_arrays({**arrays, "classes": np.array([classes])})


def kept(state: Arrays, classes: int, since: int) -> Kept | None:
    """Return what a client keeps of targets that came in round ``since`` or later, or nothing."""
    found = select(state, CACHE)
    if not found:
        return None
    known = Kept(found["at"], found["round"], unpacked(found, classes))
    return known.some(known.round >= since)


def _told(store: SoftStore) -> Arrays:
    """Return the arrays of a store; how many classes there are, everybody knows."""
    return {name: array for name, array in store.arrays().items() if name != "classes"}


def _together(one: SoftStore, other: SoftStore) -> SoftStore:
    values = np.concatenate([one.values, other.values])
    ids = np.concatenate([one.ids, other.ids])
    scale = np.concatenate([one.scale, other.scale])
    return SoftStore(values, ids, scale, one.classes)
