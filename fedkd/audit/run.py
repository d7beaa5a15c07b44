"""The audit of one finished run: load, distil, score, attack, bound, write down."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedkd.audit.attacks import attacks, released_attack
from fedkd.audit.finished import Finished
from fedkd.audit.one_shot import one_shot_table
from fedkd.audit.references import AuditWatcher, reference_runs
from fedkd.audit.results import (
    attack_table,
    bound_table,
    exposure_table,
    exposures,
    label_exposure,
    number,
    reductions,
)
from fedkd.audit.subjects import Subject, subjects
from fedkd.engine.folder import write_text
from fedkd.errors import DataError
from fedkd.privacy.auditing.options import USUAL_DELTA, Audit
from fedkd.privacy.canaries.draw import CanarySet
from fedkd.rng import stream

RESULT = "audit.json"
"""File of a run folder that holds the audit's numbers."""


def audit_run(
    folder: Path,
    audit: Audit | None = None,
    *,
    label: str = "",
    cache: Path | None = None,
    known: Mapping[str, Path] | None = None,
    watcher: AuditWatcher | None = None,
) -> dict[str, Any]:
    """Audit a finished run and write ``audit.json`` into its folder; return what it holds.

    Args:
        folder: of the run; nothing in it is changed but ``audit.json``.
        audit: how; none: as its own configuration says.
        label: of the run in a comparison.
        cache: where students and reference runs are kept; none: ``folder/audit``.
        known: folders of finished runs by digest, that serve as references without another run.

    Raises:
        ConfigError: there is no finished run, no canary, or what is asked cannot be done.
        DataError: the canaries cannot be made again, or all coins came up tails.
        RunError: losses are not finite, or a reference run failed.
    """
    run = Finished.load(folder)
    run.check()
    audit = audit or run.prepared.experiment.audit
    if audit.delta is None:
        audit = replace(audit, delta=theory(run)["delta"] or USUAL_DELTA)
    cache = cache or folder / "audit"
    experiment = run.prepared.experiment
    result: dict[str, Any] = {
        "run": {
            "name": experiment.name,
            "strategy": experiment.strategy.name,
            "label": label or experiment.strategy.name,
            "seed": experiment.seed,
            "digest": experiment.digest(),
        },
        "theory": theory(run),
        "canaries": None,
        "subjects": {},
        "reductions": {},
        "one_shot": one_shot_table(run, audit),
    }
    if run.prepared.canaries is not None:
        _tell(watcher, "reference runs")
        others = reference_runs(experiment, audit, cache, known or {}, watcher)
        result |= _memory(run, others, audit, cache, watcher)
    write_text(folder / RESULT, json.dumps(result, indent=1, allow_nan=False) + "\n")
    return result


def _memory(
    run: Finished,
    others: Sequence[Finished],
    audit: Audit,
    cache: Path,
    watcher: AuditWatcher | None,
) -> dict[str, Any]:
    """Return what networks remember of the canaries that were planted in data."""
    canaries = run.canaries
    inside = np.stack([_coins(run, o) for o in others]) if others else np.empty((0, 0), dtype=bool)
    _tell(watcher, "scoring")
    mine = subjects(run, audit, cache)
    # Exposure needs no reference model, so these are scored for what attacks compare only.
    cheap = replace(audit, estimator="auto") if audit.estimator == "exact" else audit
    theirs = [subjects(o, cheap, cache) for o in others]
    rng = stream(run.prepared.experiment.seed, "audit", "bootstrap")
    table: dict[str, Any] = {}
    bits: dict[str, np.ndarray] = {}
    methods = set()
    for place, subject in enumerate(mine):
        _tell(watcher, f"attacking {subject.name}")
        own, saturated, how = exposures(subject, canaries, audit)
        bits[subject.name] = own
        methods |= {h.method for h in how}
        scores = attacks(subject, [t[place] for t in theirs], inside)
        table[subject.name] = {
            "quality": dict(subject.quality),
            "covered": covered(run, subject, audit),
            "exposure": exposure_table(
                own, saturated, how, canaries, audit, rng.child(subject.name)
            ),
            "label_exposure": label_exposure(
                subject,
                canaries,
                run.prepared.setting.task.classes,
                audit,
                rng.child(subject.name, "labels"),
            ),
            **_attacked(scores, run, audit),
        }
    if "released" in audit.on and others:
        found = released_attack(run, others, inside)
        if found is not None:
            table["released"] = {
                "quality": {"accuracy": None, "bits_per_character": None},
                "covered": run.prepared.plan.active,
                "exposure": None,
                **_attacked({"released": found}, run, audit),
            }
    if len(methods) > 1:
        # One extrapolated beyond the references, the other cut off there: that difference is no
        # reduction.
        same = replace(audit, estimator="interpolation")
        bits = {subject.name: exposures(subject, canaries, same)[0] for subject in mine}
    return {
        "canaries": {**_planted(canaries), "reference_models": len(others)},
        "subjects": table,
        "reductions": reductions(bits, canaries.inside, rng, audit.confidence),
        "reductions_by": "interpolation" if len(methods) > 1 else "/".join(methods),
    }


def _planted(canaries: CanarySet) -> dict[str, Any]:
    levels = sorted(set(canaries.repetitions.tolist()))
    copies = canaries.copies
    return {
        "kind": canaries.options.kind,
        "levels": levels,
        "count": len(canaries.x),
        "inside": int(canaries.inside.sum()),
        "outside": int((~canaries.inside).sum()),
        "references": len(canaries.reference_x),
        "clients": canaries.options.clients,
        "copies": {str(r): int(copies[canaries.repetitions == r].max()) for r in levels},
        "space_bits": number(float(np.log2(canaries.space))),
    }


def _attacked(scores: Mapping[str, np.ndarray], run: Finished, audit: Audit) -> dict[str, Any]:
    canaries, privacy = run.canaries, run.prepared.plan.options
    return {
        "attacks": attack_table(scores, canaries.inside, audit.confidence),
        "bounds": bound_table(scores, canaries, audit, privacy.unit, privacy.adjacency),
    }


def covered(run: Finished, subject: Subject, audit: Audit) -> bool:
    """Return whether the run's epsilon speaks of what this subject was made of.

    Personal networks hold a client's own data, which only DP-SGD bounds, and nothing where they are
    fine-tuned for judging or answer by what they find among those data; a student that was taught
    on private data has seen them without any noise of its own.
    """
    if not run.prepared.plan.active:
        return False
    if subject.name == "personal":
        tuned = "finetune_epochs" in run.prepared.experiment.strategy.options
        return run.prepared.plan.sgd and run.predict == "personal" and not tuned
    name = subject.name.removeprefix("student:")
    if name != subject.name and name in audit.students:
        return audit.students[name].transfer == "public"
    return True


def theory(run: Finished) -> dict[str, Any]:
    """Return what the run's privacy ledger claims, as its folder has it.

    Raises:
        DataError: ``privacy.json`` is damaged.
    """
    unit = run.prepared.plan.options.unit
    file = run.folder / "privacy.json"
    nothing = {"epsilon": "inf", "delta": None, "unit": unit, "sentence": _sentence(run)}
    if not run.prepared.plan.active:
        return nothing
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        epsilon, delta = report["epsilon"], report["claim"]["delta"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} cannot be read ({error!r}); run the experiment again") from None
    return {**nothing, "epsilon": "inf" if epsilon is None else epsilon, "delta": delta}


def _sentence(run: Finished) -> str:
    summary = json.loads((run.folder / "summary.json").read_text(encoding="utf-8"))
    return str(summary.get("privacy", ""))


def _coins(run: Finished, other: Finished) -> np.ndarray:
    if not np.array_equal(run.canaries.x, other.canaries.x):
        raise DataError(
            f"the reference run in {other.folder} has other canaries than {run.folder}: their data "
            "differ; remove it to run it again"
        )
    return other.canaries.inside


def _tell(watcher: AuditWatcher | None, what: str) -> None:
    if watcher is not None:
        watcher.doing(what)
