"""What has been spent, kept apart for two observers, as JSON that a resumed run goes on with.

One sees released models only and does not know who took part (the global history, amplified where
the sampling justifies it); the other sees who took part (one history for each client, as it was).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from decimal import ROUND_CEILING, Context
from typing import Any, final

from fedkd.errors import CheckpointError, ConfigError, RunError
from fedkd.privacy.accounting import Event, History, epsilon

VERSION = 1
UNITS = {"client": "for each client", "example": "for each training example of a client"}


@dataclass(frozen=True)
class Claim:
    """Everything that an epsilon has to be read with; ``sampling`` is text for people.

    ``turns``: of releases by central noise each client pays only for those of its own turns, by a
    public schedule; the epsilon is the largest over clients.
    """

    unit: str
    trust: str
    adjacency: str
    sampling: str
    delta: float
    accountant: str
    not_covered: tuple[str, ...] = ()
    turns: bool = False

    def table(self) -> dict[str, Any]:
        """Return the claim as a table; ``turns`` only where it says something."""
        return {k: v for k, v in asdict(self).items() if k != "turns" or v}

    def sentence(self, epsilon: float) -> str:
        """Say the guarantee in one sentence; epsilon is rounded up to three digits.

        >>> claim = Claim("client", "central", "add-remove", "Poisson sampling at rate 0.05",
        ...               1e-5, "prv")
        >>> print(claim.sentence(3.51))
        epsilon = 3.51 for each client (add-remove adjacency, Poisson sampling at rate 0.05,
        delta = 1e-05, prv accountant)
        """
        missing = f"; not covered: {', '.join(self.not_covered)}" if self.not_covered else ""
        if self.unit not in UNITS:
            return f"no epsilon: nothing is claimed about clients or examples{missing}"
        nothing = " (nothing was released)" if epsilon == 0 else ""
        against = ", with noise added by the client itself" if self.trust == "local" else ""
        return (
            f"epsilon = {rounded_up(epsilon)}{nothing} {UNITS[self.unit]}{against} "
            f"({self.adjacency} adjacency, {self.sampling}, delta = {self.delta:g}, "
            f"{self.accountant} accountant)"
            f"{missing}"
        )

    def seen_by_all(self, epsilon: float, largest: float) -> str:
        """Say what amplification hides: the ``largest`` client's epsilon without it, if it is more.

        >>> claim = Claim("client", "central", "add-remove", "Poisson", 1e-5, "prv")
        >>> claim.seen_by_all(8.0, 12.41), claim.seen_by_all(8.0, 8.0)
        ('; up to 12.5 for whoever sees who takes part', '')
        """
        if self.unit != "client" or self.trust != "central" or largest <= epsilon:
            return ""
        return f"; up to {rounded_up(largest)} for whoever sees who takes part"


def rounded_up(value: float) -> str:
    """Return three significant digits that never understate.

    >>> rounded_up(3.51), rounded_up(3.511), rounded_up(12345), rounded_up(float("inf"))
    ('3.51', '3.52', '12400', 'inf')
    """
    if not math.isfinite(value):
        return str(value)
    digits = Context(prec=3, rounding=ROUND_CEILING).create_decimal(repr(float(value)))
    return f"{float(digits):.10g}"


@final
class PrivacyLedger:
    """Keeps what was spent under one claim, and what epsilon was after every round.

    Unit ``client`` with trust ``central``: the claim is about the global history; the histories of
    clients are the same releases as an observer of participation has to count them. Otherwise, and
    where clients pay by turns, the claim is the largest epsilon over clients, and the global
    history counts for each of them.
    """

    def __init__(self, claim: Claim) -> None:
        self.claim = claim
        self._history = History()
        self._clients: dict[int, History] = {}
        self._column: dict[int, dict[str, float]] = {}
        self._round = 0
        self._stale = False

    def spend(self, round_: int, noise_multiplier: float, sample_rate: float) -> None:
        """Count one release of a round in the global history; ``sample_rate`` 1: not amplified.

        Raises:
            RunError: a later round was counted already.
        """
        event = History([(noise_multiplier, sample_rate, 1)])
        self._enter(round_)
        self._history = self._history.joined(event)

    def spend_client(self, round_: int, client: int, events: Iterable[Event]) -> None:
        """Count what ``client``'s own data paid in a round: it took part, so no amplification.

        Raises:
            RunError: a later round was counted already.
        """
        spent = History(events)
        self._enter(round_)
        self._clients[int(client)] = self._clients.get(int(client), History()).joined(spent)

    def epsilon(self) -> float:
        """Return the epsilon of the claim so far; inf where nothing is claimed."""
        return self._claimed(self._history, self._clients)

    def client_epsilons(self) -> dict[int, float]:
        """Return for each client that ever took part what its own history comes to."""
        return self._each(self._history, self._clients)

    def would_exceed(
        self,
        budget: float,
        events: Iterable[Event],
        clients: Mapping[int, Iterable[Event]] | None = None,
    ) -> bool:
        """Return whether the claim would be above ``budget`` after spending these too.

        Nothing is counted. Where nothing is claimed, every budget is exceeded.
        """
        after = self._history.joined(History(events))
        each = dict(self._clients)
        for client, spent in (clients or {}).items():
            each[int(client)] = each.get(int(client), History()).joined(History(spent))
        return self._claimed(after, each) > budget

    def column(self) -> list[dict[str, float]]:
        """Return for each round with a release: ``round``, ``epsilon``, ``largest_client``."""
        if self._stale:
            largest = max(self.client_epsilons().values(), default=0.0)
            self._column[self._round] = {"epsilon": self.epsilon(), "largest_client": largest}
            self._stale = False
        return [{"round": r, **values} for r, values in sorted(self._column.items())]

    def state_dict(self) -> dict[str, Any]:
        """Return everything as JSON that shares nothing with the ledger; infinity is ``"inf"``."""
        return {
            "version": VERSION,
            "claim": _plain(self.claim.table()),
            "history": _plain(self._history.events()),
            "clients": {str(k): _plain(h.events()) for k, h in sorted(self._clients.items())},
            "column": _plain(self.column()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace what was spent by what :meth:`state_dict` returned.

        Raises:
            CheckpointError: not such a state, or one kept under another claim.
        """
        try:
            if state["version"] != VERSION:
                raise ValueError(f"version {state['version']!r}, not {VERSION}")
            theirs = dict(state["claim"])
            history = _history(state["history"])
            clients = {int(k): _history(events) for k, events in dict(state["clients"]).items()}
            column = {
                int(row["round"]): {k: _spent(row[k]) for k in ("epsilon", "largest_client")}
                for row in state["column"]
            }
        except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
            raise CheckpointError(f"the privacy ledger cannot be read: {error!r}") from error
        ours = _plain(self.claim.table())
        for key in ("unit", "trust", "adjacency", "delta", "accountant", "turns"):
            if theirs.get(key) != ours.get(key):
                raise CheckpointError(
                    f"the privacy ledger was kept for {key} = {theirs.get(key)!r}, this run says "
                    f"{ours.get(key)!r}: resume with the options it was started with"
                )
        self._history, self._clients, self._column = history, clients, column
        self._round, self._stale = max(column, default=0), False

    def report(self) -> dict[str, Any]:
        """Return what a reader needs to check every epsilon, as JSON.

        The global epsilon is null where that history is empty, as in a run without central noise.
        """
        of_clients = self.client_epsilons()
        claimed = self.epsilon()
        whole = self._cost(self._history) if self._history else None
        made = {
            "claim": self.claim.table(),
            "sentence": self.claim.sentence(claimed),
            "epsilon": claimed if self.claim.unit in UNITS else None,
            "global": {"history": self._history.events(), "epsilon": whole},
            "clients": {
                str(k): {"history": h.events(), "epsilon": of_clients[k]}
                for k, h in sorted(self._clients.items())
            },
            "not_covered": self.claim.not_covered,
            "rounds": self.column(),
        }
        return dict(_plain(made))

    def _enter(self, round_: int) -> None:
        if round_ < self._round:
            raise RunError(
                f"round {round_} cannot be counted: the privacy ledger is at round {self._round}"
            )
        if round_ > self._round:
            self.column()
        self._round, self._stale = round_, True

    def _cost(self, history: History) -> float:
        return epsilon(history, self.claim.delta, self.claim.accountant)

    def _claimed(self, history: History, clients: Mapping[int, History]) -> float:
        if self.claim.unit not in UNITS:
            return math.inf
        if self._central():
            return self._cost(history)
        return max([self._cost(history), *self._each(history, clients).values()])

    def _each(self, history: History, clients: Mapping[int, History]) -> dict[int, float]:
        """Return the epsilon of each client; clients with the same history are computed once."""
        costs: dict[tuple[Event, ...], float] = {}
        found = {}
        for client, own in sorted(clients.items()):
            total = own if self._central() else own.joined(history)
            key = tuple(total.events())
            if key not in costs:
                costs[key] = self._cost(total)
            found[client] = costs[key]
        return found

    def _central(self) -> bool:
        claim = self.claim
        return claim.unit == "client" and claim.trust == "central" and not claim.turns


def _plain(value: Any) -> Any:
    """Return ``value`` as JSON knows it: lists for tuples, ``"inf"`` for infinity."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return copy.deepcopy(value)


def _history(rows: Any) -> History:
    return History((_spent(z), float(q), n) for z, q, n in rows)


def _spent(value: Any) -> float:
    """Return a stored number; only infinity may be text."""
    if value == "inf":
        return math.inf
    if isinstance(value, bool | str) or not 0 <= float(value) < math.inf:
        raise ValueError(f"{value!r} is neither a number of 0 or more nor 'inf'")
    return float(value)
