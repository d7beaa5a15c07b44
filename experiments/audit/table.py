"""Tables of the audits that were run: what each subject remembers, and swing against honest noise.

    python -m experiments.audit.table runs

Reads ``audits.json`` below ``runs/audit-NAME-audit`` of every file of this folder, writes
``results-NAME.md`` with its figures' numbers (``results-NAME.json``, curves left out) and
``equal-quality.md``: at equal bits per character, a student or a teacher trained under noise?
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedkd.audit.study import RESULTS
from fedkd.engine.folder import write_text
from fedkd.metrics.intervals import mean_t
from fedkd.report import audit_figures, audit_one_shot, audit_tables

HERE = Path(__file__).parent
NAMES = ("shakespeare", "topics", "dp", "images", "one-shot")
FIGURES = ("exposure", "trade-off")
Result = Mapping[str, Any]


def main() -> None:
    """Write the tables of whatever there is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, help="the folder that holds audit-NAME-audit")
    root = parser.parse_args().runs
    found = {}
    for name in NAMES:
        file = root / f"audit-{name}-audit" / RESULTS
        if file.is_file():
            found[name] = json.loads(file.read_text(encoding="utf-8"))["results"]
            write(name, found[name], file.parent)
    if {"shakespeare", "dp"} <= found.keys():
        rows = equal_quality(found["shakespeare"], found["dp"])
        write_text(HERE / "equal-quality.md", rows)


def write(name: str, results: Sequence[Result], folder: Path) -> None:
    """Write one audit's tables, numbers and figures."""
    tables = (
        audit_tables.headline(results),
        audit_tables.by_level(results),
        audit_tables.reductions(results),
    )
    text = f"# Audit: {name}\n\n`fedkd audit experiments/audit/{name}.toml`\n\n"
    text += "".join(table.markdown() for table in tables)
    shots = audit_one_shot.rows(results)
    if shots:
        titles = ("", "seed", "claimed", "estimated", "at least (of)", "cosine", "std if absent")
        lines = [titles, ("---",) * len(titles), *shots]
        text += (
            "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n{audit_one_shot.NOTE}\n"
        )
    write_text(HERE / f"results-{name}.md", text.rstrip("\n") + "\n")
    numbers = json.dumps(without_curves(results), separators=(",", ":"), sort_keys=True)
    write_text(HERE / f"results-{name}.json", numbers + "\n")
    audit_figures.draw(results, folder)
    for figure in FIGURES:
        drawn = folder / "plots" / f"{figure}.png"
        if drawn.is_file():
            shutil.copyfile(drawn, HERE / f"{name}-{figure}.png")


def without_curves(results: Sequence[Result]) -> list[Any]:
    """Return results without ROC curves and single canaries, which are most of their bytes."""

    def lean(value: Any) -> Any:
        if isinstance(value, Mapping):
            kept = {k: lean(v) for k, v in value.items() if k not in ("roc", "bits", "bounds")}
            return kept
        return [lean(v) for v in value] if isinstance(value, list) else value

    return [lean(result) for result in results]


def point(result: Result, subject: str) -> tuple[float, float]:
    """Return bits per character and mean exposure of a subject in one run."""
    table = result["subjects"][subject]
    return table["quality"]["bits_per_character"], table["exposure"]["all"]["value"]


def equal_quality(text: Sequence[Result], noised: Sequence[Result]) -> str:
    """Return a table: each student's exposure beside that of a noised teacher as good as it is.

    The noised teacher's exposure is interpolated between the measured noise levels of a mechanism,
    in each seed for itself. A student worse than the teacher with most noise is set against that
    one, which is better, and marked; one better than the teacher without noise has no partner.
    """
    seeds = sorted({r["run"]["seed"] for r in noised} & {r["run"]["seed"] for r in text})
    students = [s for s in text[0]["subjects"] if s.startswith("student:")]
    lines = [
        "| student | bits per character | exposure | client-level noise, as good | difference "
        "| example-level noise, as good | difference |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for student in students:
        own = {s: point(_run(text, s), student) for s in seeds}
        cells = [student.removeprefix("student:")]
        cells += [_mean([own[s][i] for s in seeds]) for i in (0, 1)]
        for mechanism in ("client", "example"):
            pairs = [(s, _at(noised, s, mechanism, own[s][0])) for s in seeds]
            known = [(own[s][1], other) for s, other in pairs if other is not None]
            if not known:
                cells += ["none", "–"]
                continue
            part = "" if len(known) == len(seeds) else f" ({len(known)} of {len(seeds)} seeds)"
            shown = [s for s, other in pairs if other is not None]
            part += " *" if any(_worst(noised, s, mechanism) < own[s][0] for s in shown) else ""
            cells += [_mean([b for _, b in known]) + part, _mean([a - b for a, b in known])]
        lines.append(f"| {' | '.join(cells)} |")
    arms = dict.fromkeys(r["run"]["label"] for r in noised)
    lines += [
        "",
        "Teachers under noise:",
        "",
        "| | bits per character | exposure | claimed epsilon (delta) |",
        "| --- | --- | --- | --- |",
    ]
    for arm in arms:
        own_runs = [r for r in noised if r["run"]["label"] == arm]
        points = [point(r, "teacher") for r in own_runs]
        claims = dict.fromkeys(_claim(r) for r in own_runs)
        cells = [arm, _mean([p[0] for p in points]), _mean([p[1] for p in points])]
        lines.append(f"| {' | '.join([*cells, ', '.join(claims)])} |")
    head = (
        "# Students against noise, at equal quality\n\nShakespeare's roles; mean over seeds "
        f"{seeds} with Student's t intervals (none of one seed). Exposure in bits, mean over all "
        "planted canaries; 1.44 is no memory. Difference: student minus noised teacher, paired by "
        "seed; below 0 the student remembers less. *: the student is worse than the teacher with "
        "most noise, which it is then set against.\n\n"
    )
    return head + "\n".join(lines) + "\n"


def _run(results: Sequence[Result], seed: int) -> Result:
    return next(r for r in results if r["run"]["seed"] == seed)


def _at(noised: Sequence[Result], seed: int, mechanism: str, quality: float) -> float | None:
    """Return the exposure of a teacher under noise that predicts as well, in one seed."""
    points = _teachers(noised, seed, mechanism)
    bits = [p[0] for p in points]
    # Without an arm of this mechanism in this seed there is nothing to compare with.
    if len(points) < 2 or quality < bits[0]:
        return None
    return float(np.interp(quality, bits, [p[1] for p in points]))


def _worst(noised: Sequence[Result], seed: int, mechanism: str) -> float:
    return _teachers(noised, seed, mechanism)[-1][0]


def _teachers(noised: Sequence[Result], seed: int, mechanism: str) -> list[tuple[float, float]]:
    """Return bits per character and exposure of a seed's teachers, from no noise to most."""
    return sorted(
        point(r, "teacher")
        for r in noised
        if r["run"]["seed"] == seed
        and (r["run"]["label"] == "fedavg" or r["run"]["label"].startswith(mechanism))
    )


def _claim(result: Result) -> str:
    theory = result["theory"]
    if isinstance(theory["epsilon"], str):
        return str(theory["epsilon"])
    return f"{theory['epsilon']:.3g} ({theory['delta']:g}, {theory['unit']})"


def _mean(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    found = mean_t(np.asarray(values))
    return f"{found.value:.2f} ± {found.high - found.value:.2f}"


if __name__ == "__main__":
    main()
