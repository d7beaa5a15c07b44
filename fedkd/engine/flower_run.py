"""A run of somebody's Flower app: what crossed between its two sides is written down as it happens.

``app.json`` what was run, ``exchanges.jsonl`` one line for each push of messages, with bytes and
the means of what clients said, ``failures.jsonl`` messages without an answer, ``ledger.json`` bytes
by round, ``summary.json`` how it ended. What the app itself prints and writes is its own.
"""

from __future__ import annotations

import json
import math
import os
import platform
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flwr.app import Message, MetricRecord

from fedkd.engine.contexts import FIRST_NODE_ID
from fedkd.engine.flower_project import Config, FlowerProject
from fedkd.engine.folder import write_text, writing
from fedkd.engine.grid import kind, round_of
from fedkd.engine.ledger import Ledger
from fedkd.engine.simulate import SimulationResult, simulate
from fedkd.errors import FedkdError, RunError

EXAMPLES = "num-examples"
APP, EXCHANGES, FAILURES = "app.json", "exchanges.jsonl", "failures.jsonl"


@dataclass(frozen=True)
class Exchange:
    """One push of messages of one type and round, and what came of it.

    ``down`` and ``up`` are wire bytes; ``means`` are those of what clients report, weighted by
    their ``num-examples`` where they say so; ``examples`` is the sum of these.
    """

    round: int
    phase: str
    sent: int
    answered: int
    seconds: float
    down: int
    up: int
    examples: int | None = None
    means: dict[str, float | None] = field(default_factory=dict)


Say = Callable[[Exchange], None]


class Recorder:
    """Writes every exchange of a run into its folder, and says it."""

    def __init__(self, folder: Path, ledger: Ledger, say: Say) -> None:
        self.folder, self.ledger, self.say = folder, ledger, say
        self.exchanges = 0
        self._sums = {"down": 0, "up": 0}

    def __call__(
        self, messages: Sequence[Message], replies: Sequence[Message], seconds: float
    ) -> None:
        """Note a push; one of several types or rounds is noted as several of equal duration."""
        groups: dict[tuple[int, str], list[tuple[Message, Message]]] = {}
        for message, reply in zip(messages, replies, strict=True):
            groups.setdefault((round_of(message), kind(message)), []).append((message, reply))
        for (round_, phase), pairs in groups.items():
            answers = [reply for _, reply in pairs if not reply.has_error()]
            examples, means = said(answers)
            found = Exchange(
                round=round_,
                phase=phase,
                sent=len(pairs),
                answered=len(answers),
                seconds=round(seconds * len(pairs) / len(messages), 6),
                down=self._since("down"),
                up=self._since("up"),
                examples=examples,
                means=means,
            )
            self.exchanges += 1
            append(self.folder / EXCHANGES, [asdict(found)])
            append(self.folder / FAILURES, [failed(m, r) for m, r in pairs if r.has_error()])
            self.say(found)

    def _since(self, direction: str) -> int:
        """Return the wire bytes since the last exchange."""
        before = self._sums[direction]
        now = self.ledger.totals(direction=direction).wire  # type: ignore[arg-type]
        self._sums[direction] = now
        return now - before


def failed(message: Message, reply: Message) -> dict[str, Any]:
    """Return what is kept of a message without an answer."""
    return {
        "round": round_of(message),
        "phase": kind(message),
        "partition": message.metadata.dst_node_id - FIRST_NODE_ID,
        "code": reply.error.code,
        "error": reply.error.reason,
    }


def said(answers: Sequence[Message]) -> tuple[int | None, dict[str, float | None]]:
    """Return the sum of clients' examples and the means of their other metrics, by name.

    A mean that is not finite is None.
    """
    sums: dict[str, list[float]] = {}
    examples: int | None = None
    for answer in answers:
        for name, record in answer.content.items():
            if not isinstance(record, MetricRecord):
                continue
            weight = record.get(EXAMPLES, 1)
            if not isinstance(weight, int | float) or weight <= 0:
                weight = 0
            elif EXAMPLES in record:
                examples = (examples or 0) + int(weight)
            for key, value in record.items():
                if key != EXAMPLES and isinstance(value, int | float):
                    full = key if name == "metrics" else f"{name}/{key}"
                    total = sums.setdefault(full, [0.0, 0.0])
                    total[0] += float(weight) * float(value)
                    total[1] += float(weight)
    means = {key: total / weight for key, (total, weight) in sums.items() if weight}
    return examples, {key: mean if math.isfinite(mean) else None for key, mean in means.items()}


def run_app(
    project: FlowerProject,
    folder: Path,
    *,
    nodes: int,
    config: Config,
    executor: str = "serial",
    workers: int | None = None,
    seed: int = 0,
    verbose: bool = False,
    say: Say = lambda exchange: None,
) -> SimulationResult:
    """Run an app with ``nodes`` clients in this process and leave its records in ``folder``.

    Raises:
        ConfigError: the app cannot be imported, or an argument is wrong.
        RunError: the server app failed; what was exchanged until then is in the folder.
    """
    about = described(project) | {
        "nodes": nodes,
        "run_config": config,
        "executor": executor,
        "workers": workers,
        "seed": seed,
    }
    with project.imported() as (server_app, client_app):
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / APP, json.dumps(about, indent=2) + "\n")
        ledger = Ledger()
        recorder = Recorder(folder, ledger, say)
        with _ended(folder, project, recorder) as summary:
            result = simulate(
                server_app,
                client_app,
                nodes,
                run_config=config,
                executor=executor,
                workers=workers,
                ledger=ledger,
                watch=recorder,
                seed=seed,
                verbose=verbose,
            )
            summary |= {"failures": len(result.failures), "seconds": round(result.seconds, 3)}
    return result


@contextmanager
def _ended(folder: Path, project: FlowerProject, recorder: Recorder) -> Iterator[dict[str, Any]]:
    """Write down how a run ended, whatever ended it; yield what is told of one that finished."""
    summary: dict[str, Any] = {}
    status = "failed"
    try:
        yield summary
        status = "finished"
    except FedkdError:
        raise
    except KeyboardInterrupt:
        status = "stopped"
        raise
    except (Exception, SystemExit) as error:
        raise RunError(_of_the_app(project, error)) from error
    finally:
        rows = recorder.ledger.state_dict()
        write_text(folder / "ledger.json", json.dumps(rows, indent=2) + "\n")
        told = {"status": status, "exchanges": recorder.exchanges, **summary}
        write_text(folder / "summary.json", json.dumps(told, indent=2) + "\n")


def described(project: FlowerProject) -> dict[str, Any]:
    """Return what an app is, and what it runs with."""
    return {
        "name": project.name,
        "version": project.version,
        "folder": str(project.folder),
        "apps": dict(project.apps),
        "versions": {name: version(name) for name in ("flwr", "numpy", "torch")}
        | {"python": platform.python_version()},
    }


def append(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Append rows as JSON lines, and hand them to the disk."""
    if rows:
        with writing(file.parent), file.open("a", encoding="utf-8") as out:
            out.writelines(json.dumps(row) + "\n" for row in rows)
            out.flush()
            os.fsync(out.fileno())


def _of_the_app(project: FlowerProject, error: BaseException) -> str:
    """Say what an app's own code raised, and where in it."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if Path(f.filename).resolve().is_relative_to(project.folder)]
    where = "".join(traceback.format_list(own or frames[-1:]))
    return f"the server app of {project.name} raised {error!r}\n{where.rstrip()}"
