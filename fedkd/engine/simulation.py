"""One run, round by round: read this first to see how everything fits together.

    cohort -> broadcast -> local work -> aggregate -> judge -> write down -> checkpoint

A round that is written down is finished: a kill afterwards costs nothing, and ``resume`` goes on
from the last checkpoint to the very bits that an undisturbed run ends with.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from flwr.app import Message

from fedkd.config import Experiment
from fedkd.data import manifest
from fedkd.engine.checkpoint import Checkpoint
from fedkd.engine.client_app import STATE, ClientSide
from fedkd.engine.codec import decode, encode
from fedkd.engine.executors import make_executor
from fedkd.engine.failures import failure_folder, keep_failure
from fedkd.engine.flower_strategy import FlowerStrategy
from fedkd.engine.folder import RunFolder
from fedkd.engine.grid import FIRST_NODE_ID, LocalGrid
from fedkd.engine.ledger import Direction, Ledger
from fedkd.engine.lock import PATIENCE, locked
from fedkd.engine.planting import write_canaries
from fedkd.engine.setup import Prepared, prepare, resolve
from fedkd.engine.simulate import in_process
from fedkd.engine.sinks.fanout import Sinks
from fedkd.errors import ConfigError
from fedkd.metrics.log import Log
from fedkd.metrics.summary import summarise
from fedkd.types import Arrays, Record
from fedkd.versions import provenance


class Watcher(Protocol):
    """Is told of what happens in a run, for instance to draw a progress bar."""

    def started(self, experiment: Experiment, first_round: int) -> None:
        """Begin a run, or go on with it in ``first_round``."""

    def finished_round(self, round_: int, log: Log, failures: Sequence[str]) -> None:
        """Take note of a finished round; ``failures`` names clients that failed in it."""


class Run:
    """One run in memory: server state, clients' states, bytes and records."""

    def __init__(self, prepared: Prepared, folder: RunFolder) -> None:
        self.prepared, self.folder = prepared, folder
        self.experiment = prepared.experiment
        self.strategy = FlowerStrategy(prepared)
        engine = self.experiment.engine
        self.executor = make_executor(engine.executor, engine.workers or None, prepared)
        self.side = ClientSide(prepared, keep_failure(folder.path), self.executor.fitter)
        self.ledger, self.log = Ledger(), Log(prepared.federation.clients)
        self.grid = LocalGrid(
            self.side.app(),
            prepared.federation.clients,
            executor=self.executor,
            ledger=self.ledger,
            costs=self._cost,
            copies=False,
        )
        self.checkpoint = Checkpoint(folder.path / "checkpoint", self.experiment.digest())
        self.sinks = Sinks(self.experiment, folder)
        self.state: Arrays = {}
        self.stopped = ""
        self._changed: set[int] = set()

    def begin(self) -> int:
        """Start afresh; returns 0, the round that is finished."""
        self.folder.begin(self.experiment.toml())
        federation = self.prepared.federation
        manifest.save(federation.partition, federation.dataset, self.folder.path / "partition.json")
        if self.prepared.canaries is not None:
            write_canaries(self.prepared.canaries, self.folder.path)
        self.state = self.strategy.initial()
        self.sinks.start(0)
        self._write(self._sizes())
        self.folder.event(f"started {self.experiment.name}: digest {self.experiment.digest()}")
        return 0

    def restore(self) -> int:
        """Go on from the last checkpoint; returns the last finished round.

        Raises:
            CheckpointError: the checkpoint is damaged or of another experiment.
        """
        loaded = self.checkpoint.load()
        if loaded is None:
            return self.begin()
        self.state = loaded.server
        for k, arrays in loaded.clients.items():
            self.grid.contexts[FIRST_NODE_ID + k].state[STATE] = encode(arrays, own=True)
        # Asked again here: the ledger has these messages already.
        self.strategy.nodes(self.grid)
        self.ledger.load_state_dict(loaded.extra["ledger"])
        self.strategy.guard.load_state_dict(loaded.extra["privacy"])
        self.log.add(self.folder.rewind(int(loaded.extra["metrics_bytes"])))
        self.folder.event(f"resumed after round {loaded.round}")
        self.sinks.start(loaded.round + 1)
        return loaded.round

    def play(self, round_: int) -> list[str]:
        """Play one round and return the failures in it."""
        start = time.perf_counter()
        replies = self._exchange(self.strategy.train_messages(round_, self.state, self.grid))
        trained = self.strategy.fold_train(round_, self.state, replies)
        self.state = trained.state
        trained_at = time.perf_counter()
        replies = self._exchange(self.strategy.evaluate_messages(round_, self.state, self.grid))
        judged = self.strategy.fold_evaluate(round_, replies)
        seconds = {"train": trained_at - start}
        if any(self.strategy.judges(round_)):
            seconds["evaluate"] = time.perf_counter() - trained_at
        failures = [self._replayable(round_, f) for f in trained.failures + judged.failures]
        for failure in failures:
            self.folder.event(f"round {round_}: {failure}")
        for failed in self.grid.failures:
            if failed.traceback:
                self.folder.event(f"traceback of client {failed.partition_id}:\n{failed.traceback}")
        self.grid.failures.clear()
        self._write(trained.records + judged.records + self._costs(round_, seconds))
        if round_ % self.experiment.engine.checkpoint_every == 0 or (
            round_ == self.experiment.rounds
        ):
            self._save(round_)
        return failures

    def exhausted(self, round_: int) -> bool:
        """Return whether the privacy budget ends the run before this round.

        What the last round left is then judged as a last round is.
        """
        strategy = self.strategy
        reason = strategy.guard.exhausted(round_, strategy.cohort(round_), self.state)
        if reason is None:
            return False
        self.stopped = f"stopped after round {round_ - 1}: {reason}"
        self.folder.event(self.stopped)
        known, everywhere = strategy.judges(round_ - 1)
        if not everywhere:
            messages = strategy.evaluate_messages(round_ - 1, self.state, self.grid, last=True)
            judged = strategy.fold_evaluate(round_ - 1, self._exchange(messages)).records
            self._write([r for r in judged if not known or r.split in ("global", "absent")])
        return True

    def finish(self) -> dict[str, Any]:
        """Write and return the summary."""
        summary = {
            "name": self.experiment.name,
            "strategy": self.experiment.strategy.name,
            "seed": self.experiment.seed,
            "rounds": self.experiment.rounds,
            "digest": self.experiment.digest(),
            "headline": self.headline(),
            **summarise(self.log, self.experiment.evaluate.last_k),
            "privacy": self.strategy.guard.sentence(),
            "provenance": provenance(),
        }
        if self.stopped:
            summary["stopped"] = self.stopped
        self._write_privacy()
        self.folder.write_summary(summary)
        self.sinks.finish(summary)
        self.folder.event("finished")
        return summary

    def close(self) -> None:
        """End the executor's workers."""
        self.executor.close()

    def headline(self) -> dict[str, str]:
        """Return the read-out and predictor that this strategy is compared by."""
        return {"readout": "composite", "predict": self.experiment.predict}

    def client_state(self, k: int) -> Arrays:
        """Return a client's memory."""
        context = self.grid.contexts[FIRST_NODE_ID + k]
        return decode(context.state[STATE]) if STATE in context.state else {}

    def _exchange(self, messages: Iterable[Message]) -> Iterable[Message]:
        """Run messages as they are made; each reply is handed on and not kept."""
        return self.grid.stream(self._noted(messages))

    def _noted(self, messages: Iterable[Message]) -> Iterator[Message]:
        for message in messages:
            if message.metadata.message_type == "train":
                self._changed.add(message.metadata.dst_node_id - FIRST_NODE_ID)
            yield message

    def _replayable(self, round_: int, failure: str) -> str:
        """Add the command that replays a failure, where its input was kept."""
        client = failure.split(":", 1)[0].removeprefix("client ")
        kept = failure_folder(self.folder.path, round_, client)
        return f"{failure}; replay it with: fedkd replay {kept}" if kept.is_dir() else failure

    def _cost(self, message: Message) -> float:
        k = message.metadata.dst_node_id - FIRST_NODE_ID
        return float(self.prepared.setting.clients[k].examples)

    def _sizes(self) -> list[Record]:
        records, federation = [], self.prepared.federation
        values: dict[int, float] = {}
        for k in range(federation.clients):
            for split, size in federation.sizes(k).items():
                # One number for all that are equal: these records stay in memory.
                value = values.setdefault(size, float(size))
                records.append(
                    Record(round=0, client=k, split=split, metric="examples", value=value)
                )
        return records

    def _costs(self, round_: int, seconds: dict[str, float]) -> list[Record]:
        records = [
            Record(round=round_, split=phase, metric="seconds", value=value)
            for phase, value in seconds.items()
        ]
        directions: tuple[Direction, Direction] = ("down", "up")
        for phase in ("train", "evaluate"):
            for direction in directions:
                total = self.ledger.totals(round=round_, phase=phase, direction=direction)
                if not total.messages:
                    continue
                values = {f"bytes_{direction}": total.tensor, f"wire_bytes_{direction}": total.wire}
                for kind, size in sorted(total.tensors.items()):
                    values[f"bytes_{direction}/{kind}"] = size
                records += [
                    Record(round=round_, split=phase, metric=name, value=float(value))
                    for name, value in values.items()
                ]
        return records

    def _write(self, records: list[Record]) -> None:
        self.folder.append(records)
        self.log.add(records)
        self.sinks.write(records)

    def _write_privacy(self) -> None:
        guard = self.strategy.guard
        if guard.plan.active:
            self.folder.write_privacy(guard.ledger.report())

    def _save(self, round_: int) -> None:
        states = {k: self.client_state(k) for k in sorted(self._changed)}
        guard = self.strategy.guard
        self._write_privacy()
        extra = {
            "ledger": self.ledger.state_dict(),
            "privacy": guard.state_dict(),
            "metrics_bytes": self.folder.size(),
        }
        self.checkpoint.save(round_, self.state, {k: s for k, s in states.items() if s}, extra)
        self._changed.clear()


def run(
    experiment: Experiment,
    path: Path,
    *,
    resume: bool = False,
    watcher: Watcher | None = None,
    prepared: Prepared | None = None,
    patience: float = PATIENCE,
) -> dict[str, Any]:
    """Run one experiment (its ``compare`` and ``seeds`` aside) in a folder; return its summary.

    A finished run is not run again under ``resume``: its summary is returned. Another process that
    is at work in the folder is waited for, ``patience`` seconds at most.

    Raises:
        ConfigError: the folder holds a run and ``resume`` was not asked for, or holds another
            experiment; or the experiment is impossible.
        RunError: the run could not go on; everything up to the last checkpoint is on disk.
    """
    experiment = resolve(experiment)
    folder = RunFolder(path)
    if folder.exists() and not resume:
        raise ConfigError(
            f"{path} holds a run already; add --resume to go on, or give another --out"
        )
    if folder.exists() and folder.experiment().digest() != experiment.digest():
        raise ConfigError(
            f"{path} holds a run of another experiment; resume with the configuration in "
            f"{path / 'config.toml'}, or give another --out"
        )
    finished = folder.summary() if resume else None
    if finished is not None:
        return finished
    parts = prepared or prepare(experiment)
    with locked(path, patience):
        # Another process may have done some of it, or all, while this one waited.
        finished = folder.summary() if resume else None
        return finished or _played(Run(parts, folder), resume, watcher)


def _played(current: Run, resume: bool, watcher: Watcher | None) -> dict[str, Any]:
    """Play the rounds that are left and return the summary."""
    experiment = current.experiment
    try:
        with in_process():
            done = current.restore() if resume else current.begin()
            if watcher is not None:
                watcher.started(experiment, done + 1)
            for round_ in range(done + 1, experiment.rounds + 1):
                if current.exhausted(round_):
                    break
                failures = current.play(round_)
                if watcher is not None:
                    watcher.finished_round(round_, current.log, failures)
        return current.finish()
    finally:
        current.close()
        current.sinks.finish(None)
