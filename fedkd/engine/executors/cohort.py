"""Clients of one architecture as one stacked model: for networks too small to keep a core busy.

Clients run as they always do; only where they train, all that wait are trained together.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from fedkd.clients.dp_sgd import DpSgd
from fedkd.clients.local import FitResult, Fitter, Term, fit
from fedkd.clients.training import Training
from fedkd.data.federated import Split
from fedkd.engine.cohort import Meeting, Seats
from fedkd.engine.executors.base import Executor, Outcome, R, T, attempt, cores, longest_first
from fedkd.engine.executors.thread import Threads
from fedkd.engine.registries import executors
from fedkd.errors import RunError
from fedkd.models.base import BlockNet
from fedkd.options import options
from fedkd.rng import Rng

if TYPE_CHECKING:
    # Brings torch.func along, which no other executor needs.
    from fedkd.clients.stacked.request import Request

CHUNK = 128
"""Clients at a time: what their networks and their threads take bounds the memory."""
LARGEST, FEWEST, SMALLEST = 32, 4, 4
"""Fits in one stack at most; stacks of a cohort at least, if each then has so many fits."""

Fitted = FitResult | Exception | SystemExit


@executors.register("cohort")
@options
class Cohort(Executor):
    """Clients' fits as one stacked model, in groups that depend on the cohort alone.

    Sums are ordered otherwise than in ``serial``: results differ from its in the last bits, but
    not with the number of workers. A fit that cannot be stacked is done as in ``thread``.
    """

    workers: Annotated[
        int | None, Field(ge=1, description="threads; none: one for each core we may use")
    ] = None

    def map(
        self, function: Callable[[T], R], items: Sequence[T], costs: Sequence[float]
    ) -> list[Outcome[R]]:
        """Return the outcomes in the order of ``items``."""
        outcomes: list[Outcome[R]] = []
        for start in range(0, len(items), CHUNK):
            part = items[start : start + CHUNK]
            meeting: Meeting[Request, FitResult] = Meeting(
                lambda index, part=part: function(part[index]),  # type: ignore[misc]
                len(part),
                self.workers or cores(),
                self._seats,
            )
            outcomes += meeting.hold(self._train)
        return outcomes

    @property
    def fitter(self) -> Fitter:
        """What waits for the other clients of the exchange."""
        return self._fit

    def close(self) -> None:
        """End the threads."""
        seats: Seats | None = self.__dict__.pop("_seats", None)
        if seats is not None:
            seats.close()
        self._threads.close()

    def _fit(
        self,
        model: BlockNet,
        data: Split,
        terms: Sequence[Term],
        training: Training,
        lr: float,
        rng: Rng,
        dp: DpSgd | None = None,
    ) -> FitResult:
        """Train ``model`` as :func:`~fedkd.clients.local.fit` does, with all others that wait."""
        from fedkd.clients.stacked.request import Request

        guest = self._seats.guest
        if guest is None:
            return fit(model, data, terms, training, lr, rng, dp)
        result: FitResult = guest.ask(Request(model, data, terms, training, lr, rng, dp))
        return result

    def _train(self, requests: list[Request]) -> list[Fitted]:
        """Do the fits that a cohort waits for, group by group, as many at a time as workers."""
        groups = grouped([kind(r) for r in requests], [float(len(r.data)) for r in requests])
        work = [[requests[index] for index in group] for group in groups]
        costs = [float(sum(len(r.data) for r in group)) for group in work]
        answers: dict[int, Fitted] = {}
        for group, outcome in zip(groups, self._threads.map(together, work, costs), strict=True):
            answers.update(zip(group, outcome.get(), strict=True))
        return [answers[index] for index in range(len(requests))]

    @cached_property
    def _seats(self) -> Seats:
        return Seats()

    @cached_property
    def _threads(self) -> Threads:
        return Threads(workers=self.workers)


def kind(request: Request) -> Hashable | None:
    """Return the key of a fit, None where a term of the user's own cannot tell one."""
    from fedkd.clients.stacked.request import key

    found = attempt(key, request)
    return found.value if attempt(hash, found.value).error is None else None


def together(requests: list[Request]) -> list[Fitted]:
    """Do the fits of one group; what goes wrong is the answer of those whom it hits."""
    from fedkd.clients.stacked.request import stacked

    if len(requests) > 1:
        try:
            return [*stacked(requests)]
        except (Exception, SystemExit) as error:
            what = f"the fits of {len(requests)} clients at once failed: {error!r}"
            return [_caused(RunError(what), error) for _ in requests]
    r = requests[0]
    try:
        return [fit(r.model, r.data, r.terms, r.training, r.lr, r.rng, r.dp)]
    except (Exception, SystemExit) as error:
        return [error]


def _caused(error: RunError, cause: BaseException) -> RunError:
    error.__cause__ = cause
    return error


def grouped(keys: Sequence[Hashable | None], costs: Sequence[float]) -> list[list[int]]:
    """Return which fits are done as one stack, by their keys and costs alone.

    Of equal keys, as many stacks of about the same cost as are wanted for ``LARGEST`` and
    ``FEWEST``; with the key None each for itself. Never by workers: sums of a group are its own.
    """
    by_key: dict[Hashable, list[int]] = {}
    alone: list[list[int]] = []
    for index, known in enumerate(keys):
        if known is None:
            alone.append([index])
        else:
            by_key.setdefault(known, []).append(index)
    groups = list[list[int]]()
    for members in by_key.values():
        count = max(-(-len(members) // LARGEST), min(FEWEST, len(members) // SMALLEST), 1)
        loads, parts = [0.0] * count, [list[int]() for _ in range(count)]
        for place in longest_first([costs[index] for index in members]):
            least = loads.index(min(loads))
            loads[least] += costs[members[place]]
            parts[least].append(members[place])
        groups += [sorted(part) for part in parts if part]
    return [*groups, *alone]
