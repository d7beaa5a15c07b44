"""Who takes part in a round: one uniform number for each (round, client) decides.

These are the options; what follows from them in a federation is :mod:`fedkd.clients.attendance`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from fedkd.options import Count, Fraction, NonNegative, Positive, Ratio, options
from fedkd.rng import stream

USED = {"power-law": ("exponent",), "label": ("strength", "period")}
"""The options of each model of availability."""


@options
class Participation:
    """Which clients take part in a round, are there at all, and get their upload through.

    With u(t, k) uniform for round t and client k, ``poisson`` takes every client with
    ``u < ratio`` (each on its own coin; the cohort may be empty) and ``fixed`` the
    ``max(1, round(ratio * n))`` clients with the smallest u. In both the cohort of a smaller ratio
    is contained in that of a larger one, which makes a sweep over ratios a paired experiment.
    ``cyclic`` puts the clients in one random order of the seed and takes
    ``m = max(1, round(ratio * n))`` at a time, ``(t - 1) m`` to ``t m - 1`` modulo n: a public
    schedule without repetition, *not* nested over ratios. ``full`` takes everybody, as all others
    do at ratio 1.

    Of these only clients that are there take part (``availability``, see
    :mod:`fedkd.clients.availability`); ``fixed`` fills up with others, as far as there are any.
    An upload is lost after the local work with probability ``dropout``, or if it comes after
    ``deadline`` (see :class:`~fedkd.clients.attendance.Attendance`).

    Limits: ``availability = "always"``, ``dropout = 0`` and no ``deadline`` are the plain scheme.
    """

    scheme: Annotated[
        Literal["full", "fixed", "poisson", "cyclic"],
        Field(
            description="full: everybody; fixed: a fixed-size cohort; poisson: one coin each; "
            "cyclic: by turns"
        ),
    ] = "fixed"
    ratio: Annotated[Ratio, Field(description="share of the clients that take part")] = 1.0
    availability: Annotated[
        Literal["always", "power-law", "label"],
        Field(description="who can be asked: all; few often, many rarely; by the data's classes"),
    ] = "always"
    exponent: Annotated[
        NonNegative, Field(description="power-law: the client of rank r is there at r^-exponent")
    ] = 1.0
    strength: Annotated[
        Fraction, Field(description="label: how much the classes of the data decide; 0: nothing")
    ] = 1.0
    period: Annotated[
        Count, Field(description="label: rounds in which the window goes once through all classes")
    ] = 10
    dropout: Annotated[
        Fraction, Field(description="probability that an upload is lost after the local work")
    ] = 0.0
    slowness: Annotated[
        NonNegative,
        Field(le=20, description="sigma of the clients' lognormal slowness; 0: all alike"),
    ] = 0.0
    deadline: Annotated[
        Positive | None,
        Field(description="later uploads are lost, in median times of a round; none: wait"),
    ] = None

    def size(self, clients: int) -> int:
        """Return how many of ``clients`` a fixed or cyclic cohort has."""
        return max(1, round(self.ratio * clients))

    def cohort(
        self,
        seed: int,
        round_: int,
        clients: Sequence[int],
        there: Collection[int] | None = None,
    ) -> list[int]:
        """Return the clients of a round in ascending order; ``there``: who is (none: everybody).

        >>> Participation(ratio=0.5).cohort(0, 1, range(4)) == [0, 1, 2, 3]
        False
        """
        present = [k for k in sorted(clients) if there is None or k in there]
        if self.scheme == "full" or self._everybody(len(present), len(clients)):
            return present
        if self.scheme == "cyclic":
            turn = self._turn(seed, round_, clients)
            return [k for k in present if k in turn]
        u = {k: stream(seed, "participation", round_, k).uniform() for k in present}
        if self.scheme == "poisson":
            return [k for k in present if u[k] < self.ratio]
        return sorted(sorted(u, key=lambda k: u[k])[: self.size(len(clients))])

    def _everybody(self, present: int, clients: int) -> bool:
        """Return whether no coin can keep anybody out; with many clients coins take their time."""
        if self.scheme == "poisson":
            return self.ratio >= 1
        return self.scheme == "fixed" and present <= self.size(clients)

    def _turn(self, seed: int, round_: int, clients: Sequence[int]) -> set[int]:
        place = {k: stream(seed, "participation", "order", k).uniform() for k in clients}
        order, size = sorted(place, key=lambda k: place[k]), self.size(len(clients))
        first = (round_ - 1) * size
        return {order[(first + i) % len(order)] for i in range(size)}

    def identity(self) -> dict[str, Any]:
        """Return what a result depends on: what is not in use, or changes nothing, is left out.

        So that an experiment has the same digest as before there were these options.
        """
        found: dict[str, Any] = {"scheme": self.scheme, "ratio": self.ratio}
        if self.availability != "always":
            used = ("availability", *USED[self.availability])
            found |= {name: getattr(self, name) for name in used}
        rest = {"dropout": self.dropout, "slowness": self.slowness, "deadline": self.deadline}
        return found | {name: value for name, value in rest.items() if value}

    def problems(self) -> list[str]:
        """Return which options were given for a model of availability that is not used."""
        plain = Participation()
        return [
            f"clients.participation.{name} = {getattr(self, name)} is for availability = "
            f"{model!r}, which is {self.availability!r}: set clients.participation.availability = "
            f"{model!r}, or leave {name} out"
            for model, names in USED.items()
            for name in names
            if model != self.availability and getattr(self, name) != getattr(plain, name)
        ]
