"""A privacy plan: options and federation brought together, consistent by construction or refused.

What the plan says is decided before round 1 and from public facts alone: how much noise, at which
sampling rate, against which neighbours, and what stays uncovered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from fedkd.errors import ConfigError
from fedkd.privacy.accounting import History, calibrate, delta_of, effective
from fedkd.privacy.accounting import epsilon as epsilon_of
from fedkd.privacy.checks import check_delta, check_none, problems
from fedkd.privacy.ledger import Claim
from fedkd.privacy.options import Privacy
from fedkd.privacy.population import Population
from fedkd.privacy.quick import noise_for
from fedkd.privacy.uncovered import uncovered

Event = tuple[float, float, int]
CLOSE = 0.99
"""Share of a target that a calibrated epsilon has to reach: less would waste noise."""
NEAR = 0.7
"""Share of the noise that a fast bound asks for, below which nobody looks."""


@dataclass(frozen=True)
class PrivacyPlan:
    """What a run adds, clips and claims.

    ``noise`` (N,) is each client's noise multiplier: the same for all at client level, where it is
    that of the whole round; at example level that of a client's DP-SGD. ``rate`` is the sampling
    rate that the global ledger may claim (1: no amplification).
    """

    options: Privacy
    population: Population
    noise: tuple[float, ...]
    delta: float
    rate: float

    @property
    def active(self) -> bool:
        """Whether any mechanism is used."""
        return self.options.unit != "none"

    @property
    def central(self) -> bool:
        """Whether the server noises the sum of clients' uploads."""
        return self.options.unit == "client" and self.options.trust == "central"

    @property
    def scheduled(self) -> bool:
        """Whether each client pays only for the releases of rounds in which its turn comes."""
        return self.central and self.population.scheduled

    @property
    def local(self) -> bool:
        """Whether each client noises its own upload."""
        return self.options.unit == "client" and self.options.trust == "local"

    @property
    def sgd(self) -> bool:
        """Whether clients train by DP-SGD."""
        return self.options.unit == "example" and self.options.release.mode != "frozen-encoder"

    @property
    def noise_multiplier(self) -> float:
        """The noise multiplier of a round at client level."""
        return self.noise[0] if self.noise else 0.0

    def accounted(self, noise_multiplier: float) -> float:
        """Return the noise multiplier in units of the sensitivity under this plan's adjacency."""
        return effective(noise_multiplier, self.options.adjacency)

    @property
    def given_noise(self) -> float | None:
        """The noise multiplier that the options give; none where it follows from epsilon."""
        if self.options.mean_noise is None:
            return self.options.noise_multiplier
        return self.options.mean_noise * self.expected()

    def round_of(self, client: int) -> list[Event]:
        """Return what one round will cost a client that takes part in it, before it is played."""
        if not self.active or self.central:
            return []
        if self.local:
            return [(self.accounted(self.noise[client]), 1.0, 1)]
        return self._example_round(self.noise[client], client)

    def _example_round(self, noise: float, client: int) -> list[Event]:
        population = self.population
        events: list[Event] = []
        if self.sgd:
            events = [(noise, q, steps) for q, steps in population.fits[client]]
        if population.tables:
            noise = self.options.release.noise_multiplier or 0.0
            events.append((float(noise), 1.0, population.tables))
        return events

    def expected(self) -> float:
        """Return the expected cohort: the public divisor of every sum over clients."""
        return self.population.expected

    def claim(self) -> Claim:
        """Return what is printed with every epsilon."""
        options = self.options
        return Claim(
            unit=options.unit,
            trust=options.trust if options.unit == "client" else "local",
            adjacency=options.adjacency,
            sampling=sampling(options, self.population),
            delta=self.delta,
            accountant=options.accountant,
            not_covered=uncovered(
                options,
                self.population.public,
                by_label=self.population.availability == "label",
                deadline=self.population.deadline,
            ),
            turns=self.scheduled,
        )


def sampling(options: Privacy, population: Population) -> str:
    """Return the sampling model that an epsilon rests on, in words."""
    if options.unit == "example":
        if options.release.mode == "frozen-encoder":
            return "no subsampling, releases of whole tables"
        said = "Poisson sampling of a client's examples at batch_size / examples in every step"
        return said + (", none in releases of class sums" if population.tables else "")
    said = _participation(options, population)
    return said + ("; lost uploads count as sent" if population.lossy else "")


def _participation(options: Privacy, population: Population) -> str:
    if options.trust == "central" and population.amplified:
        said = f"Poisson sampling of clients at rate {population.ratio:g}"
        if population.availability == "always":
            return said
        return said + ", an upper bound: being away is independent of data, and not claimed"
    if population.everybody:
        return "every client in every round, no amplification"
    if options.trust == "central" and population.scheduled:
        return (
            "cyclic cohorts by a public schedule, no amplification claimed: each client pays for "
            "the rounds of its own turns, the largest number is claimed"
        )
    said = f"{population.scheme} cohorts, no amplification claimed"
    if population.availability == "always":
        return said
    if population.availability == "label":
        return said + ": who is there follows from data, and every client pays for every round"
    return said + "; being away is independent of data, and not claimed"


def make_plan(options: Privacy, population: Population) -> PrivacyPlan:
    """Return the plan of a run.

    At client level a round is one Gaussian release with multiplier z on the sum of the cohort's
    clipped contributions, at sampling rate q under Poisson participation. Under cyclic
    participation the releases of other clients' turns do not depend on a client, so the epsilon of
    a run is that of the client with most turns. At example level each client's z is calibrated for
    its own sampling rate and number of rounds.

    Raises:
        ConfigError: the options contradict each other or the federation, or cannot be justified.
    """
    if options.unit == "none":
        check_none(options)
        return PrivacyPlan(options, population, (), 0.0, 1.0)
    found = problems(options, population)
    if found:
        raise ConfigError("\n".join(found))
    if options.delta is not None:
        check_delta(options, population, options.delta)
    rate = 1.0
    if options.unit == "client" and options.trust == "central" and population.amplified:
        rate = population.ratio
    draft = PrivacyPlan(options, population, (0.0,) * population.clients, 0.0, rate)
    delta = options.delta
    given = draft.given_noise
    if options.epsilon is not None and given is not None:
        delta = _delta(draft, options.epsilon, given)
    assert delta is not None
    noise = _calibrated(draft, delta) if given is None else (given,) * population.clients
    plan = PrivacyPlan(options, population, noise, delta, rate)
    check_delta(options, population, delta)
    _check_budget(plan)
    return plan


def planned(plan: PrivacyPlan, client: int, noise: float) -> History:
    """Return what all planned rounds cost a client at a noise multiplier."""
    turns = plan.population.turns[client]
    if plan.central:
        releases = turns if plan.scheduled else plan.population.releases
        rounds = plan.population.rounds if releases is None else releases
        return History([(plan.accounted(noise), plan.rate, rounds)] if rounds else [])
    if plan.local:
        return History([(plan.accounted(noise), 1.0, turns)] if turns else [])
    events = plan._example_round(noise, client)
    return History([(z, q, steps * turns) for z, q, steps in events if steps * turns])


def _calibrated(plan: PrivacyPlan, delta: float) -> tuple[float, ...]:
    target, accountant = plan.options.epsilon, plan.options.accountant
    assert target is not None
    clients = range(plan.population.clients)
    known: dict[object, float] = {}
    noise = []
    for k in [0] if plan.central and not plan.scheduled else clients:
        # Clients with as many examples and turns need the same noise: calibrated once.
        address = (plan.population.turns[k], plan.population.fits[k])
        if (plan.scheduled or not plan.central) and not planned(plan, k, 1.0):
            known[address] = 0.0  # Takes no part, or releases nothing that rests on this noise.
        if address not in known:
            known[address] = _noise(target, delta, partial(planned, plan, k), accountant)
        noise.append(known[address])
    if plan.options.unit == "client":
        # One mechanism for everybody: the client that is there most often decides.
        return (max(noise),) * plan.population.clients
    return tuple(noise)


def _noise(
    target: float, delta: float, history_at: Callable[[float], History], accountant: str
) -> float:
    """Return the calibrated noise: a fast bound says where the accountant has to look."""
    high = noise_for(target, delta, history_at) if accountant == "rdp" else math.inf
    if math.isinf(high) or epsilon_of(history_at(high), delta) > target:
        return calibrate(target, delta, history_at, accountant)
    low = high * NEAR
    if epsilon_of(history_at(low), delta) <= target:
        # The bound is loose here, or the cost does not rest on this noise at all.
        return calibrate(target, delta, history_at, accountant)
    while epsilon_of(history_at(high), delta) < CLOSE * target and high - low > 1e-4 * high:
        middle = (low + high) / 2
        if epsilon_of(history_at(middle), delta) <= target:
            high = middle
        else:
            low = middle
    return high


def _delta(plan: PrivacyPlan, epsilon: float, noise: float) -> float:
    one = plan.central and not plan.scheduled
    clients = [0] if one else range(plan.population.clients)
    histories = {str(h.events()): h for h in (planned(plan, k, noise) for k in clients)}
    return max(delta_of(h, epsilon, plan.options.accountant) for h in histories.values())


def _check_budget(plan: PrivacyPlan) -> None:
    """Refuse a budget that does not pay for the first round."""
    budget = plan.options.max_epsilon
    if budget is None:
        return
    firsts: Sequence[list[Event]] = [plan.round_of(k) for k in range(plan.population.clients)]
    if plan.central:
        firsts = [[(plan.accounted(plan.noise_multiplier), plan.rate, 1)]]
    costs = {str(e): epsilon_of(History(e), plan.delta, plan.options.accountant) for e in firsts}
    if max(costs.values()) > budget:
        raise ConfigError(
            f"privacy.max_epsilon = {budget:g} does not pay for one round, which costs "
            f"{max(costs.values()):.3g}; raise it, or "
            + (
                f"privacy.{'noise_multiplier' if plan.options.mean_noise is None else 'mean_noise'}"
                if plan.options.epsilon is None
                else "set a lower privacy.epsilon, which takes more noise"
            )
        )
