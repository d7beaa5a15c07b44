"""Arrays to Flower records and back: exact, and once for what many messages share.

Flower's own conversion costs more than a training step of a small model. This one makes the same
bytes (``numpy.save``'s), so either side can be Flower's.
"""

from __future__ import annotations

import io
import math
from functools import lru_cache
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord

from fedkd.errors import ConfigError
from fedkd.types import Arrays

NUMPY = "numpy.ndarray"
Cache = dict[int, tuple[Any, Any]]


def encode(arrays: Arrays, cache: Cache | None = None) -> ArrayRecord:
    """Return ``arrays`` as a Flower record, with keys in the same order.

    Every dtype that NumPy stores without pickle, any shape (0-d and empty too); a strided array
    is stored in C order, a Fortran-contiguous one as such.

    Args:
        cache: pass one ``{}`` to all calls of a round to encode each ndarray object once. It
            goes by identity, so arrays must not be changed in place while it lives.

    Raises:
        ConfigError: a value is not an array, or its dtype holds Python objects.
    """
    record = ArrayRecord()
    for key, array in arrays.items():
        known = cache.get(id(array)) if cache is not None else None
        if known is None:
            made = _to_flower(key, array)
            if cache is not None:
                # The array is kept so that its id is not given to another one.
                cache[id(array)] = (array, made)
        record[key] = known[1] if known else made
    return record


def decode(record: ArrayRecord, cache: Cache | None = None) -> Arrays:
    """Return the arrays of a record, with keys in the same order; the inverse of :func:`encode`.

    The arrays are **read-only** views of the record's bytes: nothing is copied, and a client
    cannot change what another one received. ``torch.tensor(array)`` copies without a warning.

    Args:
        cache: pass one ``{}`` to all calls of a round to get the same ndarray for the same bytes.
            Sharing it between threads is safe.

    Raises:
        TypeError: an array was serialised by something else than NumPy.
    """
    arrays: Arrays = {}
    for key, array in record.items():
        # By the bytes, not by the Array: the grid copies the Array objects, not what they hold.
        known = cache.get(id(array.data)) if cache is not None else None
        if known is None:
            known = (array.data, _to_numpy(array))
            if cache is not None:
                cache[id(array.data)] = known
        arrays[key] = known[1]
    return arrays


def _to_flower(key: str, array: np.ndarray) -> Array:
    if not isinstance(array, np.ndarray) or array.dtype.hasobject:
        what = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise ConfigError(f"{key!r} cannot travel: expected a numeric NumPy array, got {what}")
    if not (array.flags.c_contiguous or array.flags.f_contiguous):
        array = array.copy(order="C")
    fortran = array.flags.f_contiguous and not array.flags.c_contiguous
    body = array.T if fortran else array
    # Joined from a view: one copy of the array instead of two.
    flat = body.reshape(-1).view(np.uint8).data
    data = b"".join((_header(array.dtype, array.shape, fortran), flat))
    return Array(str(array.dtype), tuple(map(int, array.shape)), NUMPY, data)


def _to_numpy(array: Array) -> np.ndarray:
    data = array.data
    if array.stype != NUMPY or data[6:8] != b"\x01\x00":
        loaded: np.ndarray = array.numpy()
        loaded.flags.writeable = False
        return loaded
    start = 10 + int.from_bytes(data[8:10], "little")
    shape, fortran, dtype = _parse(data[:start])
    flat = np.frombuffer(data, dtype, count=math.prod(shape), offset=start)
    return flat.reshape(shape, order="F" if fortran else "C")


@lru_cache(maxsize=4096)
def _header(dtype: np.dtype, shape: tuple[int, ...], fortran: bool) -> bytes:
    buffer = io.BytesIO()
    fields = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": fortran,
        "shape": shape,
    }
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()


@lru_cache(maxsize=4096)
def _parse(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    buffer = io.BytesIO(header)
    np.lib.format.read_magic(buffer)
    return np.lib.format.read_array_header_1_0(buffer)
