"""From an experiment to its privacy plan: what the strategy releases, against what is claimed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fedkd.clients.attendance import Attendance
from fedkd.clients.dp_sgd import dp_problems, rate_of, steps_of
from fedkd.config import Experiment
from fedkd.engine.planting import canary_clients_fit
from fedkd.errors import ConfigError
from fedkd.privacy.checks import problems
from fedkd.privacy.client_level import ClientLevel
from fedkd.privacy.options import Privacy
from fedkd.privacy.payload import Histogram, Payload, Scores, Table, Weights
from fedkd.privacy.plan import PrivacyPlan, make_plan
from fedkd.privacy.population import Population
from fedkd.rng import stream
from fedkd.strategies.base import Setting, Strategy
from fedkd.types import Arrays, ClientInfo


def plan_for(
    experiment: Experiment, strategy: Strategy, setting: Setting, attendance: Attendance
) -> PrivacyPlan:
    """Return the privacy plan of a run.

    Raises:
        ConfigError: the mechanism does not fit the strategy, the networks or the federation; all
            reasons are listed.
    """
    options = experiment.privacy
    payload = _payload(options, strategy, setting)
    found: list[str] = []
    if options.unit == "client":
        found = _client_level(options, strategy, setting, payload)
    elif options.unit == "example":
        found = _example_level(experiment, strategy, setting, payload)
    found += _votes(options, payload)
    canary_clients_fit(experiment, strategy, setting, payload)
    facts = population(experiment, strategy, setting, payload, attendance)
    found += _canary_turns(experiment, facts)
    if options.unit != "none":
        found += problems(options, facts)
    if found:
        raise ConfigError("\n".join(found))
    plan = make_plan(options, facts)
    if options.unit == "client":
        # What the mechanism itself refuses (no clipping, a count without noise) ends no round.
        expected = plan.expected() if plan.central else 1.0
        ClientLevel(options, plan.noise_multiplier).multipliers(payload, expected)
    return plan


def population(
    experiment: Experiment,
    strategy: Strategy,
    setting: Setting,
    payload: Payload,
    attendance: Attendance,
) -> Population:
    """Return the public facts that the cost of a mechanism follows from.

    Participation is drawn from the seed alone, so who takes part when is known before round 1 and
    tells nothing of anybody's data; where availability follows labels it does tell, and the plan
    makes nothing of it.
    """
    training, participation = experiment.clients.training, experiment.clients.participation
    privacy, turns = experiment.privacy, (0,) * len(setting.clients)
    rounds = list(range(1, experiment.rounds + 1))
    if privacy.unit == "client":
        rounds = _releasing(strategy, setting, rounds)
    if strategy.pooled:
        turns = (experiment.rounds,) * len(setting.clients)
    elif privacy.unit != "none":
        central = privacy.unit == "client" and privacy.trust == "central"
        turns = attendance.turns(rounds, scheduled=central and participation.scheme == "cyclic")
    sizes = [c.examples for c in setting.clients]
    if strategy.pooled:
        # The pseudo-client trains on everybody's examples.
        sizes = [sum(sizes)] * len(sizes)
    fits = strategy.fits(training)
    # Clients of one size share what they come to.
    trained = {n: tuple((rate_of(f, n), steps_of(f, n)) for f in fits if n) for n in set(sizes)}
    return Population(
        scheme="full" if strategy.pooled else participation.scheme,
        ratio=participation.ratio,
        rounds=experiment.rounds,
        examples=tuple(sizes),
        turns=turns,
        fits=tuple(map(trained.__getitem__, sizes)),
        releases=len(rounds),
        tables=sum(isinstance(part, Table | Histogram) for part in payload),
        weights=any(isinstance(part, Weights) for part in payload),
        public=setting.public is not None,
        availability="always" if strategy.pooled else participation.availability,
        presence=attendance.presence(),
        lossy=attendance.lossy,
        deadline=attendance.lossy and participation.deadline is not None,
    )


def _canary_turns(experiment: Experiment, facts: Population) -> list[str]:
    """Refuse canary clients that would be there more often than the clients of the claim."""
    if not (experiment.canaries.random_clients and facts.scheduled):
        return []
    return [
        f"canaries.random_clients = {experiment.canaries.random_clients} with "
        "clients.participation.scheme = 'cyclic': canary clients are in every round, for which no "
        "client of a cyclic schedule pays; use scheme 'poisson', 'fixed' or 'full'"
    ]


def _payload(options: Privacy, strategy: Strategy, setting: Setting) -> Payload:
    if options.unit == "none":
        return ()
    state = strategy.init(setting, stream(setting.seed, "server", "init"))
    payload = _declared(strategy, state, setting.clients[0], setting)
    if payload is None:
        raise ConfigError(
            f"privacy.unit = {options.unit!r}: with these options the strategy uploads what no "
            "mechanism covers (single examples' features, statistics, factors, or what a strategy "
            "of your own does not declare), so that nothing could be claimed; set privacy = "
            "'none', or use a strategy whose uploads are weights, scores of a public pool or class "
            "means (fedavg, fedd2s, fd, fedproto, fedmd)"
        )
    return payload


def _releasing(strategy: Strategy, setting: Setting, rounds: Sequence[int]) -> list[int]:
    """Return the rounds in which something is uploaded: scores that nobody would use are not."""
    state = strategy.init(setting, stream(setting.seed, "server", "init"))
    return [r for r in rounds if _declared(strategy, state, setting.clients[0], setting, r) != ()]


def _declared(
    strategy: Strategy, state: Arrays, client: ClientInfo, setting: Setting, round_: int = 1
) -> Payload | None:
    received = strategy.broadcast(state, client, round_, setting)
    return strategy.declare(received, client, round_, setting)


def _votes(options: Privacy, payload: Payload) -> list[str]:
    """Refuse votes where nothing is voted on, which would be ignored on the quiet."""
    votes = options.release.votes
    scored = not payload or any(isinstance(part, Scores) for part in payload)
    if votes == "none" or (options.unit == "client" and scored):
        return []
    return [
        f"privacy.release.votes = {votes!r} is for unit 'client' and strategies that upload scores "
        "of a public pool (fedmd, ds-fl); here are none: set privacy.release.votes = 'none', or "
        "use such a strategy"
    ]


def _client_level(
    options: Privacy, strategy: Strategy, setting: Setting, payload: Payload
) -> list[str]:
    if strategy.pooled:
        return [
            "privacy.unit = 'client': this strategy trains on everybody's data in one place, where "
            "no client is apart from others; use unit 'example'"
        ]
    if options.trust == "local":
        return []
    found = [f"privacy.trust = 'central': {why}" for why in strategy.alone(setting)]
    state = strategy.init(setting, stream(setting.seed, "server", "init"))
    shapes = {
        c.model: signature(_declared(strategy, state, c, setting) or ())
        for c in reversed(setting.clients)
    }
    if len(set(shapes.values())) > 1:
        found.append(
            f"clients of different architectures ({', '.join(sorted(shapes))}) upload arrays of "
            "different shapes, which have no common sum; give all clients one model, or use a "
            "strategy that shares scores or class means (fedmd, fd), or privacy.trust = 'local'"
        )
    return found


def signature(payload: Payload) -> str:
    """Return the names and shapes of a payload, by which uploads can be summed or not."""
    parts = []
    for part in payload:
        match part:
            case Weights():
                parts.append([(k, v.shape) for k, v in sorted(part.reference.items())])
            case Scores():
                parts.append([(part.key, (part.rows, part.classes))])
            case Table():
                parts.append([(part.prefix, tuple(sorted(part.fields.items())))])
            case Histogram():
                parts.append([(part.key, (part.classes,))])
    return repr(parts)


def _example_level(
    experiment: Experiment, strategy: Strategy, setting: Setting, payload: Payload
) -> list[str]:
    found = [f"privacy.unit = 'example': {why}" for why in strategy.coupled()]
    frozen = experiment.privacy.release.mode == "frozen-encoder"
    for label in setting.book.labels:
        model = setting.book.make(label)
        if not frozen:
            found += [f"model {label!r}: {why}" for why in dp_problems(model)]
        if frozen:
            if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
                found.append(
                    f"privacy.release.mode = 'frozen-encoder', but model {label!r} has a BatchNorm "
                    "layer, through which the features of one example depend on others though "
                    "nothing is trained; use GroupNorm or LayerNorm"
                )
            missing = [b for b in model.block_names if b not in experiment.clients.training.frozen]
            if missing:
                found.append(
                    f"privacy.release.mode = 'frozen-encoder', but model {label!r} trains "
                    f"{', '.join(missing)}: features of an encoder that was trained on the same "
                    "records have no epsilon; name them in clients.training.frozen, or use "
                    "mode = 'dpsgd+release'"
                )
    if frozen and any(
        not isinstance(part, Table) or set(part.fields) != {"features"} for part in payload
    ):
        found.append(
            "privacy.release.mode = 'frozen-encoder' covers class means of features only; weights "
            "and soft labels depend on the trained head: use mode = 'dpsgd+release'"
        )
    return found
