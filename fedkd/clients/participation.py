"""Who takes part in a round: one uniform number for each (round, client) decides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from fedkd.options import Ratio, options
from fedkd.rng import stream


@options
class Participation:
    """Which clients take part in a round.

    With u(t, k) uniform for round t and client k, ``poisson`` takes every client with
    ``u < ratio`` (each on its own coin; the cohort may be empty) and ``fixed`` the
    ``max(1, round(ratio * n))`` clients with the smallest u. In both the cohort of a smaller ratio
    is contained in that of a larger one, which makes a sweep over ratios a paired experiment.
    ``full`` takes everybody, as both others do at ratio 1.
    """

    scheme: Annotated[
        Literal["full", "fixed", "poisson"],
        Field(description="full: everybody; fixed: a fixed-size cohort; poisson: one coin each"),
    ] = "fixed"
    ratio: Annotated[Ratio, Field(description="share of the clients that take part")] = 1.0

    def cohort(self, seed: int, round_: int, clients: Sequence[int]) -> list[int]:
        """Return the clients of a round in ascending order.

        >>> Participation(ratio=0.5).cohort(0, 1, range(4)) == [0, 1, 2, 3]
        False
        """
        if self.scheme == "full":
            return sorted(clients)
        u = {k: stream(seed, "participation", round_, k).uniform() for k in clients}
        if self.scheme == "poisson":
            return sorted(k for k in clients if u[k] < self.ratio)
        size = max(1, round(self.ratio * len(u)))
        return sorted(sorted(u, key=lambda k: u[k])[:size])
