"""All sinks of one run behind one door, so that the round knows of none of them.

A sink that fails is closed with one line in ``events.log``: values that a server did not take must
never cost a run that is going well.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fedkd.config import Experiment
from fedkd.engine.folder import RunFolder, write_text
from fedkd.engine.sinks.base import Sink, Start, final, flat, sinks, values
from fedkd.types import Record

MEMORY = "sinks.json"
SERIES = ("study.toml", "sweep.toml")
NOT_SETTINGS = ("compare", "seeds", "sweep")


class Sinks:
    """The open sinks of one run.

    Raises:
        ConfigError: a sink does not exist.
    """

    def __init__(self, experiment: Experiment, folder: RunFolder) -> None:
        self.experiment, self.folder = experiment, folder
        names = dict.fromkeys(experiment.engine.sinks)
        self._closed: dict[str, type[Sink]] = {name: sinks.get(name) for name in names}
        self._open: dict[str, Sink] = {}

    def start(self, first_round: int) -> None:
        """Open them; values from ``first_round`` on will follow."""
        if not self._closed:
            return
        kept = self._memory()
        for name, cls in self._closed.items():
            memory = dict(kept.get(name, {}))
            start = self._start(first_round, memory)
            self._open[name] = cls()
            place = self._tell(name, "start", partial(self._open[name].start, start))
            if place is not None:
                self.folder.event(f"sink {name}: values go to {place}")
            if memory:
                kept[name] = memory
        self._closed = {}
        if kept:
            write_text(self.folder.path / MEMORY, json.dumps(kept, indent=2, sort_keys=True) + "\n")

    def write(self, records: Sequence[Record]) -> None:
        """Copy the records' values to every sink that is open."""
        if not self._open:
            return
        for round_, found in values(records).items():
            for name, sink in list(self._open.items()):
                self._tell(name, f"take round {round_}", partial(sink.write, round_, found))

    def finish(self, summary: dict[str, Any] | None) -> None:
        """Close them; without a summary the run was broken off. A second call does nothing."""
        result = None if summary is None else final(summary)
        for name, sink in list(self._open.items()):
            self._tell(name, "finish", partial(sink.finish, result))
        self._open = {}

    def _tell(self, name: str, what: str, call: Callable[[], Any]) -> Any:
        """Call a sink; on an error note it and drop the sink for the rest of this run."""
        try:
            with warnings.catch_warnings():
                # Warnings of other libraries' insides; the user can do nothing about them.
                warnings.simplefilter("ignore")
                return call()
        except (Exception, SystemExit) as error:
            del self._open[name]
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            self.folder.event(
                f"warning: sink {name} could not {what} and gets no more values of this run "
                f"({reason}); metrics.jsonl has all of them"
            )
            return None

    def _start(self, first_round: int, memory: dict[str, str]) -> Start:
        config = self.experiment
        table = {k: v for k, v in config.table().items() if k not in NOT_SETTINGS}
        return Start(
            name=config.name,
            title=f"{config.strategy.name}, seed {config.seed}",
            digest=config.digest(),
            settings=flat(table),
            headline=f"composite/{config.predict}/test/accuracy",
            folder=self.folder.path.resolve(),
            home=_home(self.folder.path.resolve()),
            first_round=first_round,
            memory=memory,
        )

    def _memory(self) -> dict[str, dict[str, str]]:
        """Return what the sinks put down when the run began; nothing where that is damaged."""
        try:
            kept = json.loads((self.folder.path / MEMORY).read_text(encoding="utf-8"))
            return {str(name): dict(memory) for name, memory in kept.items()}
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError, AttributeError, OSError) as error:
            self.folder.event(f"warning: {MEMORY} is damaged, sinks start anew ({error})")
            return {}


def _home(folder: Path) -> Path:
    """Return the comparison or sweep that a run belongs to, else the run's own folder.

    So that runs which are compared share one store, and nothing is written outside of it.
    """
    for above in folder.parents[:2]:
        if any((above / name).is_file() for name in SERIES):
            return above
    return folder
