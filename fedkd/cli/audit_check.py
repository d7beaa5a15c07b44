"""What ``fedkd doctor`` says of canaries: what is planted, and how much an audit could ever see.

An audit takes hours; that it has too few canaries to find anything is known before it begins.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import takewhile

import numpy as np

from fedkd.audit.possible import impossible
from fedkd.audit.references import reference_seeds
from fedkd.audit.results import bound_table
from fedkd.engine.setup import Prepared
from fedkd.privacy.auditing.bound import LEAST
from fedkd.privacy.auditing.options import SUBJECTS, USUAL_DELTA, Audit
from fedkd.privacy.auditing.released import LEAST as RELEASED_LEAST
from fedkd.privacy.canaries.draw import CanarySet
from fedkd.privacy.canaries.secrets import ENUMERABLE
from fedkd.privacy.exposure import NULL_BITS, UNKNOWN_SPACE_BITS
from fedkd.rng import stream

LARGE_SHARE = 0.1
"""The share of canaries among training rows above which a network is no longer the usual one."""
FEW = 100
"""References from which on mean exposure is hardly biased by their number."""
MANY = 200_000
"""Rows to be scored for personal networks above which this takes longer than all else."""


def findings(prepared: Prepared, seeds: Sequence[int] = ()) -> list[tuple[str, str]]:
    """Return what is planted and what an audit can see of it, by topic; [] without canaries.

    ``seeds``: of all runs of a comparison, which serve each other as reference runs.
    """
    canaries, count = prepared.canaries, prepared.experiment.canaries.random_clients
    found: list[tuple[str, str]] = []
    if count:
        here = round(prepared.plan.rate * count) if prepared.plan.active else count
        found.append((
            "canary clients",
            f"{count}, of which about {here} take part in a round; they send random directions, "
            "which a one-shot audit of the final network looks for",
        ))  # fmt: skip
    if canaries is None:
        return found
    found += _planted(prepared, canaries)
    found += _exposure(prepared, canaries)
    found += _bounds(prepared, canaries)
    found += _work(prepared, canaries, seeds or (prepared.experiment.seed,))
    return found


def warnings(prepared: Prepared) -> list[tuple[str, str]]:
    """Return what makes an audit weak, slow or impossible."""
    if prepared.canaries is None:
        reasons = impossible(prepared, prepared.experiment.audit)
        return [("warning", f"fedkd audit refuses this: {reason}") for reason in reasons]
    return [("warning", text) for text in _warnings(prepared, prepared.canaries)]


def _planted(prepared: Prepared, canaries: CanarySet) -> Iterator[tuple[str, str]]:
    options, inside = canaries.options, canaries.inside
    into, m = int(inside.sum()), len(inside)
    coins = f"{into} planted and {m - into} held back by fair coins"
    if not options.coin:
        coins = "all planted (coin = false): for exposure alone, no attack and no bound"
    example = f', as in "{canaries.texts[0]}"' if canaries.texts[0] else ""
    yield "canaries", f"{m} of kind {options.kind}{example}: {coins}"
    for level in sorted(set(canaries.repetitions.tolist())):
        at = canaries.repetitions == level
        each = canaries.copies[at & inside]
        size = plural(level, "copy", "copies") + (" a holder" if options.clients > 1 else "")
        if options.share and len(each):
            span = "" if each.min() == each.max() else f"{each.min()} to "
            size = f"in place of {span}{each.max()} rows"
        yield "", f"{size}: {int((at & inside).sum())} planted, {int((at & ~inside).sum())} not"
    copies, rows = _copies(prepared, canaries)
    clients = prepared.federation.clients
    held = {k for i, who in enumerate(canaries.holders) if inside[i] for k in who}
    yield (
        "rows",
        f"{copies} of the {rows} training rows are copies of canaries ({100 * copies / rows:.1f} "
        f"%), in the data of {len(held)} of {clients} clients; a canary has "
        f"{plural(options.clients, 'holder', 'holders')}",
    )


def _exposure(prepared: Prepared, canaries: CanarySet) -> Iterator[tuple[str, str]]:
    n, space = len(canaries.reference_y), canaries.space
    size = "no end of them" if math.isinf(space) else f"{space:,.0f} ({math.log2(space):.1f} bits)"
    yield "references", f"{n} secrets that are never planted; |R|, all there could be: {size}"
    most = math.log2(space) if math.isfinite(space) else UNKNOWN_SPACE_BITS
    resolved = f"{math.log2(n):.1f} bits (log2 of the references)"
    estimator = prepared.experiment.audit.estimator
    said = f"{most:.1f} bits by a fit, where it holds; {resolved} without"
    if estimator == "interpolation":
        said = resolved
    elif estimator == "exact":
        others = space - len(canaries.y)
        said = f"{math.log2(others + 1):.1f} bits, among all other secrets"
        if space > ENUMERABLE:
            said = "refused: audit.estimator = 'exact' has too many secrets to rank; use 'auto'"
    yield "exposure", f"at most {said}; {NULL_BITS:.2f} bits on average mean nothing is remembered"


def _bounds(prepared: Prepared, canaries: CanarySet) -> Iterator[tuple[str, str]]:
    """Yield what a perfect attack would certify, by the very rules of the audit."""
    if not canaries.options.coin:
        return
    plan, audit = prepared.plan, prepared.experiment.audit
    if audit.delta is None:
        # As the audit does: epsilons of different deltas cannot be compared.
        audit = replace(audit, delta=plan.delta if plan.active else USUAL_DELTA)
    # Distinct scores, all inside above all outside.
    perfect = np.arange(len(canaries.inside)) + len(canaries.inside) * canaries.inside
    table = bound_table(
        {"perfect": perfect.astype(np.float64)},
        canaries,
        audit,
        plan.options.unit,
        plan.options.adjacency,
    )
    if not table:
        yield "bounds", "none: all coins of every level fell alike; choose another seed"
        return
    confidence, delta = f"{100 * audit.confidence:g} %", f"delta {audit.delta:g}"
    yield (
        "bounds",
        f"the epsilon that a perfect attack would certify ({confidence}, {delta}); a lower bound "
        "near it says that canaries are too few, not that data are safe",
    )
    for level in dict.fromkeys(entry["level"] for entry in table):
        rows = [entry for entry in table if entry["level"] == level]
        group = rows[0]["group"]
        over = f", divided by a group of {group}" if group > 1 else ""
        n = plural(rows[0]["n"], "canary", "canaries")
        name = "all levels" if level == "all" else f"level {level}"
        said = ", ".join(f"{entry['method']} {_short(entry['ceiling'])}" for entry in rows)
        if not any(entry["ceiling"] for entry in rows):
            said = "nothing, these are too few"
        yield "", f"{name} ({n}{over}): {said}"


def _work(
    prepared: Prepared, canaries: CanarySet, seeds: Sequence[int]
) -> Iterator[tuple[str, str]]:
    audit = prepared.experiment.audit
    on = [name for name in audit.on if name != "student"]
    yield "attacked", ", ".join(on) + (", students" if "student" in audit.on else "")
    if "student" in audit.on:
        listed = [
            f"{name} ({student.model or 'model of the teacher'}, {student.transfer} data, "
            f"{'swing ' + student.swing.map if student.swing.map != 'off' else 'no swing'}, "
            f"{plural(student.epochs, 'epoch', 'epochs')})"
            for name, student in audit.students.items()
        ]
        none = "none: set audit.students.NAME, or leave student out of audit.on"
        yield "students", "; ".join(listed) or none
    k = audit.reference_models
    if not k:
        yield (
            "reference models",
            "none: no lira, no rmia, the weaker attack by loss alone; no extra runs",
        )
        return
    extra = sorted({s for seed in seeds for s in reference_seeds(seed, k)} - set(seeds))
    runs = plural(len(seeds), "run", "runs")
    which = f"seed{'s' * (len(extra) > 1)} {', '.join(map(str, extra))}"
    more = f"{plural(len(extra), 'extra run', 'extra runs')} ({which}) beside {runs}"
    if not extra:
        more = f"no extra run, {runs} serve each other"
    judged = _judged(prepared, canaries, audit)
    yield (
        "reference models",
        f"{k} for each run: {more}, for each method; online attacks can judge {judged} of "
        f"{len(canaries.inside)} canaries",
    )


def _judged(prepared: Prepared, canaries: CanarySet, audit: Audit) -> int:
    """Return how many canaries are in one reference run and out of another, by the known coins."""
    own, seed, m = prepared.experiment, prepared.experiment.seed, len(canaries.inside)
    inside = []
    for other in reference_seeds(seed, audit.reference_models):
        coins = stream(other, "canaries", "coins", own.canaries.seed)
        inside.append([coins.child("coin", i).uniform() < 0.5 for i in range(m)])
    known = np.array(inside)
    return int((known.any(axis=0) & ~known.all(axis=0)).sum()) if canaries.options.coin else 0


def _warnings(prepared: Prepared, canaries: CanarySet) -> Iterator[str]:
    experiment, options = prepared.experiment, canaries.options
    audit, n, m = experiment.audit, len(canaries.reference_y), len(canaries.inside)
    copies, rows = _copies(prepared, canaries)
    if copies > LARGE_SHARE * rows:
        yield (
            f"{100 * copies / rows:.0f} % of the training rows are canaries: the network is not "
            "the one that would be trained without them; lower canaries.count or the largest of "
            "canaries.repetitions, or take more data"
        )
    if n < FEW:
        yield (
            f"{n} references are few: a rank among them is coarse, and exposure ends at "
            f"{math.log2(n):.1f} bits; set canaries.references = 1000"
        )
    yield from _natural(prepared, canaries)
    group = int(canaries.changed.max())
    if experiment.privacy.unit == "example" and group > 1:
        yield (
            f"privacy.unit = 'example' protects one row, and a coin changes up to {group}: group "
            "privacy divides each bound on epsilon by that; for bounds set repetitions = [1], "
            "clients = 1 and share = 0, with a larger count"
        )
    if "personal" in audit.on:
        yield from _personal(prepared, canaries)
    # The default names all subjects; only who asks for this one is told that it is left out.
    if audit.on != SUBJECTS and "released" in audit.on and audit.reference_models < RELEASED_LEAST:
        yield (
            f"audit.on = 'released' needs audit.reference_models = {RELEASED_LEAST} or more, not "
            f"{audit.reference_models}: it is left out"
        )
    if options.coin and m < LEAST:
        yield f"{m} canaries certify nothing: give at least {LEAST}, better hundreds"
    if {"teacher", "student"} & set(audit.on) and not _has_teacher(prepared):
        yield (
            f"strategy {experiment.strategy.name!r} has no global network: there is no teacher to "
            "attack, only personal networks are"
        )
    for reason in impossible(prepared, audit):
        yield f"fedkd audit refuses this: {reason}"


def _personal(prepared: Prepared, canaries: CanarySet) -> Iterator[str]:
    """Warn where every holder's network scores all references, and that takes long."""
    audit = prepared.experiment.audit
    networks = 1 if prepared.strategy.pooled else len({who[0] for who in canaries.holders})
    each = len(canaries.reference_y)
    if audit.estimator == "exact" and canaries.space <= ENUMERABLE:
        each += int(canaries.space)
    total = networks * each * (1 + audit.reference_models)
    if total > MANY:
        of = f" of {1 + audit.reference_models} runs" if audit.reference_models else ""
        yield (
            f"audit.on = 'personal' scores {each} secrets with each of the {networks} networks "
            f"that hold canaries{of}: {total:,} rows; lower canaries.references, or leave "
            "'personal' out of audit.on"
        )


def _natural(prepared: Prepared, canaries: CanarySet) -> Iterator[str]:
    """Warn of secrets that training text holds anyway, so that their coins say nothing."""
    dataset = prepared.federation.dataset
    if dataset.tokenizer is None or not canaries.texts[0]:
        return
    decode = dataset.tokenizer.decode
    # A row begins with the last token of the one before.
    text = decode(dataset.train_x[:, 1:].ravel())
    references = [decode(row) for row in canaries.reference_x]
    for name, secrets in (("canaries", canaries.texts), ("references", tuple(references))):
        known = occurring(text, secrets)
        if known:
            yield (
                f"{len(known)} of the {len(secrets)} {name} occur in the training text anyway, "
                f"as {known[0]!r}; change canaries.pattern"
            )


def occurring(text: str, secrets: Sequence[str]) -> list[str]:
    """Return which of the secrets occur in a text, which is searched once.

    >>> occurring("the pin is 12, is 34", ["is 12", "is 99", "is 34"])
    ['is 12', 'is 34']
    """
    # What all begin with is what the first and the last of them in order begin with.
    ends = zip(min(secrets), max(secrets), strict=False)
    start = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], ends))
    lengths, wanted = sorted({len(secret) for secret in secrets}), set(secrets)
    found, at = set(), text.find(start)
    while at >= 0:
        found |= wanted & {text[at : at + length] for length in lengths}
        at = text.find(start, at + 1)
    return [secret for secret in secrets if secret in found]


def _has_teacher(prepared: Prepared) -> bool:
    strategy, setting = prepared.strategy, prepared.setting
    first = strategy.init(setting, stream(setting.seed, "server", "init"))
    weights = strategy.server_model(first)
    return weights is not None and set(weights) >= set(setting.book.initial(setting.book.labels[0]))


def _copies(prepared: Prepared, canaries: CanarySet) -> tuple[int, int]:
    """Return how many training rows are copies of canaries, and how many there are."""
    federation = prepared.federation
    rows = sum(federation.train_size(k) for k in range(federation.clients))
    return int(canaries.copies[canaries.inside].sum()), rows


def _short(value: float | str | None) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def plural(count: int, one: str, more: str) -> str:
    """Return a number with its noun.

    >>> plural(1, "copy", "copies"), plural(2, "copy", "copies")
    ('1 copy', '2 copies')
    """
    return f"{count} {one if count == 1 else more}"
