"""When and on what clients are judged: as often as asked for, as long as that costs little."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

from pydantic import Field

from fedkd.options import Count, Ratio, options


@options
class Evaluate:
    """When and on what clients are judged."""

    every: Annotated[Count, Field(description="rounds between evaluations; the last always")] = 1
    last_k: Annotated[Count, Field(description="evaluations in the mean of the last k")] = 5
    global_every: Annotated[
        int, Field(ge=0, description="rounds between global-test evaluations; 0: the last only")
    ] = 0
    global_per_class: Annotated[
        int, Field(ge=0, description="global test examples of each class; 0: all")
    ] = 100
    share: Annotated[
        Ratio,
        Field(
            description="judging may take this share of a run's work, else it is done more rarely "
            "than every says, but for the last last_k times; 1: never more rarely"
        ),
    ] = 0.15

    def identity(self) -> dict[str, Any]:
        """Return what the digest of an experiment says of this: no share, where it is the usual.

        So digests are those of before there was one; the last ``last_k`` rounds are judged anyway.
        """
        found = dataclasses.asdict(self)
        if self.share == Evaluate().share:
            del found["share"]
        return found
