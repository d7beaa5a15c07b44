"""A run in double precision, in which the same mathematics gives the same weights, to rounding."""

from __future__ import annotations

import dataclasses

import torch

from fedkd.data.federated import ClientData, Federation, Split
from fedkd.engine.setup import Prepared
from fedkd.models.book import ModelBook
from fedkd.rng import stream


class Double(Federation):
    """A federation whose inputs are float64; the data set itself stays float32."""

    def client(self, i: int) -> ClientData:
        """Return what client ``i`` has; cast when it is asked for."""
        return super().client(i).mapped(lambda part: Split(part.x.double(), part.y))


def in_dtype(prepared: Prepared, dtype: str) -> Prepared:
    """Return a run in ``float32`` or ``float64``: networks, weights and every client's inputs."""
    if dtype == "float32":
        return prepared
    old, book = prepared.federation, prepared.setting.book
    federation = Double.build(
        old.dataset, old.partition, validation=0.0, rng=stream(prepared.experiment.seed, "data")
    )
    twice = ModelBook(book.task, book.specs, book.seed, dtype=torch.float64)
    return dataclasses.replace(
        prepared,
        federation=federation,
        setting=dataclasses.replace(prepared.setting, book=twice),
    )
