"""What the columns of an image table are called, and how its cells become network inputs.

One frozen description for each data set, so that the hub, a local folder and the tests speak of
the same thing.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedkd.data.hub import hint, open_tables, require
from fedkd.data.images import Channels, normalise
from fedkd.errors import DataError, nearest


@dataclass(frozen=True, kw_only=True)
class Schema:
    """An image data set on the hub.

    Attributes:
        name: what it is called here.
        hub_name: what it is called there.
        image: column of PNG or JPEG images.
        label: column of class numbers.
        shape: ``(height, width)`` of grey images, ``(height, width, 3)`` of colour images.
        mean: of each channel of the training pixels, in 0..1.
        std: of each channel of the training pixels.
        classes: number of classes.
        names: name of each class, or none.
    """

    name: str
    hub_name: str
    image: str
    label: str
    shape: tuple[int, ...]
    mean: Channels
    std: Channels
    classes: int
    names: tuple[str, ...] = ()

    def open(self, folder: str, *splits: str) -> dict[str, Any]:
        """Return one Arrow table for each split; see :func:`fedkd.data.hub.open_tables`."""
        return open_tables(self.name, self.hub_name, folder, splits)

    def missing(self, folder: str) -> str:
        """Say in one line what is missing, or nothing if the data are on this machine."""
        return hint(self.name, self.hub_name, folder)

    def column(self, table: Any, wanted: str) -> Any:
        """Return a column of a table, or raise an error that lists those that there are."""
        if wanted not in table.column_names:
            raise DataError(
                f"{self.name}: there is no column {wanted!r}{nearest(wanted, table.column_names)} "
                f"(found: {', '.join(table.column_names)})"
            )
        return table.column(wanted)

    def labels(self, table: Any) -> np.ndarray:
        """Return the classes of all rows as int64 ``(n,)``."""
        values = self.column(table, self.label).to_numpy()
        if values.dtype.kind not in "iu":
            raise DataError(
                f"{self.name}: column {self.label!r} holds {values.dtype}; expected class numbers"
            )
        return values.astype(np.int64)

    def inputs(self, table: Any, rows: np.ndarray) -> np.ndarray:
        """Decode and normalise some images: float32 ``(len(rows), channels, height, width)``."""
        cells = self.column(table, self.image).take(rows)
        pixels = np.empty((len(rows), *self.shape), dtype=np.uint8)
        for place, (row, cell) in enumerate(zip(rows, cells, strict=True)):
            pixels[place] = self._decode(cell.as_py(), int(row))
        return normalise(pixels, self.mean, self.std)

    def _decode(self, cell: Any, row: int) -> np.ndarray:
        require(self.name, "PIL")
        from PIL import Image, UnidentifiedImageError

        data = cell.get("bytes") if isinstance(cell, dict) else cell
        where = f"{self.name}: column {self.image!r}, row {row}"
        if not isinstance(data, bytes):
            raise DataError(f"{where} holds no image bytes")
        try:
            mode = "L" if len(self.shape) == 2 else "RGB"
            image = np.asarray(Image.open(io.BytesIO(data)).convert(mode))
        except (UnidentifiedImageError, OSError) as error:
            raise DataError(f"{where} is a damaged image: {error}") from error
        if image.shape != self.shape:
            raise DataError(f"{where} is an image of {image.shape}; expected {self.shape}")
        return image
