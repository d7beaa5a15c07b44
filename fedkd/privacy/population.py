"""The public facts of a federation that the cost of a mechanism follows from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Population:
    """The public facts of a federation that the cost of a mechanism follows from.

    ``examples`` (N,) training examples of each client; ``turns`` (N,) in how many rounds each takes
    part (at client level: in which anything is released; where turns are ``scheduled``: in which
    its turn comes, there or not), known beforehand since participation is drawn from the seed
    alone; ``releases`` in how many rounds anything is released (none: all);
    ``fits`` (N, .) the (sampling rate, steps) of a client's training in one round; ``tables`` how
    many noised tables of class sums it releases a round. ``weights`` says whether weights travel,
    ``public`` whether there is a public pool.

    ``availability`` is the model of who is there (``label``: it follows from clients' data) and
    ``presence`` the mean probability to be there, as far as it is public. ``lossy``: uploads can be
    lost; ``deadline``: because they come too late.
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
    availability: str = "always"
    presence: float = 1.0
    lossy: bool = False
    deadline: bool = False

    @property
    def clients(self) -> int:
        """How many clients there are."""
        return len(self.examples)

    @property
    def everybody(self) -> bool:
        """Whether every client takes part in every round."""
        return self.availability == "always" and self._whole

    @property
    def amplified(self) -> bool:
        """Whether each client takes part by a coin of its own that nobody's data weight.

        With probability ``ratio``, or less where it may not be there: amplification at ``ratio`` is
        then an upper bound. Lost uploads are not in it: who loses them is not the server's choice.
        """
        return self.scheme == "poisson" and self.ratio < 1 and self.availability != "label"

    @property
    def displaces(self) -> bool:
        """Whether one client more or less changes which others take part."""
        return self.scheme in ("fixed", "cyclic") and not self._whole

    @property
    def scheduled(self) -> bool:
        """Whether in which rounds a client may take part is public before round 1.

        The rounds in between then cannot depend on its data. Where who is there follows from data
        nothing is made of it: every client pays for every round.
        """
        return self.scheme == "cyclic" and not self._whole and self.availability != "label"

    @property
    def expected(self) -> float:
        """Return the expected cohort: the public divisor of every sum over clients.

        Clients that are away are left out as far as that is public (an upper bound for ``fixed``,
        which fills up with others); lost uploads count as sent.
        """
        there = self.presence * self.clients
        if self._whole:
            return there
        if self.scheme == "poisson":
            return self.ratio * there
        size = float(max(1, round(self.ratio * self.clients)))
        return min(size, there) if self.scheme == "fixed" else size * self.presence

    @property
    def _whole(self) -> bool:
        return self.scheme == "full" or self.ratio == 1.0
