"""What this process and the workers that it forked say to each other: objects, arrays apart.

Arrays are written to the socket from where they lie and read to where they stay, one copy each way.
Only processes of one run talk so, over a socket without a name: nothing of it is ever stored.
"""

from __future__ import annotations

import copyreg
import io
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
from flwr.app import Array

PIECES = 512
"""Buffers in one call of the system, which allows 1024."""
NUMBER = 8


@dataclass(frozen=True)
class Packed:
    """An object ready to travel: ``body`` without its arrays, and where these lie in memory."""

    body: bytes
    buffers: tuple[memoryview, ...] = ()

    def unpack(self, buffers: Sequence[Any] | None = None) -> Any:
        """Return the object, made over ``buffers`` (by default its own)."""
        return ForkingPickler.loads(
            self.body, buffers=list(self.buffers if buffers is None else buffers)
        )


def pack(value: Any) -> Packed:
    """Return a value as :class:`Packed`; it must not change until it is sent."""
    file, buffers = io.BytesIO(), list[Any]()
    _Pickler(file, buffers).dump(value)
    return Packed(file.getvalue(), tuple(buffer.raw() for buffer in buffers))


class _Pickler(ForkingPickler):
    def __init__(self, file: io.BytesIO, buffers: list[Any]) -> None:
        super().__init__(file, 5, True, buffers.append)
        # Without what torch adds there: it would send tensors as open files.
        self.dispatch_table = {**copyreg.dispatch_table, Array: _apart}


def _apart(array: Array) -> tuple[Any, ...]:
    """Take the bytes of Flower's array for one of NumPy's, whose memory travels as it is."""
    shown = np.frombuffer(array.data, np.uint8)
    return _together, (array.dtype, array.shape, array.stype, shown)


def _together(dtype: str, shape: tuple[int, ...], stype: str, shown: np.ndarray) -> Array:
    owner: Any = shown
    while isinstance(owner, np.ndarray):
        owner = owner.base
    return Array(dtype, shape, stype, owner if isinstance(owner, bytes) else shown.tobytes())


def address(buffer: memoryview) -> tuple[int, int]:
    """Return where a buffer lies and how long it is: equal for views of one array."""
    return int(np.frombuffer(buffer, np.uint8).ctypes.data), buffer.nbytes


class Channel:
    """One end of a socket between two processes; whole messages go in and come out.

    Raises:
        OSError: the other end is gone while this one writes.
        EOFError: the other end is gone while this one reads.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    @classmethod
    def pair(cls) -> tuple[Channel, Channel]:
        """Return both ends of a new socket."""
        ours, theirs = socket.socketpair()
        return cls(ours), cls(theirs)

    def fileno(self) -> int:
        """Return the file descriptor, to wait for."""
        return self._socket.fileno()

    def send(self, said: Any, buffers: Sequence[memoryview] = ()) -> None:
        """Write ``said`` (small, plain data) and ``buffers``."""
        head = bytes(ForkingPickler.dumps((said, [(b.nbytes, b.readonly) for b in buffers])))
        parts = [memoryview(len(head).to_bytes(NUMBER, "little") + head)]
        parts += [buffer for buffer in buffers if buffer.nbytes]
        for start in range(0, len(parts), PIECES):
            self._write(parts[start : start + PIECES])

    def receive(self) -> tuple[Any, list[bytes | bytearray]]:
        """Return what was said, and its buffers: bytes where they were read-only there."""
        length = int.from_bytes(self._read(NUMBER), "little")
        said, sizes = ForkingPickler.loads(self._read(length))
        return said, [self._read(n) if fixed else self._writable(n) for n, fixed in sizes]

    def close(self) -> None:
        """Close this end."""
        self._socket.close()

    def _write(self, parts: list[memoryview]) -> None:
        while parts:
            written = self._socket.sendmsg(parts)
            while parts and written >= parts[0].nbytes:
                written -= parts.pop(0).nbytes
            if parts and written:
                parts[0] = parts[0][written:]

    def _writable(self, length: int) -> bytearray:
        found = bytearray(length)
        view = memoryview(found)
        while view:
            view = view[self._got(self._socket.recv_into(view, 0, socket.MSG_WAITALL)) :]
        return found

    def _read(self, length: int) -> bytes:
        found, left = list[bytes](), length
        while left:
            found.append(self._socket.recv(left, socket.MSG_WAITALL))
            left -= self._got(len(found[-1]))
        return found[0] if len(found) == 1 else b"".join(found)

    def _got(self, length: int) -> int:
        if not length:
            raise EOFError("the other process is gone")
        return length
