"""What was asked and how it was done, in words: from the resolved configurations of the runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedkd.axes import named
from fedkd.config import Component, Experiment
from fedkd.report.collection import Collection, Value, axis_title
from fedkd.report.page.drawing import slug
from fedkd.report.page.parts import Code, Fact, Section, table

if TYPE_CHECKING:
    from fedkd.report.measures import Target
    from fedkd.report.runs import RunView

Varied = frozenset[str]
Read = Callable[[Experiment, Varied], str]
MANY = 6
"""So many different values of one setting are listed; of more, how many there are."""


def at(point: Mapping[str, Value]) -> str:
    """Return a point in words; empty where nothing varies.

    >>> at({"clients.participation.ratio": 0.1, "rounds": 20})
    'participation ratio 0.1, rounds 20'
    """
    return ", ".join(f"{axis_title(key)} {named(value)}" for key, value in point.items())


def runs_of(collection: Collection) -> list[RunView]:
    """Return every run that has a result, in the order of the groups."""
    return [run for group in collection.groups for run in group.runs]


def listed(names: Iterable[str], last: str = "and") -> str:
    """Return names as a sentence lists them.

    >>> listed(["a"]), listed(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    *most, final = [*names] or [""]
    return f"{', '.join(most)} {last} {final}" if most else final


def question(collection: Collection) -> str:
    """Return what the runs were made to find out, as one sentence."""
    runs = runs_of(collection)
    labels = listed(collection.labels[:12])
    if len(collection.labels) > 12:
        labels = f"{len(collection.labels)} methods"
    single = len(collection.labels) == 1
    where = f" on {_distinct(runs, lambda e: e.data.source.name)[0]}" if runs else ""
    if collection.axes:
        over = listed(axis_title(key) for key in collection.axes)
        return f"How does the user accuracy of {labels} change with {over}{where}?"
    if single:
        return f"How well does {labels} serve each client{where}?"
    return f"How do {labels} compare{where}: for the average client, and for the worst?"


def setting(collection: Collection, target: Target | None) -> Section:
    """Return data, partition, clients, training and what varies."""
    runs = runs_of(collection)
    facts = []
    varied = frozenset(collection.axes)
    for name, read in READ.items():
        values = _distinct(runs, lambda e, read=read: read(e, varied))  # type: ignore[misc]
        if values and values != [""]:
            facts.append(Fact(name, tuple(_some([v for v in values if v]))))
    if collection.axes:
        axes = (
            f"{axis_title(key)} ({key}): {', '.join(named(v) for v in values)}"
            for key, values in collection.axes.items()
        )
        facts.append(Fact("What varies", tuple(axes)))
    facts.append(Fact("Methods", (", ".join(collection.labels),)))
    seeds = sorted({run.seed for run in runs})
    if seeds:
        facts.append(Fact("Seeds", (", ".join(map(str, seeds)),)))
    if target is not None:
        facts.append(Fact("Target", (f"{100 * target.accuracy:.1f} % ({target.origin})",)))
    notes = tuple(getattr(collection, "notes", ()))
    return Section("setting", "Question and setting", (question(collection), *notes), tuple(facts))


def reproduction(collection: Collection, commands: Sequence[str]) -> Section:
    """Return commands, versions, commit, machine, and what each label was run with."""
    runs = runs_of(collection)
    code = (Code("commands", "", "\n".join(commands)),) if commands else ()
    made = [run.summary.get("provenance") or {} for run in runs]
    facts = [
        Fact(title, tuple(values))
        for title, read in PROVENANCE.items()
        if (values := list(dict.fromkeys(text for p in made if (text := read(p)))))
    ]
    seeds = sorted({run.seed for run in runs})
    facts.append(Fact("Seeds", (", ".join(map(str, seeds)),)))
    folded = []
    for i, label in enumerate(collection.labels):
        first = next((g for g in collection.groups if g.label == label and g.runs), None)
        if first is not None:
            run = first.runs[0]
            where = ", ".join(t for t in (at(first.point), f"seed {run.seed}") if t)
            text = run.experiment.toml()
            folded.append(Code(f"config-{i}-{slug(label)}", f"{label} ({where})", text))
    rows = [
        (group.label, *map(named, group.point.values()), str(run.seed), run.summary["digest"])
        for group in collection.groups
        for run in group.runs
    ]
    titles = ("method", *map(axis_title, collection.axes), "seed", "digest")
    note = "A digest is a hash of everything that a result depends on; runs lie in runs/<digest>."
    every = table("runs", "All runs", titles, rows, (note,), folded=True)
    return Section(
        "reproduce",
        "How to reproduce",
        facts=tuple(facts) if runs else (),
        code=code,
        tables=(every,) if rows else (),
        folded=tuple(folded),
    )


def _distinct(runs: Sequence[RunView], read: Callable[[Experiment], str]) -> list[str]:
    return list(dict.fromkeys(read(run.experiment) for run in runs))


def _some(values: Sequence[str]) -> list[str]:
    if len(values) <= MANY:
        return list(values)
    return [*values[: MANY - 1], f"… {len(values)} in all"]


def _component(component: Component, where: str, varied: Varied) -> str:
    options = _options(component.options, {}, tuple(component.options), where, varied)
    if f"{where}.name" in varied:
        return options
    return f"{component.name} ({options})" if options else component.name


def _options(
    table: Mapping[str, Any],
    default: Mapping[str, Any],
    always: Sequence[str],
    where: str,
    varied: Varied,
) -> str:
    """Return the options that matter: those in ``always``, and what is not the default.

    What is an axis stands among what varies already.
    """
    shown = [
        f"{key.replace('_', ' ')} {named(value)}"
        for key, value in table.items()
        if value not in ((), [], {}, "")
        and f"{where}.{key}" not in varied
        and (key in always or value != default.get(key))
    ]
    return ", ".join(shown)


def _clients(key: str, *always: str) -> Read:
    def read(e: Experiment, varied: Varied) -> str:
        table, default = (one.table()["clients"][key] for one in (e, Experiment()))
        return _options(table, default, always, f"clients.{key}", varied)

    return read


def _public(e: Experiment, varied: Varied) -> str:
    if not e.data.public.size:
        return ""
    source = e.data.public.source
    taken = "out of the training data"
    if source:
        taken = f"from {_component(source, 'data.public.source', varied)}"
    return f"{e.data.public.size} examples {taken}"


def _privacy(e: Experiment, varied: Varied) -> str:
    if e.privacy.unit == "none":
        return "no mechanism; nothing is claimed"
    table, default = e.table()["privacy"], Experiment().table()["privacy"]
    return _options(table, default, ("unit", "trust"), "privacy", varied)


def _judged(e: Experiment, _: Varied) -> str:
    every = "every round" if e.evaluate.every == 1 else f"every {e.evaluate.every} rounds, the last"
    k, share = e.evaluate.last_k, e.evaluate.share
    rarer = f", or more rarely before the last {k}, for {100 * share:.4g} % of the work"
    return f"{every}{rarer if share < 1 else ''}; reported: mean of the last {k} judged"


def _network(e: Experiment, varied: Varied) -> str:
    return ", ".join(_component(m, "model", varied) for m in e.clients.models or (e.model,))


def _partition(e: Experiment, varied: Varied) -> str:
    return e.data.manifest or _component(e.data.partition, "data.partition", varied)


READ: dict[str, Read] = {
    "Data": lambda e, varied: _component(e.data.source, "data.source", varied),
    "Partition": _partition,
    "Validation": lambda e, _: f"{100 * e.data.validation:g} % of each client's training examples",
    "Public pool": _public,
    "Clients": lambda e, varied: "" if "clients.count" in varied else str(e.clients.count),
    "Who takes part": _clients("participation", "scheme", "ratio"),
    "Local training": _clients("training", "epochs", "batch_size", "optimizer", "lr"),
    "Network": _network,
    "Rounds": lambda e, varied: "" if "rounds" in varied else str(e.rounds),
    "Judged": _judged,
    "Privacy": _privacy,
}
PROVENANCE: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "Git commit": lambda p: (
        p.get("commit", "").removesuffix("+")
        + (" with changes that are not committed" if p.get("commit", "").endswith("+") else "")
    ),
    "Versions": lambda p: ", ".join(f"{k} {v}" for k, v in p.get("versions", {}).items()),
    "Machine": lambda p: ", ".join(f"{v} {k}" for k, v in p.get("machine", {}).items()),
}


def safe_json(value: Any) -> str:
    r"""Return compact JSON that cannot end the element it stands in: without < > and &.

    >>> print(safe_json("</script>"))
    "\u003c/script\u003e"
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
