"""What audits found as tables: exposure, attacks, bounds with their ceilings, reductions.

Built from ``audit.json`` of one run or of several; with two seeds or more numbers are means over
seeds. Nothing here says that a subject is safe: a low bound is what this attack could show.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedkd.engine.folder import write_text
from fedkd.errors import DataError
from fedkd.metrics.intervals import mean_t
from fedkd.privacy.exposure import excess
from fedkd.privacy.ledger import rounded_up
from fedkd.report import tables
from fedkd.report.notes import merged
from fedkd.report.tables import Column
from fedkd.types import Estimate

if TYPE_CHECKING:
    from rich.console import Console

Result = Mapping[str, Any]
CERTIFIED = "one-run"
"""The bound that rests on nothing but the coins: canaries of one run need not be independent."""
EXPOSURE = (
    "Exposure in bits, of canaries that were planted; 1.44 is what a network that has never seen "
    "them gives on average, and excess is counted from there. ≥: some canaries scored better than "
    "every reference, so that their exposure is at least what is shown."
)
TPR = "TPR: share of planted canaries found, at that share of false alarms."
UNRESOLVED = "*: share found without a false alarm, as too few were left out to measure that rate."
BOUND = (
    "epsilon ≥: what the one-run audit certified, of the most that it could have with as many "
    "canaries. Chosen before the scores were seen (unit client: all canaries; example: those with "
    "the fewest copies; no unit: the epsilon of a whole canary with all its copies), it rests on "
    "the coins alone, with confidence and delta of the bounds table; of several seeds it is the "
    "(lower) median. A low bound says that this attack showed no more, never that no more leaks."
)


@dataclass(frozen=True)
class Line:
    """One subject of one label in all its seeds; ``name`` is how tables and figures call it."""

    label: str
    subject: str
    name: str
    runs: tuple[Result, ...]

    @property
    def found(self) -> list[Mapping[str, Any]]:
        """What was found of the subject, of each seed."""
        return [run["subjects"][self.subject] for run in self.runs]

    def over_seeds(self, *path: str) -> Estimate | None:
        """Return the mean over seeds of the estimate at this place, or None where none has it."""
        return over_seeds(_at(found, path) for found in self.found)

    def levels(self) -> list[int]:
        """Return the levels of repetition at which exposure was measured in any seed."""
        return sorted({int(r) for f in self.found for r in (_at(f, ("exposure", "levels")) or {})})

    def saturated(self, level: int) -> float:
        """Return the share of canaries of this level that beat every reference, over seeds."""
        path = ("exposure", "levels", str(level), "saturated")
        shares = [s for s in (_at(found, path) for found in self.found) if s is not None]
        return sum(shares) / len(shares) if shares else 0.0

    def attack(self) -> str:
        """Return the attack by which bounds were taken: that one is shown, not the best."""
        bounds = self.found[0].get("bounds") or []
        names = list(self.found[0].get("attacks") or {})
        return str(bounds[0]["attack"]) if bounds else names[0] if names else ""

    def epsilon(self) -> float | None:
        """Return the largest epsilon claimed over seeds; inf: none, None: not of this subject."""
        largest = max(float(run["theory"]["epsilon"]) for run in self.runs)
        covered = all(found.get("covered", True) for found in self.found)
        return largest if covered or largest == math.inf else None


def lines(results: Sequence[Result]) -> list[Line]:
    """Return every subject of every label, in the order in which they come, seeds together.

    Raises:
        DataError: no result; a label that has a seed twice.
    """
    if not results:
        raise DataError("there is no audit to report; give at least one audit.json")
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        for subject in result["subjects"]:
            groups.setdefault((str(result["run"]["label"]), subject), []).append(result)
    labels, subjects = ({key[i] for key in groups} for i in (0, 1))
    made = []
    for (label, subject), runs in groups.items():
        seeds = [run["run"]["seed"] for run in runs]
        if len(set(seeds)) < len(seeds):
            raise DataError(f"label {label!r} has a seed twice ({seeds}); each audit counts once")
        shown = subject.replace("student:", "student ")
        name = shown if len(labels) == 1 else label if len(subjects) == 1 else f"{label}: {shown}"
        made.append(Line(label, subject, name, tuple(runs)))
    return made


def estimate(found: Mapping[str, Any] | float | None) -> Estimate | None:
    """Return an estimate of ``audit.json``, or a plain number as one without an interval."""
    if isinstance(found, int | float):
        return Estimate(float(found), math.nan, math.nan, 1, "")
    if found is None or found.get("value") is None:
        return None
    low, high = (math.nan if found[p] is None else float(found[p]) for p in ("low", "high"))
    return Estimate(float(found["value"]), low, high, found["n"], found.get("method") or "")


def over_seeds(found: Iterable[Any]) -> Estimate | None:
    """Return the mean over seeds with Student's t interval; of one seed its own estimate.

    What is missing in a seed is left out, and ``n`` tells. What is infinite in one has no mean.
    """
    known = [e for e in map(estimate, found) if e is not None]
    if len(known) < 2 or not all(math.isfinite(e.value) for e in known):
        return known[0] if len(known) == 1 else None
    mean = mean_t([e.value for e in known])
    notes = [e.method.partition(",")[2] for e in known if "unresolved" in e.method]
    return replace(mean, method=mean.method + (f",{notes[0]}" if notes else ""))


def rounded_down(value: float) -> str:
    """Return three significant digits that never overstate a lower bound.

    >>> rounded_down(1.139), rounded_down(0.0), rounded_down(float("inf"))
    ('1.13', '0', 'inf')
    """
    return rounded_up(-value).removeprefix("-")


def certified(line: Line) -> list[Mapping[str, Any]]:
    """Return of each seed the one-run bound that is chosen without a look at the scores."""
    chosen = []
    for run, found in zip(line.runs, line.found, strict=True):
        own = [b for b in found.get("bounds") or [] if b["method"] == CERTIFIED]
        every = [b for b in own if str(b.get("level", "all")) == "all"]
        single = sorted((b for b in own if b not in every), key=lambda b: int(b["level"]))
        by_record = run["theory"]["unit"] == "example"
        order = [*single, *every] if by_record else [*every, *single]
        chosen += order[:1]
    return chosen


@dataclass(frozen=True)
class Table:
    """Titles, rows of text, and what a reader has to know."""

    title: str
    titles: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        """Return the table and its notes as Markdown, or an empty string without rows."""
        if not self.rows:
            return ""
        notes = "".join(f"- {note}\n" for note in self.notes)
        return f"## {self.title}\n\n{tables._markdown(self.titles, self.rows)}\n\n{notes}\n"


def headline(results: Sequence[Result], intervals: bool = True) -> Table:
    """Return one row a subject: quality, exposure, attack, certified and claimed epsilon."""
    made = lines(results)
    quality = Column("accuracy", "accuracy in %", interval=intervals)
    if any(line.over_seeds("quality", "bits_per_character") for line in made):
        quality = Column("bits_per_character", "bits per character", 1.0, 3, interval=intervals)
    tops = {line.levels()[-1] for line in made if line.levels()}
    copies = f"{tops.pop()} copies" if len(tops) == 1 else "most copies"
    columns = (
        quality,
        Column("exposure", f"exposure, {copies}", 1.0, 2, intervals),
        Column("excess", "excess over 1.44", 1.0, 2, intervals, signed=True),
        Column("auc", "AUC", 1.0, 3, intervals),
        Column("0.01", "TPR at 1 % in %", interval=intervals),
        Column("0.001", "TPR at 0.1 % in %", interval=intervals),
    )
    rows = []
    for line in made:
        values = _quantities(line, quality.key)
        cells = [_cell(column, values[column.key], line) for column in columns]
        rows.append((line.name, *cells, _certified(line), _claimed(line)))
    titles = ("", *(c.title for c in columns), "epsilon ≥ (of)", "epsilon claimed")
    return Table("Audit", titles, rows, tuple(_notes(made)))


def by_level(results: Sequence[Result]) -> Table:
    """Return exposure of every subject by the number of copies, and of what was not planted."""
    made = [line for line in lines(results) if line.levels()]
    levels = sorted({r for line in made for r in line.levels()})
    column = Column("exposure", "", 1.0, 2, interval=True)
    rows = []
    for line in made:
        found = [line.over_seeds("exposure", "levels", str(r), "inside") for r in levels]
        cells = [_cell(column, e, line, r) for e, r in zip(found, levels, strict=True)]
        rows.append((line.name, *cells, column.show(line.over_seeds("exposure", "null"))))
    titles = ("", *(f"{r} {'copy' if r == 1 else 'copies'}" for r in levels), "not planted")
    measured = [f["exposure"] for line in made for f in line.found if f.get("exposure")]
    methods = ", ".join(dict.fromkeys(str(e["method"]) for e in measured))
    heard = merged(str(note) for e in measured for note in e["notes"])
    return Table("Exposure in bits", titles, rows, (f"Estimated by {methods}.", *heard))


def bounds(results: Sequence[Result]) -> Table:
    """Return every bound on epsilon with its ceiling and what it assumes; seeds side by side."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for line in lines(results):
        for b in (b for found in line.found for b in found.get("bounds") or []):
            key = (line.name, str(b["attack"]), str(b.get("level", "all")), str(b["method"]))
            groups.setdefault(key, []).append(b)
    for result in results:
        for kind in ("estimate", "lower") if result.get("one_shot") else ():
            b = result["one_shot"][kind]
            key = (str(result["run"]["label"]), "random clients", "all", str(b["method"]))
            groups.setdefault(key, []).append(b)
    rows = [(*key, *_bound_cells(same)) for key, same in groups.items()]
    titles = ("", "attack", "copies", "method", "epsilon ≥", "ceiling", "confidence", "delta",
              "canaries", "assumes")  # fmt: skip
    notes = (
        "Each bound holds by itself with its confidence, if what it assumes is true; several, one "
        "a seed, stand beside one another. An estimate is no bound, and says so.",
        "ceiling: what a perfect attack would have certified with as many canaries. 0 certifies "
        "nothing; that is no evidence of privacy.",
    )
    return Table("Lower bounds on epsilon", titles, rows, notes)


def reductions(results: Sequence[Result]) -> Table:
    """Return by how much each student's exposure is below its teacher's, raw and as excess."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for result in results:
        for name, table in (result.get("reductions") or {}).items():
            groups.setdefault((str(result["run"]["label"]), name), []).append(table)
    share, rows = Column("share", "", interval=True), []
    for (label, name), found in groups.items():
        cells = []
        for key in ("raw", "excess"):
            known = over_seeds(f.get(key) for f in found)
            why = dict.fromkeys(str((f.get(key) or {}).get("method") or "–") for f in found)
            part = f" ({known.n} of {len(found)} seeds)" if known and len(found) > known.n else ""
            cells.append(share.show(known) + part if known else "; ".join(why))
        rows.append((label, name, *cells))
    notes = (
        "raw: 1 - s / t, with s and t the mean exposure of student and teacher. excess: the same "
        "with 1.44 bits taken off both, since that is what no memorisation at all gives; there "
        "100 % means that nothing beyond it was measured.",
    )
    titles = ("", "student", "raw in %", "excess in %")
    return Table("Reduction of exposure", titles, rows, notes)


def show(results: Sequence[Result], console: Console) -> None:
    """Print the headline table, without intervals and then fewer columns where it is narrow."""
    from rich import box
    from rich.measure import Measurement
    from rich.table import Table as Drawn
    from rich.text import Text

    made, unbounded = headline(results), console.options.update(max_width=10_000)
    for gone in (None, (), (6,), (5, 6), (3, 5, 6), (3, 4, 5, 6)):
        drawn = Drawn(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        kept = [i for i in range(len(made.titles)) if i not in (gone or ())]
        rows = made.rows if gone is None else headline(results, intervals=False).rows
        for i in kept:
            widest = max(len(part) for part in (*made.titles[i].split(), *(r[i] for r in rows)))
            drawn.add_column(made.titles[i], justify="right" if i else "left", width=widest)
        for row in rows:
            drawn.add_row(*(Text(row[i]) for i in kept))
        if Measurement.get(console, unbounded, drawn).minimum <= console.width:
            break
    console.print(drawn)
    for note in made.notes:
        console.print(Text(note, style="dim"))


def markdown(results: Sequence[Result], name: str = "audit") -> str:
    """Return all tables as Markdown."""
    made = [table(results).markdown() for table in (headline, by_level, bounds, reductions)]
    return f"# {name}\n\n" + "".join(made).rstrip("\n") + "\n"


def write(results: Sequence[Result], folder: Path, name: str = "audit") -> list[Path]:
    """Write all tables as ``audit.md``; the numbers are in ``audit.json``."""
    write_text(folder / "audit.md", markdown(results, name))
    return [folder / "audit.md"]


def _quantities(line: Line, quality: str) -> dict[str, Estimate | None]:
    """Return the numbers of a row of the headline table, by column."""
    levels, attack = line.levels(), line.attack()
    top = line.over_seeds("exposure", "levels", str(levels[-1]), "inside") if levels else None
    return {
        quality: line.over_seeds("quality", quality),
        "exposure": top,
        "excess": top and excess(top),
        "auc": _share(line.over_seeds("attacks", attack, "auc")),
        "0.01": _share(line.over_seeds("attacks", attack, "tpr", "0.01")),
        "0.001": _share(line.over_seeds("attacks", attack, "tpr", "0.001")),
    }


def _share(found: Estimate | None) -> Estimate | None:
    """Return an estimate of a share whose interval ends where shares do."""
    if found is None or math.isnan(found.low):
        return found
    return replace(found, low=max(found.low, 0.0), high=min(found.high, 1.0))


def _at(found: Mapping[str, Any], path: Sequence[str]) -> Any:
    """Return what is found below these keys, or None."""
    here: Any = found
    for key in path:
        here = here.get(key) if isinstance(here, Mapping) else None
    return here


def _cell(column: Column, value: Estimate | None, line: Line, level: int | None = None) -> str:
    shown = column.show(value)
    if value is not None and column.key in ("exposure", "excess"):
        return "≥ " * (line.saturated(level or line.levels()[-1]) > 0) + shown
    return shown + "*" * (value is not None and "unresolved" in value.method)


def _certified(line: Line) -> str:
    """Return the median over seeds with its ceiling; of an even number of seeds the lower one.

    With independent seeds it exceeds the truth less often than the bound of one seed does.
    """
    chosen = sorted((float(b["epsilon"]), float(b["ceiling"])) for b in certified(line))
    if not chosen:
        return "–"
    epsilon, ceiling = chosen[(len(chosen) - 1) // 2]
    return f"{rounded_down(epsilon)} ({rounded_down(ceiling)})"


def _claimed(line: Line) -> str:
    epsilon = line.epsilon()
    if epsilon is None:
        return "not covered"
    return "none" if epsilon == math.inf else rounded_up(epsilon)


def _bound_cells(same: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    cells = [
        (rounded_down(float(b["ceiling"])), f"{100 * b['confidence']:g} %", f"{b['delta']:.2g}",
         str(b["n"]), str(b["assumes"]))
        for b in same
    ]  # fmt: skip
    differ = ("; ".join(dict.fromkeys(column)) for column in zip(*cells, strict=True))
    return "; ".join(rounded_down(float(b["epsilon"])) for b in same), *differ


def _notes(made: Sequence[Line]) -> Iterator[str]:
    if not made:
        return
    counts = sorted({len(line.runs) for line in made})
    if counts[-1] > 1:
        yield f"Means over {'–'.join(map(str, counts))} seeds with Student's t intervals."
    if counts[0] == 1:
        yield "Of one seed: intervals are over canaries, and say nothing of other seeds."
    yield EXPOSURE
    attacks = dict.fromkeys(line.attack() for line in made if line.attack())
    if attacks:
        yield f"AUC and TPR of the attack {', '.join(attacks)}, which bounds are taken by. {TPR}"
    rates = [line.over_seeds("attacks", line.attack(), "tpr", "0.001") for line in made]
    if any(e is not None and "unresolved" in e.method for e in rates):
        yield UNRESOLVED
    if any(certified(line) for line in made):
        yield BOUND
    yield from dict.fromkeys(_above(line) for line in made if _above(line))
    for line in made:
        claims = dict.fromkeys(run["theory"].get("sentence") or "" for run in line.runs)
        if line.epsilon() not in (None, math.inf):
            yield f"Claimed for {line.name}: {' '.join(filter(None, claims))}"


def _above(line: Line) -> str:
    """Return what to say where more was certified than is claimed: one of both is wrong."""
    claimed = line.epsilon()
    allowed = max((run["theory"]["delta"] or 0.0) for run in line.runs)
    for b in certified(line):
        # A bound at a smaller delta says nothing against a claim that allows more.
        if b["delta"] >= allowed and claimed is not None and float(b["epsilon"]) > claimed:
            return (
                f"{line.name}: the audit of a seed certified more than the claimed epsilon. A "
                "bound fails with one minus its confidence; beyond that, the claim is wrong."
            )
    return ""
