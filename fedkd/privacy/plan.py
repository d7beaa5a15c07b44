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
from fedkd.privacy.ledger import Claim
from fedkd.privacy.options import Privacy
from fedkd.privacy.quick import noise_for
from fedkd.privacy.uncovered import uncovered

Event = tuple[float, float, int]
CLOSE = 0.99
"""Share of a target that a calibrated epsilon has to reach: less would waste noise."""
NEAR = 0.7
"""Share of the noise that a fast bound asks for, below which nobody looks."""


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
        population = self.population
        if population.everybody:
            return float(population.clients)
        if population.scheme == "poisson":
            return population.ratio * population.clients
        return float(max(1, round(population.ratio * population.clients)))

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
            not_covered=uncovered(options, self.population.public),
        )


def sampling(options: Privacy, population: Population) -> str:
    """Return the sampling model that an epsilon rests on, in words."""
    if options.unit == "example":
        if options.release.mode == "frozen-encoder":
            return "no subsampling, releases of whole tables"
        said = "Poisson sampling of a client's examples at batch_size / examples in every step"
        return said + (", none in releases of class sums" if population.tables else "")
    if options.trust == "central" and not population.everybody and population.scheme == "poisson":
        return f"Poisson sampling of clients at rate {population.ratio:g}"
    if population.everybody:
        return "every client in every round, no amplification"
    return f"{population.scheme} cohorts, no amplification claimed"


def make_plan(options: Privacy, population: Population) -> PrivacyPlan:
    """Return the plan of a run.

    At client level a round is one Gaussian release with multiplier z on the sum of the cohort's
    clipped contributions, at sampling rate q under Poisson participation. At example level each
    client's z is calibrated for its own sampling rate and number of rounds.

    Raises:
        ConfigError: the options contradict each other or the federation, or cannot be justified.
    """
    if options.unit == "none":
        _check_none(options)
        return PrivacyPlan(options, population, (), 0.0, 1.0)
    found = problems(options, population)
    if found:
        raise ConfigError("\n".join(found))
    if options.delta is not None:
        _check_delta(options, population, options.delta)
    rate = 1.0
    if options.unit == "client" and options.trust == "central" and population.scheme == "poisson":
        rate = 1.0 if population.everybody else population.ratio
    draft = PrivacyPlan(options, population, (0.0,) * population.clients, 0.0, rate)
    delta = options.delta
    if options.epsilon is not None and options.noise_multiplier is not None:
        delta = _delta(draft, options.epsilon, options.noise_multiplier)
    assert delta is not None
    if options.noise_multiplier is not None:
        noise = (options.noise_multiplier,) * population.clients
    else:
        noise = _calibrated(draft, delta)
    plan = PrivacyPlan(options, population, noise, delta, rate)
    _check_delta(options, population, delta)
    _check_budget(plan)
    return plan


def _check_none(options: Privacy) -> None:
    """Refuse a budget without a mechanism: it would look like a claim."""
    asked = {
        "epsilon": options.epsilon,
        "noise_multiplier": options.noise_multiplier,
        "delta": options.delta,
        "max_epsilon": options.max_epsilon,
    }
    given = [f"privacy.{name}" for name, value in asked.items() if value is not None]
    if given:
        raise ConfigError(
            f"{' and '.join(given)} given, but privacy.unit = 'none' uses no mechanism and claims "
            "nothing; set privacy.unit = 'client' or 'example', or leave the rest out"
        )


def planned(plan: PrivacyPlan, client: int, noise: float) -> History:
    """Return what all planned rounds cost a client at a noise multiplier."""
    turns = plan.population.turns[client]
    if plan.central:
        releases = plan.population.releases
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
    for k in [0] if plan.central else clients:
        # Clients with as many examples and turns need the same noise: calibrated once.
        address = (plan.population.turns[k], plan.population.fits[k])
        if not plan.central and not planned(plan, k, 1.0):
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
    while epsilon_of(history_at(high), delta) < CLOSE * target:
        middle = (low + high) / 2
        if epsilon_of(history_at(middle), delta) <= target:
            high = middle
        elif high - middle < 1e-4 * high:
            break
        else:
            low = middle
    return high


def _delta(plan: PrivacyPlan, epsilon: float, noise: float) -> float:
    clients = [0] if plan.central else range(plan.population.clients)
    histories = {str(h.events()): h for h in (planned(plan, k, noise) for k in clients)}
    return max(delta_of(h, epsilon, plan.options.accountant) for h in histories.values())


def problems(options: Privacy, population: Population) -> list[str]:
    """Return what contradicts itself, or cannot be justified, in options for a federation."""
    found = _two_of_three(options)
    if options.secure_mode:
        found.append(
            "privacy.secure_mode = true needs the library torchcsprng, which is not maintained for "
            "this torch; set it to false, and do not deploy what this simulator draws"
        )
    swing = options.swing
    if swing.map not in ("off", "constant") and swing.scorer_options.get("private"):
        found.append(
            "privacy.swing.scorer_options.private = true says that temperatures depend on private "
            "data, but mechanisms take them as public; leave it out where the scorer reads public "
            "data only, else set privacy.swing.map = 'constant', or privacy.unit = 'none'"
        )
    if options.adjacency == "replace-one" and options.unit == "example":
        found.append(
            "privacy.adjacency = 'replace-one' with unit 'example': the amplification of Poisson "
            "sampling is accounted for adding or removing one example; use 'add-remove'"
        )
    if options.unit == "client":
        found += _client_problems(options, population)
    else:
        found += _example_problems(options, population)
    return found


def _two_of_three(options: Privacy) -> list[str]:
    given = {
        "epsilon": options.epsilon,
        "noise_multiplier": options.noise_multiplier,
        "delta": options.delta,
    }
    names = [name for name, value in given.items() if value is not None]
    if len(names) == 3:
        return [
            "privacy.epsilon, noise_multiplier and delta are all given, and each follows from the "
            "other two; leave one out"
        ]
    if len(names) < 2:
        listed = f"only privacy.{names[0]}" if names else "none of them"
        return [
            "two of privacy.epsilon, noise_multiplier and delta give the third, but "
            f"{listed} is set; for instance privacy.epsilon = 8.0 and privacy.delta = 1e-5"
        ]
    return []


def _client_problems(options: Privacy, population: Population) -> list[str]:
    found = []
    if options.trust == "local" and options.adjacency == "add-remove":
        found.append(
            "privacy.adjacency = 'add-remove' with trust 'local': the server sees who sends, so "
            "presence is not hidden; use 'zero-out' or 'replace-one'"
        )
    if options.trust == "central" and not population.everybody:
        if population.scheme == "poisson" and options.adjacency == "replace-one":
            found.append(
                "privacy.adjacency = 'replace-one' with Poisson participation: the amplification "
                "is accounted for adding or removing one client; use 'add-remove'"
            )
        if population.scheme != "poisson" and options.adjacency == "add-remove":
            found.append(
                f"clients.participation.scheme = {population.scheme!r} draws cohorts of a fixed "
                "size, in which one client more or less displaces another; set it to 'poisson' "
                "(amplified), or privacy.adjacency to 'zero-out' or 'replace-one' (not amplified)"
            )
    if options.release.votes == "confident-gnmax" and (
        options.accountant != "rdp" or options.max_epsilon is None
    ):
        found.append(
            "privacy.release.votes = 'confident-gnmax' answers as many queries as the votes allow; "
            "such adaptive costs are covered by a Renyi filter only: set privacy.accountant = "
            "'rdp' and privacy.max_epsilon"
        )
    return found


def _example_problems(options: Privacy, population: Population) -> list[str]:
    release, found = options.release, list[str]()
    clipped = math.isfinite(options.dp_sgd.max_grad_norm)
    if not clipped and options.noise_multiplier != 0 and release.mode != "frozen-encoder":
        found.append(
            "privacy.dp_sgd.max_grad_norm = inf bounds nothing, so no noise hides an example; give "
            "a finite norm, for instance 1.0, or noise_multiplier = 0, which claims nothing"
        )
    if population.tables and release.mode == "refuse":
        found.append(
            "this strategy uploads means by class of clients' own examples, which training by "
            "DP-SGD does not cover; set privacy.release.mode = 'dpsgd+release' (both are paid "
            "for) with privacy.release.noise_multiplier, or 'frozen-encoder' where features come "
            "from blocks that are not trained"
        )
    elif population.tables and release.noise_multiplier is None:
        found.append(
            "privacy.release.noise_multiplier is not set: it is the noise of one release of class "
            "sums, in units of what one example can change; for instance 20"
        )
    if not population.tables and release.mode == "frozen-encoder":
        found.append(
            "privacy.release.mode = 'frozen-encoder' is for strategies that release class means "
            "of features (fedproto); this one does not; leave it out"
        )
    return found


def _check_delta(options: Privacy, population: Population, delta: float) -> None:
    """Refuse a delta at which giving away one unit in the clear would be allowed."""
    units = population.clients if options.unit == "client" else max(population.examples)
    name = "clients" if options.unit == "client" else "examples of the largest client"
    if delta >= 1 / units:
        origin = "delta" if options.delta is not None else "delta (from epsilon and noise)"
        raise ConfigError(
            f"privacy.{origin} = {delta:.3g} is not below 1 / {units} ({name}): publishing one of "
            "them in the clear would satisfy it; lower delta, for instance to 1e-5"
            + ("" if options.delta is not None else ", by more noise or a larger epsilon")
        )


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
                "privacy.noise_multiplier"
                if plan.options.epsilon is None
                else "set a lower privacy.epsilon, which takes more noise"
            )
        )
