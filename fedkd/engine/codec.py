"""Arrays to Flower records and back: exact, and without a byte made of them on the way.

What travels is a snapshot: whoever sent an array can't change it any more, and no receiver can
change what another one received. Either side can be Flower's own conversion.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord

from fedkd.engine.flower_private import filled, inside
from fedkd.engine.held import NUMPY, HeldArray, from_npy, held_in, snapshot
from fedkd.errors import ConfigError
from fedkd.types import Arrays

Cache = dict[int, tuple[Any, Any]]
"""What was decoded in an exchange, by the identity of its bytes."""
RECORDS = 16
"""Records that are kept of an exchange: as a rule one for each architecture."""


class Encoded:
    """What was encoded in an exchange: each ndarray once, and kept for as long as it lives.

    It goes by identity, so arrays must not be changed in place meanwhile. What is made for one
    client alone is gone when its message is: memory does not grow with the cohort.
    """

    def __init__(self) -> None:
        self._made: dict[int, tuple[weakref.ref[np.ndarray], HeldArray]] = {}
        self._records: dict[tuple[tuple[str, int], ...], ArrayRecord] = {}

    def get(self, array: np.ndarray) -> HeldArray | None:
        """Return what this very object was encoded to."""
        known = self._made.get(id(array))
        return known[1] if known is not None and known[0]() is array else None

    def remember(self, array: np.ndarray, made: HeldArray) -> None:
        """Note what an array was encoded to."""
        number, here = id(array), weakref.ref(self)

        def forget(_: object) -> None:
            cache = here()
            if cache is not None:
                cache._made.pop(number, None)

        self._made[number] = weakref.ref(array, forget), made

    def record(self, sent: dict[str, HeldArray]) -> ArrayRecord:
        """Return one record for all that are sent the same; nobody may change it.

        Only for arrays that were encoded before: what is one client's own is not kept here.
        """
        key = tuple([(name, id(made)) for name, made in sent.items()])
        found = self._records.get(key)
        if found is None:
            while len(self._records) >= RECORDS:
                del self._records[next(iter(self._records))]
            found = self._records[key] = filled(ArrayRecord(), sent)
        return found


def encode(arrays: Arrays, cache: Encoded | None = None, *, own: bool = False) -> ArrayRecord:
    """Return ``arrays`` as a Flower record, with keys in the same order.

    Every dtype that NumPy stores without pickle, any shape (0-d and empty too); a strided array
    is stored in C order, a Fortran-contiguous one as such. What somebody could still write to is
    copied, once.

    Args:
        cache: pass one :class:`Encoded` to all calls of a round to copy each ndarray object once;
            the record may then be another call's as well.
        own: the caller gives the arrays away and has no writable view or tensor of them: those
            that own their memory are made read-only and travel without a copy.

    Raises:
        ConfigError: a value is not an array, or its dtype holds Python objects.
    """
    if cache is None:
        sent = {key: _to_flower(key, array, own) for key, array in arrays.items()}
        return filled(ArrayRecord(), sent)
    sent, again = {}, True
    for key, array in arrays.items():
        made = cache.get(array)
        if made is None:
            again, made = False, _to_flower(key, array, own)
            cache.remember(array, made)
        sent[key] = made
    return cache.record(sent) if again else filled(ArrayRecord(), sent)


def decode(record: ArrayRecord, cache: Cache | None = None) -> Arrays:
    """Return the arrays of a record, with keys in the same order; the inverse of :func:`encode`.

    The arrays are **read-only** and nothing is copied: all receivers of one broadcast get the same
    ndarrays. ``torch.tensor(array)`` copies without a warning.

    Args:
        cache: pass one ``{}`` to all calls of a round to get the same ndarray for the same bytes
            that Flower's own conversion made. Sharing it between threads is safe.

    Raises:
        TypeError: an array was serialised by something else than NumPy.
    """
    found: Arrays = {}
    for key, array in inside(record).items():
        held = held_in(array)
        found[key] = _to_numpy(array, cache) if held is None else held
    return found


def _to_flower(key: str, array: np.ndarray, own: bool) -> HeldArray:
    if not isinstance(array, np.ndarray) or array.dtype.hasobject:
        what = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise ConfigError(f"{key!r} cannot travel: expected a numeric NumPy array, got {what}")
    flags = array.flags
    if own and flags.owndata and flags.c_contiguous:
        return HeldArray(array)
    contiguous = flags.c_contiguous or flags.f_contiguous
    if contiguous and (_immutable(array) or (own and _sole(array))):
        return HeldArray(array)
    return snapshot(array if contiguous else array.copy(order="C"))


def _immutable(array: np.ndarray) -> bool:
    """Return whether nobody at all can write to an array: it is a view of bytes."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return isinstance(base, bytes)


def _sole(array: np.ndarray) -> bool:
    """Return whether an array that is given away is not somebody else's memory too.

    It owns its memory, or is a read-only view of read-only arrays. A tensor's memory, and that of
    an array which somebody can write to, belongs to them.
    """
    base = array
    while isinstance(base.base, np.ndarray):
        if base.flags.writeable or base.base.flags.writeable:
            return False
        base = base.base
    return bool(base.flags.owndata)


def _to_numpy(array: Array, cache: Cache | None) -> np.ndarray:
    # By the bytes, not by the Array: the grid copies the Array objects, not what they hold.
    data = array.data
    known = cache.get(id(data)) if cache is not None else None
    if known is not None:
        found: np.ndarray = known[1]
        return found
    loaded = from_npy(data) if array.stype == NUMPY else None
    if loaded is None:
        loaded = array.numpy()
        loaded.flags.writeable = False
    if cache is not None:
        # The bytes are kept so that their id is not given to others.
        cache[id(data)] = (data, loaded)
    return loaded
