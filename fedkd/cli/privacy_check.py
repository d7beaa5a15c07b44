"""What ``fedkd doctor`` says of a privacy plan that fits: noise, cost, and when a budget ends it.

What does not fit is said by the plan itself, which refuses it; no rule is written here twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from fedkd.engine.setup import Prepared
from fedkd.privacy.accounting import LARGEST_NOISE, History, epsilon
from fedkd.privacy.plan import PrivacyPlan, planned
from fedkd.privacy.swing import statement

SLOW = 20
"""Clients with accounts of their own from which on the prv accountant is noticeably slow."""


def findings(prepared: Prepared) -> list[tuple[str, str]]:
    """Return what is planned, by topic; [] where the experiment asks for no mechanism."""
    plan, swing = prepared.plan, prepared.experiment.privacy.swing
    found: list[tuple[str, str]] = []
    if plan.active:
        found = list(_planned(prepared))
    elif swing.map != "off":
        found = [("claim", statement(swing))]
    return [*found, *_advice(plan)]


def _planned(prepared: Prepared) -> Iterator[tuple[str, str]]:
    plan, rounds = prepared.plan, prepared.experiment.rounds
    options, population = plan.options, plan.population
    claim, accountant = plan.claim(), options.accountant
    said = replace(claim, not_covered=()).sentence(expected_epsilon(plan))
    yield f"after round {rounds}", f"at most {said}; rounds that upload nothing are free"
    yield "sampling", f"ok: {claim.sampling}"
    client = options.unit == "client"
    units = population.clients if client else max(population.examples)
    name = "clients" if client else "examples of the largest client"
    yield "delta", f"ok: {plan.delta:.3g} is below 1 / {units} ({name})"
    floor = max(_epsilon(plan, planned(plan, k, LARGEST_NOISE)) for k in _kinds(plan))
    yield (
        "accountant",
        f"ok: {accountant}; its floor for these releases is {floor:.2g}, however much noise there "
        "is; it reports 0 where nothing was released, and never less",
    )
    if client:
        sums = "the server needs the sum of uploads only, each counts the same"
        own = "every client clips and noises what it uploads"
        yield "uploads", f"ok: {sums if plan.central else own}"
    else:
        yield "training", "ok: no layer and no loss mixes the examples of a batch"
    yield "noise", _noise(plan)
    yield "max_epsilon", _budget(prepared)
    for i, item in enumerate(claim.not_covered):
        yield "" if i else "not covered", item


def expected_epsilon(plan: PrivacyPlan) -> float:
    """Return the epsilon after all rounds: of the run at central trust, else of the worst client.

    Rounds in which nothing is uploaded are counted all the same, so a run may end below it.
    """
    return max(_epsilon(plan, planned(plan, k, plan.noise[k])) for k in _kinds(plan))


def last_paid_round(prepared: Prepared) -> int:
    """Return the last round that ``max_epsilon`` pays for; all rounds where none is set."""
    plan, rounds = prepared.plan, prepared.experiment.rounds
    budget = plan.options.max_epsilon
    if budget is None or not plan.active:
        return rounds
    z = plan.accounted(plan.noise_multiplier)
    if plan.central and not plan.scheduled:
        releases = rounds if plan.population.releases is None else plan.population.releases
        paid = _most(lambda n: _epsilon(plan, History([(z, plan.rate, n)])) <= budget, rounds)
        return rounds if paid >= releases else paid
    affordable, turns = {}, dict.fromkeys(range(plan.population.clients), 0)
    for k in _kinds(plan):
        events = [(z, 1.0, 1)] if plan.scheduled else plan.round_of(k)
        affordable[_kind(plan, k)] = _most(
            lambda n, events=events: (  # type: ignore[misc]
                _epsilon(plan, History([(z, q, steps * n) for z, q, steps in events])) <= budget
            ),
            rounds,
        )
    attendance = prepared.attendance
    for round_ in range(1, rounds + 1):
        for k in attendance.scheduled(round_) if plan.scheduled else attendance.cohort(round_):
            turns[k] += 1
            most = affordable[_kind(plan, k)]
            if plan.scheduled and plan.population.turns[k] <= most:
                continue  # Rounds in which nothing is released are free.
            if turns[k] > most:
                return round_ - 1
    return rounds


def _most(fits: Callable[[int], bool], rounds: int) -> int:
    """Return the largest n in 0..rounds that ``fits``, where smaller ones do, too."""
    low, high = 0, rounds
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _kind(plan: PrivacyPlan, client: int) -> object:
    """Return what the cost of a client follows from: equal ones are computed once."""
    if plan.central and not plan.scheduled:
        return "all"
    return plan.noise[client], plan.population.turns[client], plan.population.fits[client]


def _kinds(plan: PrivacyPlan) -> list[int]:
    """Return one client of each kind."""
    found: dict[object, int] = {}
    for k in range(plan.population.clients):
        found.setdefault(_kind(plan, k), k)
    return list(found.values())


def _epsilon(plan: PrivacyPlan, history: History) -> float:
    return epsilon(history, plan.delta, plan.options.accountant)


def _noise(plan: PrivacyPlan) -> str:
    options, low, high = plan.options, min(plan.noise), max(plan.noise)
    span = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g} over clients"
    if high == 0:
        return "none is added: epsilon is inf, nothing is claimed"
    if options.unit == "example":
        clip = options.dp_sgd.max_grad_norm
        return f"multiplier {span}, in units of the norm {clip:g} of one example's gradient"
    norm = options.clipping.norm
    first = " in the first round" if options.clipping.mode == "adaptive" else ""
    of = "in units of what one client can add to a sum of uploads"
    if options.mean_noise is not None:
        span += f" (mean_noise {options.mean_noise:g} x {plan.expected():g} expected clients)"
    weights = f" (weights: norm {norm:g}{first})" if plan.population.weights else ""
    if plan.local or not plan.population.weights:
        return f"multiplier {span}, {of}{weights}"
    expected = plan.expected()
    return (
        f"multiplier {span}, {of}{weights}; std {high * norm / expected:.3g} on each weight of the "
        f"mean over {expected:g} expected clients{first}"
    )


def _budget(prepared: Prepared) -> str:
    budget, rounds = prepared.plan.options.max_epsilon, prepared.experiment.rounds
    if budget is None:
        return "not set: all rounds are played"
    last = last_paid_round(prepared)
    if last == rounds:
        return f"ok: {budget:g} pays for all {rounds} rounds"
    return (
        f"{budget:g} stops the run before round {last + 1} of {rounds}; raise it, plan "
        f"rounds = {last}, or add noise"
    )


def _advice(plan: PrivacyPlan) -> Iterator[tuple[str, str]]:
    options = plan.options
    if options.unit == "example" and options.accountant == "prv" and len(_kinds(plan)) > SLOW:
        yield (
            "advice",
            f"{len(_kinds(plan))} kinds of clients have accounts of their own, which the prv "
            "accountant takes seconds each for; privacy.accountant = 'rdp' is quick and reports "
            "a somewhat larger epsilon",
        )
    fewer = plan.population.lossy or plan.population.availability == "label"
    clipping = options.clipping
    if plan.central and fewer and clipping.mode == "adaptive" and clipping.quantile != 0.5:
        yield (
            "advice",
            "uploads that do not come count as half unclipped in the count of adaptive clipping; "
            f"with many of them privacy.clipping.quantile = {clipping.quantile:g} is out of reach "
            "and the norm grows or shrinks without end; set it to 0.5, or use mode = 'flat'",
        )
