"""The public facts of a federation that the cost of a mechanism follows from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Population:
    """The public facts of a federation that the cost of a mechanism follows from.

    ``examples`` (N,) training examples of each client; ``turns`` (N,) in how many rounds each takes
    part (at client level: in which anything is released), known beforehand since participation is
    drawn from the seed alone; ``releases`` in how many rounds anything is released (none: all);
    ``fits`` (N, .) the (sampling rate, steps) of a client's training in one round; ``tables`` how
    many noised tables of class sums it releases a round. ``weights`` says whether weights travel,
    ``public`` whether there is a public pool.
    """

    scheme: str
    ratio: float
    rounds: int
    examples: tuple[int, ...]
    turns: tuple[int, ...]
    fits: tuple[tuple[tuple[float, int], ...], ...]
    tables: int = 0
    releases: int | None = None
    weights: bool = True
    public: bool = False

    @property
    def clients(self) -> int:
        """How many clients there are."""
        return len(self.examples)

    @property
    def everybody(self) -> bool:
        """Whether every client takes part in every round."""
        return self.scheme == "full" or self.ratio == 1.0
