"""The figures of audits: exposure by copies, its tail against theory, attacks, and the trade-off.

Each is a view of ``audit.json`` of one run or of several seeds and labels. Lines of theory are
drawn only where a run's epsilon speaks of the subject.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedkd.engine.folder import writing
from fedkd.privacy.exposure import NULL_BITS, bound, level_at
from fedkd.report.audit_tables import Line, Result, lines
from fedkd.report.figures import PLOTS
from fedkd.report.style import colour, figure, legend
from fedkd.types import Estimate

MARKERS = (*"osD^vP*X",)
GREY = "#777777"
FAR = 2.5
"""What lies so many times above all that was measured is told, not shown."""
RARE = 0.01
"""The share of canaries above the level that theory is drawn at."""


def draw(results: Sequence[Result], folder: Path) -> list[Path]:
    """Draw all figures of these audits into ``folder/plots``; what was not measured has none.

    Raises:
        RunError: the disk is full or not writable.
    """
    made, own = lines(results), folder / PLOTS
    with writing(folder):
        files = exposure(made, own / "exposure") + tail(made, own / "exposure-once")
        for number, line in enumerate(made):
            name = re.sub(r"[^a-z0-9]+", "-", f"{line.label} {line.subject}".lower()).strip("-")
            # Two labels may differ in nothing that a file name can hold.
            taken = any(file.stem == f"roc-{name}" for file in files)
            files += roc(line, own / (f"roc-{name}-{number}" if taken else f"roc-{name}"))
        files += trade_off(made, own / "trade-off")
    return files


def exposure(made: Sequence[Line], stem: Path) -> list[Path]:
    """Draw exposure by the number of copies, with what no memorisation gives, and the ceiling."""
    shown, files = [line for line in made if line.levels()], list[Path]()
    if not shown:
        return files
    with figure(3.3 + 0.16 * len(shown), stem, files) as (drawn, axes):
        open_, top = False, 0.0
        for i, line in enumerate(shown):
            points = [(r, _inside(line, r), line.saturated(r)) for r in line.levels()]
            known = [(r, e, s) for r, e, s in points if e is not None]
            # Side by side, so that intervals of different lines do not hide one another.
            at = np.array([r for r, _, _ in known]) * 2 ** (0.06 * (i - (len(shown) - 1) / 2))
            values = np.array([e.value for _, e, _ in known])
            style, marker = colour(i), MARKERS[i % len(MARKERS)]
            axes.plot(at, values, **style, linewidth=1.1)
            axes.plot([], [], marker, **style, markersize=4, label=line.name)
            _bars(axes, at, [e for _, e, _ in known], style["color"])
            for x, value, (_, _, share) in zip(at, values, known, strict=True):
                inner = "white" if share else style["color"]
                axes.plot(x, value, marker, color=style["color"], mfc=inner, markersize=4)
            open_ |= any(share > 0 for _, _, share in known)
            top = max([top, *values, *(e.high for _, e, _ in known if math.isfinite(e.high))])
        if open_:
            axes.plot([], [], "o", color=GREY, mfc="white", markersize=4,
                      label="open: at least this, some beat all references")  # fmt: skip
        ceiling = _ceiling(shown)
        axes.axhline(NULL_BITS, color="black", linestyle=":", linewidth=1.1,
                     label="no memorisation (1.44)")  # fmt: skip
        low = min(0.0, axes.get_ylim()[0])
        # What lies far above all that was measured would press it together.
        high = 1.08 * _highest(shown, ceiling, max(top, 3.0))
        if ceiling is not None:
            hidden = ", not shown" if ceiling > high else ""
            axes.axhline(ceiling, color=GREY, linestyle="--", linewidth=1.1,
                         label=f"ceiling ({ceiling:.1f}{hidden})")  # fmt: skip
        _theory_by_copies(axes, shown, high)
        axes.set_ylim(low, high)
        _copies(axes, sorted({r for line in shown for r in line.levels()}))
        axes.set_ylabel("exposure in bits")
        axes.set_title(_units(shown, "canaries"), loc="left")
        legend(drawn, axes)
    return files


def tail(made: Sequence[Line], stem: Path) -> list[Path]:
    """Draw which share of the canaries with the fewest copies reach each exposure.

    Beside it what no memorisation gives, ``2^-t``, and the most that differential privacy allows in
    expectation, ``e^epsilon 2^-t + delta``, where it covers the subject.
    """
    shown, files = [line for line in made if line.levels()], list[Path]()
    if not shown:
        return files
    level = min(r for line in shown for r in line.levels())
    every = [(line, _pooled(line, level)) for line in shown]
    pooled = [(line, bits) for line, bits in every if bits.size]
    if not pooled:
        return files
    count = max(bits.size for _, bits in pooled)
    largest = max(float(bits.max()) for _, bits in pooled)
    end = max(1.05 * min(_ceiling(shown) or largest, FAR * largest), 4.0)
    t = np.linspace(0, end, 400)
    with figure(3.2 + 0.15 * len(shown), stem, files) as (drawn, axes):
        for i, (line, bits) in enumerate(pooled):
            x = np.unique(bits)
            share = 1 - np.searchsorted(np.sort(bits), x) / bits.size
            # The curve falls to 0 after the highest canary, which a log axis cannot show.
            axes.step([min(0.0, x[0]), *x], [1.0, *share], where="pre", **colour(i),
                      label=line.name)  # fmt: skip
            axes.plot(x[-1], share[-1], MARKERS[i % len(MARKERS)], color=colour(i)["color"],
                      markersize=4)  # fmt: skip
        axes.plot(t, 2.0**-t, color="black", linestyle=":", linewidth=1.1,
                  label="no memorisation")  # fmt: skip
        for i, claim in enumerate(_claims(shown)):
            most = bound(t, claim.epsilon, claim.delta, claim.units(level))
            axes.plot(t, most, color=GREY, linewidth=1.2,
                      linestyle=("--", "-.", (0, (1, 1)))[i % 3],
                      label=f"DP allows: {claim}")  # fmt: skip
        axes.set_yscale("log")
        axes.set_ylim(0.4 / count, 1.3)
        axes.set_xlim(0, end)
        axes.set_xlabel("exposure t in bits")
        axes.set_ylabel("share of canaries ≥ t")
        several = "" if all(len(line.runs) == 1 for line in shown) else ", all seeds together"
        axes.set_title(f"canaries of {_of(level)}: at most {count} a line{several}", loc="left")
        legend(drawn, axes)
    return files


def roc(line: Line, stem: Path) -> list[Path]:
    """Draw the ROC of every attack on a subject on log axes, where few false alarms can be seen.

    Of several seeds it is the mean TPR at each FPR. Left of one false alarm an FPR is not resolved:
    there the curve is the TPR without any.
    """
    names = list(dict.fromkeys(n for found in line.found for n in found.get("attacks") or {}))
    files: list[Path] = []
    if not names:
        return files
    # An attack that cannot judge every canary has fewer, and says so.
    outside = min(
        attack.get("outside", run["canaries"]["outside"])
        for run, found in zip(line.runs, line.found, strict=True)
        for attack in (found.get("attacks") or {}).values()
    )
    inside = min(run["canaries"]["inside"] for run in line.runs)
    left, low = 0.3 / outside, 0.5 / inside
    at = np.geomspace(left, 1, 400)
    with figure(3.5 + 0.11 * len(names), stem, files) as (drawn, axes):
        axes.axvspan(left, 1 / outside, color="#e6e6e6", linewidth=0,
                     label="not resolved: less than one false alarm")  # fmt: skip
        axes.plot(at, at, color=GREY, linestyle=":", linewidth=1.1, label="guessing")
        for i, name in enumerate(names):
            curves = [f["attacks"][name]["roc"] for f in line.found if name in f["attacks"]]
            mean = np.mean([_steps(curve, at) for curve in curves], axis=0)
            area = line.over_seeds("attacks", name, "auc")
            label = f"{name} (AUC {area.value:.3f})" if area else name
            # What finds nothing without a false alarm begins at the lower edge.
            axes.plot(at, np.maximum(mean, low / 2), **colour(i), label=label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(left, 1)
        axes.set_ylim(low, 1.15)
        axes.set_xlabel(f"false alarms, of {outside} canaries left out")
        axes.set_ylabel("planted canaries found")
        axes.set_title(f"{line.label}, {line.subject}: {_seeds([line])}", loc="left")
        legend(drawn, axes)
    return files


def trade_off(made: Sequence[Line], stem: Path) -> list[Path]:
    """Draw exposure of all planted canaries against quality: bits per character, or accuracy."""
    text = any(line.over_seeds("quality", "bits_per_character") for line in made)
    key, scale = ("bits_per_character", 1.0) if text else ("accuracy", 100.0)
    points = [(n, line.over_seeds("quality", key), line.over_seeds("exposure", "all"))
              for n, line in enumerate(made)]  # fmt: skip
    known = [(n, q, e) for n, q, e in points if q is not None and e is not None]
    files: list[Path] = []
    if not known:
        return files
    with figure(3.2 + 0.11 * len(known), stem, files) as (drawn, axes):
        axes.axhline(NULL_BITS, color="black", linestyle=":", linewidth=1.1,
                     label="no memorisation (1.44)")  # fmt: skip
        for i, (n, quality, bits) in enumerate(known):
            x, hue = scale * quality.value, colour(i)["color"]
            _bars(axes, [x], [bits], hue)
            if not math.isnan(quality.low):
                axes.plot([scale * quality.low, scale * quality.high], [bits.value] * 2, color=hue,
                          linewidth=0.9, alpha=0.7)  # fmt: skip
            axes.plot(x, bits.value, MARKERS[i % len(MARKERS)], color=hue, markersize=5,
                      linestyle="none", label=made[n].name)  # fmt: skip
        axes.set_xlabel(
            "bits per character (lower predicts better)" if text
            else "accuracy in % (higher predicts better)"
        )  # fmt: skip
        axes.set_ylabel("exposure in bits")
        axes.set_ylim(min(0.0, axes.get_ylim()[0]), max(2.0, axes.get_ylim()[1]))
        axes.set_title(_units([made[n] for n, _, _ in known], "all planted canaries"), loc="left")
        legend(drawn, axes)
    return files


@dataclass(frozen=True)
class _Claim:
    """An epsilon that covers a line, and how many of its units a canary of each level is."""

    epsilon: float
    delta: float
    example: bool
    group: tuple[tuple[int, int], ...]

    def units(self, level: int) -> int:
        """Return the units that a canary of so many copies is, with all its holders."""
        return dict(self.group)[level]

    def __str__(self) -> str:
        unit = "example" if self.example else "client"
        return f"ε = {self.epsilon:.3g}, δ = {self.delta:.0e} ({unit})"


def _claims(shown: Iterable[Line]) -> list[_Claim]:
    """Return every claim that covers a line, once."""
    found = []
    for line in shown:
        epsilon = line.epsilon()
        if epsilon is not None and math.isfinite(epsilon):
            run = max(line.runs, key=lambda r: float(r["theory"]["epsilon"]))
            theory, planted = run["theory"], run["canaries"]
            example = theory["unit"] == "example"
            group = tuple(
                (int(r), int(n) if example else int(planted["clients"]))
                for r, n in planted["copies"].items()
            )
            found.append(_Claim(epsilon, float(theory["delta"] or 0.0), example, group))
    return list(dict.fromkeys(found))


def _highest(shown: Sequence[Line], ceiling: float | None, top: float) -> float:
    """Return the highest of what was measured, the ceiling and theory that is not far above it."""
    fewest = min(r for line in shown for r in line.levels())
    marks = [level_at(c.epsilon, c.delta, RARE, c.units(fewest)) for c in _claims(shown)]
    marks += [] if ceiling is None else [ceiling]
    return max([top, *(mark for mark in marks if mark <= FAR * top)])


def _theory_by_copies(axes: Any, shown: Sequence[Line], high: float) -> None:
    """Draw above which exposure theory lets 1 % of the canaries lie, by the number of copies."""
    levels = sorted({r for line in shown for r in line.levels()})
    # One level is a point, and a line all the same.
    at = levels if len(levels) > 1 else [levels[0] / 1.5, levels[0] * 1.5]
    for i, claim in enumerate(_claims(shown)):
        bits = [level_at(claim.epsilon, claim.delta, RARE, claim.units(r)) for r in levels]
        least = f"{bits[0]:.1f}" + (f" at {_of(levels[0])}" if bits[0] < bits[-1] else "")
        axes.plot(
            at, bits if len(levels) > 1 else bits * 2, color=GREY, linewidth=1.2,
            linestyle=("-.", (0, (1, 1)), (0, (4, 1, 1, 1)))[i % 3],
            label=f"{claim}: 1 % above {least}" + (", not shown" if bits[0] > high else ""),
        )  # fmt: skip


def _inside(line: Line, level: int) -> Estimate | None:
    return line.over_seeds("exposure", "levels", str(level), "inside")


def _pooled(line: Line, level: int) -> np.ndarray:
    """Return the exposure of every planted canary of a level, of all seeds."""
    found = [(f.get("exposure") or {}).get("levels", {}).get(str(level)) for f in line.found]
    return np.array([b for f in found if f for b in f["bits"]], dtype=np.float64)


def _ceiling(shown: Sequence[Line]) -> float | None:
    """Return the highest exposure that could be measured, where it is known."""
    found = [f["exposure"]["ceiling"] for line in shown for f in line.found if f.get("exposure")]
    known = [float(c) for c in found if c is not None and math.isfinite(float(c))]
    return max(known) if known else None


def _steps(curve: dict[str, list[float]], at: np.ndarray) -> np.ndarray:
    """Return the TPR of a curve at the most false alarms that are no more than each of ``at``."""
    fpr, tpr = np.array(curve["fpr"]), np.array(curve["tpr"])
    # Rounding must not put a corner right of the place that stands for it.
    place = np.searchsorted(fpr, at * (1 + 1e-9), side="right") - 1
    return tpr[np.maximum(place, 0)]


def _bars(axes: Any, at: Any, found: Sequence[Estimate], hue: str) -> None:
    for x, e in zip(at, found, strict=True):
        if not math.isnan(e.low):
            axes.plot([x, x], [e.low, e.high], color=hue, linewidth=0.9, alpha=0.7)


def _copies(axes: Any, levels: Sequence[int]) -> None:
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log", base=2)
    axes.set_xlim(levels[0] / 1.5, levels[-1] * 1.5)
    axes.set_xticks(levels, [str(r) for r in levels])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("copies of a canary that each holder trains on")


def _units(shown: Sequence[Line], what: str) -> str:
    """Return what the points and their intervals are."""
    several = {len(line.runs) > 1 for line in shown}
    over = "seeds or canaries" if len(several) > 1 else "seeds" if several == {True} else "canaries"
    return f"mean over {what}, interval over {over}"


def _seeds(shown: Sequence[Line]) -> str:
    count = max(len(line.runs) for line in shown)
    return f"mean of {count} seeds" if count > 1 else "one seed"


def _of(level: int) -> str:
    return "1 copy" if level == 1 else f"{level} copies"
