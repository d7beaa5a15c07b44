"""``fedkd audit``: what networks and releases remember of what was planted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedkd.audit.run import audit_run
from fedkd.audit.study import audit_study
from fedkd.axes import named
from fedkd.cli import INTERRUPTED, complain
from fedkd.cli.places import RUNS, read
from fedkd.cli.progress import Tracker
from fedkd.cli.run import failures_told_once, view
from fedkd.cli.screen import screen
from fedkd.config import Experiment, experiment, override, parse
from fedkd.errors import ConfigError, FedkdError
from fedkd.privacy.auditing.options import Audit
from fedkd.report.runs import RUN, STUDY, stored
from fedkd.sweep.plan import INDEX, read_index


class AuditTracker(Tracker):
    """Follows an audit: its runs, and what is done with them."""

    def doing(self, what: str) -> None:
        """Show the next step."""
        self.view.note(what)


def audit(arguments: Sequence[str], out: Path | None, *, quiet: bool, workspace: Path) -> int:
    """Audit an experiment file, or a folder of finished runs; return the exit code.

    Raises:
        ConfigError: there is nothing to audit, or it cannot be done as asked.
    """
    folders = [Path(a) for a in arguments if Path(a).is_dir()]
    tracker = AuditTracker(view(quiet))
    try:
        try:
            with failures_told_once():
                if folders:
                    overrides = [a for a in arguments if Path(a) not in folders]
                    place, results, failed = _folders(folders, overrides, out, tracker)
                else:
                    made = read(arguments, workspace)
                    place = out or workspace / RUNS / f"{made.name}-audit"
                    if not quiet:
                        tracker.view.note(f"{made.name}: results go to {place}")
                    study = audit_study(made, place, watcher=tracker, workspace=workspace)
                    results, failed = study.results, study.failed
        finally:
            tracker.view.end()
    except KeyboardInterrupt:
        complain("stopped; nothing finished is lost. Go on with the same command")
        return INTERRUPTED
    return _finish(place, results, failed)


def _finish(place: Path, results: list[dict[str, Any]], failed: list[dict[str, Any]]) -> int:
    """Print tables, write them and the figures; return 1 if something failed."""
    from fedkd.report import audit_figures, audit_one_shot, audit_tables

    console = screen()
    if results:
        if any(result["subjects"] for result in results):
            audit_tables.show(results, console)
        audit_one_shot.show(results, console)
        audit_tables.write(results, place)
        audit_figures.draw(results, place)
    for what in failed:
        complain(f"audit of {what['label']}, seed {what['seed']} failed: {what['error']}")
    console.print(f"Results: {place}", soft_wrap=True)
    return 1 if failed or not results else 0


def _folders(
    folders: Sequence[Path], overrides: Sequence[str], out: Path | None, tracker: AuditTracker
) -> tuple[Path, list[dict[str, Any]], list[dict[str, Any]]]:
    """Audit finished runs: a run folder, or all runs of a comparison's folder."""
    if len(folders) > 1:
        raise ConfigError(f"{folders[0]} and {folders[1]}: give one folder")
    (folder,) = folders
    runs = _runs(folder)
    known = {made.digest(): run for run, (_, made) in runs.items()}
    results, failed = [], []
    for run, (label, made) in runs.items():
        asked = _overridden(made, overrides)
        tracker.doing(f"audit of {run}")
        try:
            results.append(audit_run(run, asked, label=label, known=known, watcher=tracker))
        except FedkdError as error:
            # What is asked is wrong for all runs; what one run has is its own matter.
            if run == folder:
                raise
            failed.append({"label": label, "seed": made.seed, "error": str(error)})
    return out or folder, results, failed


def _runs(folder: Path) -> dict[Path, tuple[str, Experiment]]:
    """Return the runs in a folder, with their labels and experiments."""
    if (folder / RUN).is_file():
        made = stored(folder)
        return {folder: (made.strategy.name, made)}
    if (folder / INDEX).is_file():
        runs = {folder / run["folder"]: _at(run) for run in read_index(folder)["runs"]}
        begun = {run: at for run, at in runs.items() if (run / RUN).is_file()}
        return {run: (at, stored(run)) for run, at in begun.items()}
    found = sorted(folder.glob(f"*/seed-*/{RUN}")) if (folder / STUDY).is_file() else []
    if not found:
        raise ConfigError(
            f"{folder} holds no run to audit; name the folder of a run, of a comparison or of a "
            "sweep, or an experiment file"
        )
    return {f.parent: (f.parent.parent.name, stored(f.parent)) for f in found}


def _at(run: dict[str, Any]) -> str:
    """Return the label of a run of a sweep, with its point."""
    at = (f"{key.rsplit('.', 1)[-1]}={named(value)}" for key, value in run["point"].items())
    return ", ".join([str(run["label"]), *at])


def _overridden(made: Experiment, overrides: Sequence[str]) -> Audit:
    """Return the audit options of a run, changed by ``audit.key=value``; nothing else can be."""
    table = made.table()
    for text in overrides:
        key, sign, value = text.partition("=")
        if not sign or not key.startswith("audit."):
            raise ConfigError(
                f"{text!r}: a finished run can only be audited in another way: give "
                "audit.key=value, as in audit.reference_models=2"
            )
        override(table, key, parse(value))
    return experiment(table).audit
