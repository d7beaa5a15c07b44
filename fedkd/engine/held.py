"""An array that crosses the grid as it is: bytes are made only where somebody asks for them.

Within one process nobody has to: Flower's ``Array`` is bytes, and making and parsing them costs
more than a small model's training. Everything of Flower's that looks at the bytes sees those of
``numpy.save``.
"""

from __future__ import annotations

import copy
import io
import math
from functools import lru_cache
from typing import Any, Self

import numpy as np
from flwr.app import Array

NUMPY = "numpy.ndarray"
FIELDS = ("dtype", "shape", "stype", "data")


class HeldArray(Array):
    """Flower's ``Array`` around an ndarray that nobody writes to.

    ``held`` is that ndarray, read-only, or None once a field was set to something else: from then
    on this is Flower's plain array. ``data`` is made at first use and kept.
    """

    def __init__(self, held: np.ndarray, data: bytes | None = None) -> None:
        """Take over an array; it is made read-only, and shared from now on.

        Args:
            held: C-contiguous or Fortran-contiguous, without Python objects.
            data: its bytes, where it is a view of them.
        """
        flags = held.flags
        flags.writeable = False
        shape = held.shape
        if data is None:
            # A view, so that no receiver can make it writable again, with the strides that
            # numpy.load gives: along an axis of length 1 they are else whatever they were.
            if not flags.c_contiguous:
                held = held.reshape(-1, order="F").reshape(shape, order="F")
            elif len(shape) == 1:
                held = held.reshape(-1)
            else:
                held = held.reshape(-1).reshape(shape)
        self.__dict__.update(
            dtype=_name(held.dtype), shape=shape, stype=NUMPY, _held=held, _bytes=data
        )

    @property
    def held(self) -> np.ndarray | None:
        """The array, read-only; None where a field was set."""
        array: np.ndarray | None = self.__dict__["_held"]
        return array

    @property
    def data(self) -> bytes:
        """The bytes that ``numpy.save`` writes."""
        found: bytes | None = self.__dict__["_bytes"]
        if found is None:
            found = self.__dict__["_bytes"] = to_npy(self.__dict__["_held"])
        return found

    @data.setter
    def data(self, value: bytes) -> None:
        self.__dict__["_bytes"] = value

    def __setattr__(self, name: str, value: Any) -> None:
        if name in FIELDS and self.held is not None:
            self.__dict__.update(_bytes=b"" if name == "data" else self.data, _held=None)
        super().__setattr__(name, value)

    def numpy(self) -> np.ndarray:
        """Return a copy of the array, which the caller may change."""
        return super().numpy() if self.held is None else self.held.copy(order="K")

    def deflate(self) -> bytes:
        """Return Flower's description of the array, which names the class of what it describes."""
        return Array(self.dtype, self.shape, self.stype, self.data).deflate()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Array):
            return NotImplemented
        if isinstance(other, HeldArray) and self.held is not None and self.held is other.held:
            return True
        return all(getattr(self, name) == getattr(other, name) for name in FIELDS)

    __hash__ = None  # type: ignore[assignment]

    def __copy__(self) -> Self:
        fresh = type(self).__new__(type(self))
        fresh.__dict__.update(self.__dict__)
        return fresh

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # What it holds can't be changed, and setting a field of one changes no other.
        return self.__copy__()

    def __reduce__(self) -> tuple[Any, ...]:
        if self.held is None:
            return Array, (self.dtype, self.shape, self.stype, self.data)
        return HeldArray, (self.held,)


def snapshot(array: np.ndarray) -> HeldArray:
    """Return a copy of a contiguous array, to be sent.

    Its header is copied along, so that its bytes cost nothing where somebody asks for them.
    """
    data, fortran = to_npy(array), is_fortran(array)
    return HeldArray(_view(data, len(data) - array.nbytes, array.dtype, array.shape, fortran), data)


def shared(array: Array) -> Array:
    """Return an array of its own with the same bytes, which is cheaper to read than Flower's.

    What is not told and written as ours would be stays Flower's, down to the last byte: legacy
    apps leave type and shape empty, and other writers of the format pad otherwise.
    """
    if isinstance(array, HeldArray):
        return copy.copy(array)
    view = from_npy(array.data) if array.stype == NUMPY else None
    if view is None or (array.dtype, array.shape) != (_name(view.dtype), view.shape):
        return copy.copy(array)
    head = header(view.dtype, view.shape, is_fortran(view))
    if len(array.data) != len(head) + view.nbytes or not array.data.startswith(head):
        return copy.copy(array)
    return HeldArray(view, array.data)


def held_in(array: Array) -> np.ndarray | None:
    """Return the array that a :class:`HeldArray` holds; None for what has to be read."""
    found: np.ndarray | None = array.__dict__.get("_held")
    return found


def stored_bytes(array: Array) -> int:
    """Return ``len(array.data)``, without making these bytes where they do not exist."""
    known = array.__dict__
    held = known.get("_held")
    if held is None:
        return len(array.data)
    if known["_bytes"] is not None:
        return len(known["_bytes"])
    return _stored(known["dtype"], known["shape"], is_fortran(held))


@lru_cache(maxsize=4096)
def _stored(dtype: str, shape: tuple[int, ...], fortran: bool) -> int:
    found = np.dtype(dtype)
    return len(header(found, shape, fortran)) + math.prod(shape) * found.itemsize


def to_npy(array: np.ndarray) -> bytes:
    """Return the bytes that ``numpy.save`` writes of a contiguous array; it is copied once."""
    fortran = is_fortran(array)
    flat = array.reshape(-1, order="F" if fortran else "C").view(np.uint8).data
    return b"".join((header(array.dtype, array.shape, fortran), flat))


def from_npy(data: bytes) -> np.ndarray | None:
    """Return a read-only view of what ``numpy.save`` wrote; None for what cannot be read so.

    That is other versions of its format, and bytes that are damaged.
    The header of equal arrays is parsed once, which is most of the cost of ``numpy.load``.
    """
    if data[:8] != b"\x93NUMPY\x01\x00":
        return None
    start = 10 + int.from_bytes(data[8:10], "little")
    try:
        shape, fortran, dtype = _parse(data[:start])
        return None if dtype.hasobject else _view(data, start, dtype, shape, fortran)
    except Exception:
        # Whoever reads it with numpy.load is told what is wrong with it.
        return None


def is_fortran(array: np.ndarray) -> bool:
    """Return whether ``numpy.save`` stores an array in Fortran's order."""
    return array.flags.f_contiguous and not array.flags.c_contiguous


@lru_cache(maxsize=4096)
def header(dtype: np.dtype, shape: tuple[int, ...], fortran: bool) -> bytes:
    """Return what stands before the values in the bytes that ``numpy.save`` writes."""
    buffer = io.BytesIO()
    fields = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": fortran,
        "shape": shape,
    }
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()


@lru_cache(maxsize=4096)
def _parse(head: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    buffer = io.BytesIO(head)
    np.lib.format.read_magic(buffer)
    return np.lib.format.read_array_header_1_0(buffer)


def _view(
    data: bytes, start: int, dtype: np.dtype, shape: tuple[int, ...], fortran: bool
) -> np.ndarray:
    flat = np.frombuffer(data, dtype, count=math.prod(shape), offset=start)
    return flat.reshape(shape, order="F" if fortran else "C")


@lru_cache(maxsize=256)
def _name(dtype: np.dtype) -> str:
    return str(dtype)
