"""Which secrets a run plants, and in whose data."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
from pydantic import Field

from fedkd.options import Count, Names, NotNegative, Numbers, options


@options
class Canaries:
    """Secrets that are planted in clients' training data, by fair coins, to see who remembers them.

    Secrets, references and holders follow from ``seed``; the coins from the experiment's seed too,
    so that runs of several seeds plant other halves of the same canaries.
    """

    kind: Annotated[
        Literal["none", "text", "random-image", "mislabelled"],
        Field(
            description="texts of one pattern; images of random pixels; or real ones, wrong label"
        ),
    ] = "none"
    pattern: Annotated[
        str, Field(min_length=1, description="text: each {} is filled from the alphabet")
    ] = "my number is {}{}{}{}{}{}"
    alphabet: Annotated[
        Names, Field(description="text: what fills a gap: characters as one string, or words")
    ] = ("0123456789",)
    count: Annotated[Count, Field(description="canaries of each level, before the coins")] = 40
    repetitions: Annotated[
        Numbers, Field(description="levels: copies that each holder of a canary trains on")
    ] = (1, 2, 4, 8, 16, 32)
    clients: Annotated[Count, Field(description="holders of each canary")] = 1
    share: Annotated[
        float,
        Field(ge=0, le=1, description="share of a holder's examples replaced, in place of copies"),
    ] = 0.0
    coin: Annotated[
        bool, Field(description="plant a canary on heads only; false: all, for exposure alone")
    ] = True
    references: Annotated[
        Count, Field(description="secrets like the canaries that are never planted")
    ] = 1000
    seed: Annotated[NotNegative, Field(description="addresses secrets and holders")] = 0
    random_clients: Annotated[
        NotNegative,
        Field(description="clients that send random directions (one-shot audit of weights)"),
    ] = 0

    @pydantic.model_validator(mode="after")
    def _check(self) -> Canaries:
        if not self.repetitions or min(self.repetitions) < 1:
            raise ValueError("canaries.repetitions: give at least one level, each at least 1")
        if len(set(self.repetitions)) < len(self.repetitions):
            raise ValueError("canaries.repetitions: give each level once")
        if self.share and len(self.repetitions) > 1:
            raise ValueError(
                "canaries.share replaces a share of a holder's examples, so copies have no levels; "
                "set repetitions = [1], or share = 0"
            )
        return self
