"""Reading IDX files, the format of the MNIST family, with every header field checked.

A truncated download or a file under the wrong name must be told apart from data, at once.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from fedkd.errors import DataError

UNSIGNED_BYTE = 0x08


def find_idx(folder: Path, name: str) -> Path | None:
    """Return the file ``name`` or ``name.gz`` in ``folder``, or nothing."""
    for file in (folder / name, folder / f"{name}.gz"):
        if file.is_file():
            return file
    return None


def read_idx(file: Path, dimensions: int) -> np.ndarray:
    """Return the unsigned bytes of an IDX file, plain or gzipped.

    The header is two zero bytes, the type, the number of dimensions, and each dimension as four
    bytes, most significant first; then come the values, last dimension fastest.

    Raises:
        DataError: unreadable, another magic number, or not as long as the header says.
    """
    try:
        raw = file.read_bytes()
        content = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {file}: {error}; fetch the file again") from error
    expected = bytes([0, 0, UNSIGNED_BYTE, dimensions])
    if content[:4] != expected:
        raise DataError(
            f"{file} is no IDX file of {dimensions}-d bytes: it starts with "
            f"{content[:4].hex() or 'nothing'}, expected {expected.hex()}"
        )
    start = 4 + 4 * dimensions
    shape = tuple(int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4))
    needed = start + math.prod(shape)
    if len(content) != needed:
        raise DataError(
            f"{file} holds {len(content)} bytes, but its header {shape} asks for {needed}; it is "
            f"damaged or truncated, fetch it again"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)
