"""Clients of one architecture as one stacked model: for networks too small to keep a core busy.

A round's clients are cut into parts. Those of a part run as they always do, but where they train,
all that wait are trained together; parts are done side by side in processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from fedkd.clients.dp_sgd import DpSgd
from fedkd.clients.local import FitResult, Fitter, Term, fit
from fedkd.clients.training import Training
from fedkd.data.federated import Split
from fedkd.engine.cohort import Meeting, Seats
from fedkd.engine.executors.base import (
    Executor,
    Homed,
    Outcome,
    R,
    T,
    attempt,
    cores,
    longest_first,
)
from fedkd.engine.executors.process import DeadWorkerError, Processes, cannot_fork
from fedkd.engine.registries import executors
from fedkd.errors import RunError
from fedkd.models.base import BlockNet
from fedkd.options import options
from fedkd.rng import Rng

if TYPE_CHECKING:
    # Brings torch.func along, which no other executor needs.
    from fedkd.clients.stacked.request import Request

LARGEST, FEWEST, SMALLEST = 32, 4, 4
"""Clients in one part at most; parts of a cohort at least, if each then has so many clients."""
STEP = 2
"""What a step of a part costs beside its clients' products, in units of those of one client."""

Fitted = FitResult | Exception | SystemExit


@executors.register("cohort")
@options
class Cohort(Executor):
    """Clients' fits as one stacked model, in parts that depend on the cohort alone.

    Sums are ordered otherwise than in ``serial``: results differ from its in the last bits, but
    not with the number of workers. Parts are done in processes as those of ``process``, or one
    after the other where there is no forking. A fit that cannot be stacked is done by itself.
    """

    workers: Annotated[
        int | None, Field(ge=1, description="processes; none: one for each core we may use")
    ] = None

    @property
    def shares_memory(self) -> bool:
        """Whether clients' work changes this process's own objects."""
        return not self._forks

    def map(
        self, function: Callable[[T], R], items: Sequence[T], costs: Sequence[float]
    ) -> list[Outcome[R]]:
        """Return the outcomes in the order of ``items``.

        Raises:
            DeadWorkerError: a worker was killed or left; the others are ended too.
        """
        places = parted(costs)
        parts = [Part(n, tuple(items[i] for i in own)) for n, own in enumerate(places)]
        found: list[list[Outcome[R]]]
        if self._forks:
            found = self._side_by_side(function, parts, places, costs)
        else:
            found = [self.meet(function, part) for part in parts]
        by_index: dict[int, Outcome[R]] = {}
        for own, outcomes in zip(places, found, strict=True):
            by_index.update(zip(own, outcomes, strict=True))
        return [by_index[index] for index in range(len(items))]

    def meet(self, function: Callable[[Any], R], part: Part) -> list[Outcome[R]]:
        """Do the work of one part in this process."""
        meeting: Meeting[Request, FitResult] = Meeting(
            lambda index: function(part.items[index]),
            len(part.items),
            1 if self._forks else self.workers or cores(),
            self._seats,
        )
        return meeting.hold(train)

    @property
    def fitter(self) -> Fitter:
        """What waits for the other clients of the part."""
        return self._fit

    def close(self) -> None:
        """End the threads and the processes."""
        owner, seats = self.__dict__.pop("_own_seats", (None, None))
        if seats is not None and owner == os.getpid():
            seats.close()
        self._processes.close()

    def _side_by_side(
        self,
        function: Callable[[T], R],
        parts: Sequence[Part],
        places: Sequence[list[int]],
        costs: Sequence[float],
    ) -> list[list[Outcome[R]]]:
        """Do all parts in worker processes; one that cannot travel back is an error of its own."""
        sums = [sum(costs[i] for i in own) + STEP * max(costs[i] for i in own) for own in places]
        try:
            done = self._processes.map(_Meet(self, function), parts, sums)
        except DeadWorkerError as error:
            own = places[error.index]
            how = error.how if len(own) == 1 else f"for {len(own)} clients at once {error.how}"
            raise DeadWorkerError(own[0], how) from None
        return [
            outcome.value
            if outcome.value is not None
            else [Outcome(error=outcome.error, traceback=outcome.traceback)] * len(own)
            for outcome, own in zip(done, places, strict=True)
        ]

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

    @property
    def _seats(self) -> Seats:
        """The threads of this very process: a fork leaves its parent's behind."""
        owner, seats = self.__dict__.get("_own_seats", (None, None))
        if seats is None or owner != os.getpid():
            seats = Seats()
            self.__dict__["_own_seats"] = os.getpid(), seats
        return seats

    @cached_property
    def _forks(self) -> bool:
        return (self.workers or cores()) > 1 and not cannot_fork()

    @cached_property
    def _processes(self) -> Processes:
        return Processes(workers=self.workers)


@dataclass(frozen=True)
class Part(Homed):
    """Clients whose work is done together; ``home`` numbers the parts of a cohort."""

    items: tuple[Any, ...]

    @property
    def whose(self) -> str:
        """Whom it is done for, as messages name them."""
        return ", ".join(i.whose if isinstance(i, Homed) else repr(i) for i in self.items)


@dataclass(frozen=True)
class _Meet:
    """What a worker does with a part."""

    cohort: Cohort
    function: Callable[[Any], Any]

    def __call__(self, part: Part) -> list[Outcome[Any]]:
        return self.cohort.meet(self.function, part)


def train(requests: list[Request]) -> list[Fitted]:
    """Do the fits that a part waits for, those of one kind as one."""
    answers: dict[int, Fitted] = {}
    kinds = [kind(request) for request in requests]
    for group in alike(kinds):
        fits = [requests[i] for i in group]
        found = [alone(fits[0])] if kinds[group[0]] is None else together(fits)
        answers.update(zip(group, found, strict=True))
    return [answers[index] for index in range(len(requests))]


def kind(request: Request) -> Hashable | None:
    """Return the key of a fit, None where a term of the user's own cannot tell one."""
    from fedkd.clients.stacked.request import key

    found = attempt(key, request)
    return found.value if attempt(hash, found.value).error is None else None


def together(requests: list[Request]) -> list[Fitted]:
    """Do the fits of one group, be it of one; what goes wrong is the answer of all whom it hits."""
    from fedkd.clients.stacked.request import stacked

    try:
        return [*stacked(requests)]
    except (Exception, SystemExit) as error:
        what = f"the fits of {len(requests)} clients at once failed: {error!r}"
        return [_caused(RunError(what), error) for _ in requests]


def alone(r: Request) -> Fitted:
    """Do one fit by the one loop."""
    try:
        return fit(r.model, r.data, r.terms, r.training, r.lr, r.rng, r.dp)
    except (Exception, SystemExit) as error:
        return error


def _caused(error: RunError, cause: BaseException) -> RunError:
    error.__cause__ = cause
    return error


def alike(keys: Sequence[Hashable | None]) -> list[list[int]]:
    """Return which fits are done as one stack; with the key None each for itself."""
    by_key: dict[Hashable, list[int]] = {}
    for index, known in enumerate(keys):
        by_key.setdefault(("alone", index) if known is None else ("key", known), []).append(index)
    return list(by_key.values())


def parted(costs: Sequence[float]) -> list[list[int]]:
    """Return the parts of a cohort, by its costs alone.

    As many of about the same cost as are wanted for ``LARGEST`` and ``FEWEST``. Never by workers:
    sums of a stack are its own.
    """
    count = max(-(-len(costs) // LARGEST), min(FEWEST, len(costs) // SMALLEST), 1)
    loads, parts = [0.0] * count, [list[int]() for _ in range(count)]
    for index in longest_first(costs):
        open_ = [n for n in range(count) if len(parts[n]) < LARGEST]
        least = min(open_, key=loads.__getitem__)
        # A step costs its part whatever is done in it, and the longest client has the most steps.
        loads[least] += max(costs[index], 1e-9) * (1 if parts[least] else 1 + STEP)
        parts[least].append(index)
    return [sorted(part) for part in parts if part]
