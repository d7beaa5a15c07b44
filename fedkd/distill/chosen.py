"""How objectives and target policies are chosen in options: by name, or by a table with options."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator

from fedkd.distill.objectives.base import Objective, objectives
from fedkd.distill.policies.base import Need, TargetPolicy, policies
from fedkd.errors import ConfigError
from fedkd.options import build
from fedkd.registry import Registry
from fedkd.rng import Rng

T = TypeVar("T")
Choice = str | Mapping[str, Any]


def _canonical(registry: Registry[Any]) -> Callable[[Any], Any]:
    """Return what turns a choice into a name, or a table of a name and what is not as by default.

    Two ways of writing the same then have the same digest. Names that are not in the registry are
    left as they are, since some strategies know more words than there are objectives.
    """

    def canonical(value: Any) -> Any:
        if isinstance(value, str):
            return value
        if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
            raise ValueError("give a name, or a table with a name, as in { name = 'kl' }")
        name = value["name"]
        if name not in registry.names():
            return dict(value)
        try:
            made, usual = _made(registry, value, ""), registry.get(name)()
        except ConfigError as error:
            raise ValueError(f"{registry.kind} {name!r}: {error}") from None
        fields = [f.name for f in dataclasses.fields(made) if f.init]
        given = {f: getattr(made, f) for f in fields if getattr(made, f) != getattr(usual, f)}
        return {"name": name, **given} if given else name

    return canonical


def _several(value: Any) -> Any:
    # None rather than an empty list, so that digests are those of before there were policies.
    return (value,) if isinstance(value, str | Mapping) else value or None


Chosen = Annotated[str | dict[str, Any], BeforeValidator(_canonical(objectives))]
"""An option that names an objective: ``"kl"``, or ``{ name = "js", beta = 0.3 }``."""
ChosenPolicy = Annotated[str | dict[str, Any], BeforeValidator(_canonical(policies))]
"""An option that names a target policy, alike."""
ChosenPolicies = Annotated[tuple[ChosenPolicy, ...] | None, BeforeValidator(_several)]
"""Several target policies in order, or none; a single one may be given without brackets."""


def _made(registry: Registry[type[T]], value: Choice, where: str) -> T:
    table = {"name": value} if isinstance(value, str) else dict(value)
    return build(registry.get(str(table.pop("name"))), table, where)


def chosen(value: Choice, where: str = "strategy.objective") -> Objective:
    """Return the objective that an option names.

    Raises:
        ConfigError: there is none of that name, or an option of it is wrong; ``where`` is named.

    >>> chosen("kl")
    KullbackLeibler()
    """
    return _made(objectives, value, where)


def chosen_policy(value: Choice, where: str = "strategy.policies") -> TargetPolicy:
    """Return the target policy that an option names, at its beginning.

    Raises:
        ConfigError: there is none of that name, or an option of it is wrong; ``where`` is named.
    """
    return _made(policies, value, where)


OFFERED: frozenset[Need] = frozenset({"branches", "validation"})
"""What there is on clients' own examples and on a pool that they learn from."""
LACKING: dict[Need, str] = {
    "branches": "has branches, but what this strategy teaches is not a network with inner blocks "
    "of its own, or not in a fit of its own; leave strategy.objective.branches out",
    "teachers": "chooses between teachers, and here only what they say together is known; leave it "
    "out, or use a strategy whose server distils from clients' networks (feddf, dense, "
    "co-boosting, fedftg, dfrd)",
    "validation": "learns from a client's validation examples, which there are not where this "
    "strategy distils; leave it out, or use a strategy that distils on clients' examples (fedd2s, "
    "fedgkd, fd, fedntd, fedcache)",
}


def named(choice: Choice) -> str:
    """Return the name in a choice."""
    return choice if isinstance(choice, str) else str(choice["name"])


def asks(choice: Choice, need: Need) -> bool:
    """Return whether a policy cannot do without something; False where there is no such policy."""
    name = named(choice)
    return name in policies.names() and need in policies.get(name).needs


def learns(choice: Choice) -> bool:
    """Return whether a policy has a network that is trained."""
    policy = chosen_policy(choice)
    # Some have one as soon as they know how large it is.
    policy.sized(2, 2, Rng(0))
    return bool(policy.modules())


def problems_of(
    value: Choice,
    where: str = "strategy.objective",
    more: str = "",
    guided: Sequence[Choice] | None = None,
    offers: Collection[Need] = OFFERED,
) -> list[str]:
    """Return what is wrong with an objective and the policies that guide it; ``more`` ends it.

    ``offers``: what there is where they are used, of what only some policies need.
    """
    found = []
    try:
        if chosen(value, where).inner() is not None and "branches" not in offers:
            found.append(f"{where} = {named(value)!r} {LACKING['branches']}")
    except ConfigError as error:
        found.append(f"{where}: {error}{more}")
    for policy in guided or ():
        try:
            lacking = chosen_policy(policy).needs - set(offers)
        except ConfigError as error:
            found.append(f"strategy.policies: {error}")
            continue
        found += [f"strategy.policies = {named(policy)!r} {LACKING[need]}" for need in lacking]
        if asks(policy, "validation") and _once(value):
            able = [name for name in objectives.names() if objectives.get(name).twice]
            found.append(
                f"strategy.policies = {named(policy)!r} looks a step ahead, and the gradient of "
                f"{where} = {named(value)!r} cannot be differentiated again; use one of "
                f"{', '.join(able)}, or leave the policy out"
            )
    return found


def _once(value: Choice) -> bool:
    """Return whether the gradient of an objective is not to be differentiated."""
    name = named(value)
    return name in objectives.names() and not objectives.get(name).twice


def retempering(guided: Sequence[Choice] | None) -> list[str]:
    """Return which policies undo swing distillation: a line for the first of each kind."""
    known = [n for n in map(named, guided or ()) if n in policies.names()]
    found = []
    for undoes, why in (
        (lambda n: policies.get(n).retempers, "puts a temperature of its own in place of those"),
        (
            lambda n: "teachers" in policies.get(n).needs,
            "teaches what single clients say, without the temperatures and the noise",
        ),
    ):
        name = next(filter(undoes, known), None)
        if name is not None:
            found.append(
                f"strategy.policies = {name!r} {why} of swing distillation, which hide the more, "
                "the more private an item is; leave it out, or set privacy.swing.map = 'off'"
            )
    return found


def mixing(
    value: Choice, where: str = "strategy.objective", guided: Sequence[Choice] | None = None
) -> list[str]:
    """Return why examples cannot be clipped one by one under these choices; [] where they can."""
    found = []
    sides: list[tuple[Registry[Any], Sequence[Choice], str]] = [
        (objectives, [value], where),
        (policies, guided or (), "strategy.policies"),
    ]
    for registry, choices, at in sides:
        for choice in choices:
            name = named(choice)
            if name not in registry.names() or _made(registry, choice, at).dp == "per-example":
                continue
            single = [n for n in registry.names() if registry.get(n)().dp == "per-example"]
            why = "the others of its batch"
            if registry is policies and "validation" in policies.get(name).needs:
                why = "validation examples, which no accountant counts, and on its batch"
            found.append(
                f"{at} = {name!r} makes what one example is taught depend on {why}, so clipping "
                "each example's gradient bounds nothing; use one of "
                f"{', '.join(single) or 'none'}, or privacy.unit = 'client'"
            )
    return found
