"""Nearest neighbours: an example is as private as it is far from everything that is public."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedkd.data.federated import Split
from fedkd.options import Count, options
from fedkd.privacy.scorers.base import ExampleScorer, scorers
from fedkd.rng import Rng
from fedkd.types import Task

CHUNK = 1024
"""Rows of the matrix of distances that are held at once."""


@scorers.register("knn")
@options
class NearestNeighbours(ExampleScorer):
    """Mean Euclidean distance to the k nearest public examples; no labels needed.

    An example of the pool is no neighbour of its own. Where there are fewer than k others, all
    count; where there is none, the score is 0.
    """

    k: Annotated[Count, Field(description="neighbours")] = 5

    def score_public(self, pool: Split, task: Task, rng: Rng) -> Tensor:
        return self._distances(pool, pool, own=True)

    def score(self, data: Split, pool: Split, task: Task, rng: Rng) -> Tensor:
        return self._distances(data, pool, own=False)

    def _distances(self, data: Split, pool: Split, own: bool) -> Tensor:
        # Double precision: the distances come from inner products, which lose half the digits.
        x, reference = (split.x.cpu().double().flatten(1) for split in (data, pool))
        k = min(self.k, len(reference) - own)
        if k < 1:
            return torch.zeros(len(x), dtype=torch.float64)
        found = []
        for start in range(0, len(x), CHUNK):
            distances = torch.cdist(x[start : start + CHUNK], reference)
            if own:
                rows = torch.arange(len(distances))
                distances[rows, start + rows] = torch.inf
            found.append(distances.topk(k, largest=False).values.mean(1))
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)
