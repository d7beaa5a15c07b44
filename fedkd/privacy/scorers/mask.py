"""Mask: the user says which examples or classes are private."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedkd.data.federated import Split
from fedkd.errors import ConfigError
from fedkd.options import Numbers, options
from fedkd.privacy.scorers.base import ExampleScorer, scorers
from fedkd.rng import Rng
from fedkd.types import Task


@scorers.register("mask")
@options
class Mask(ExampleScorer):
    """1 for declared examples of the pool and for declared classes anywhere, 0 for all others."""

    ranked: ClassVar[bool] = False

    indices: Annotated[Numbers, Field(description="positions of private examples in the pool")] = ()
    classes: Annotated[Numbers, Field(description="labels whose examples are private")] = ()

    def score_public(self, pool: Split, task: Task, rng: Rng) -> Tensor:
        wrong = [i for i in self.indices if not 0 <= i < len(pool)]
        if wrong:
            raise ConfigError(
                f"scorer 'mask': indices = {wrong} are not in the public pool; allowed are 0 to "
                f"{len(pool) - 1}"
            )
        found = self._by_class(pool, task)
        found[list(self.indices)] = 1.0
        return found

    def score(self, data: Split, pool: Split, task: Task, rng: Rng) -> Tensor:
        if self.indices:
            raise ConfigError(
                "scorer 'mask': indices name examples of the public pool, but here clients' own "
                "examples are scored; declare classes in place of indices"
            )
        return self._by_class(data, task)

    def _by_class(self, data: Split, task: Task) -> Tensor:
        if not (self.indices or self.classes):
            raise ConfigError(
                "scorer 'mask' has nothing declared; give it indices or classes, as in "
                "privacy.swing.scorer_options.classes = [3]"
            )
        wrong = [c for c in self.classes if not 0 <= c < task.classes]
        if wrong:
            raise ConfigError(
                f"scorer 'mask': classes = {wrong} are no classes of {task.name!r}; allowed are 0 "
                f"to {task.classes - 1}"
            )
        if self.classes and bool((data.y < 0).any()):
            raise ConfigError(
                "scorer 'mask': classes need the labels of the pool, which the pool from "
                "data.public.source does not have; declare indices"
            )
        return torch.isin(data.y.cpu(), torch.tensor(self.classes, dtype=torch.long)).double()
