"""What figures and tables need of a run, compact: a sweep of many runs fits into memory.

The records of a run are read once and let go; what stays are arrays by round and client.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from fedkd.metrics.log import Log
from fedkd.report.ends import Ends, ends
from fedkd.types import Record


@dataclass(frozen=True, eq=False, kw_only=True)
class Curves:
    """One run by round: R judged rounds, T played rounds, K clients; NaN where there is no value.

    ``accuracy`` and ``bits`` (R, K) are of the headline read-out on the clients' own test data;
    ``bits`` is None unless the run is of text. ``bytes_up``, ``bytes_down`` (T,) and ``seconds``
    (T,) are of training, ``seconds_judging`` (T,) of judging. ``took_part`` (T, K) says who
    trained, ``lost`` (T, K) whose upload never came. ``epsilon`` is by round, where it is finite;
    ``clock`` (T,) is the simulated duration of a round in its own unit. ``ends`` is what the run
    says beside accuracy.
    """

    clients: int
    rounds: np.ndarray
    accuracy: np.ndarray
    bits: np.ndarray | None
    played: np.ndarray
    bytes_up: np.ndarray
    bytes_down: np.ndarray
    seconds: np.ndarray
    seconds_judging: np.ndarray
    took_part: np.ndarray
    lost: np.ndarray
    clock: np.ndarray
    examples: np.ndarray
    epsilon: dict[int, float] = field(default_factory=dict)
    ends: Ends = field(default_factory=Ends)

    def by_client(self, last_k: int) -> np.ndarray:
        """Return each client's accuracy (K,), mean of the last ``last_k`` judged rounds."""
        return nanmean(self.accuracy[-last_k:], axis=0)

    def mean(self) -> np.ndarray:
        """Return the unweighted mean accuracy over clients (R,)."""
        return nanmean(self.accuracy, axis=1)

    def sent_until(self, rounds: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the bytes of training, both ways, sent up to the end of each of ``rounds``."""
        total = np.concatenate([[0.0], np.cumsum(self.bytes_up + self.bytes_down)])
        return np.asarray(total[np.searchsorted(self.played, np.asarray(rounds), side="right")])


def nanmean(values: np.ndarray, axis: int) -> np.ndarray:
    """Return the mean of what is there, NaN where nothing is; never a warning."""
    seen = ~np.isnan(values)
    count = seen.sum(axis)
    total = np.where(seen, values, 0.0).sum(axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def curves(records: Iterable[Record], clients: int, readout: str, predict: str) -> Curves:
    """Return the arrays of one run from its records; ``readout`` and ``predict`` are its headline.

    ``stale`` is ``own`` with the last value carried over rounds in which a client sat out.
    """
    log = Log(clients, list(records))
    rounds = log.rounds("accuracy", "own" if readout == "stale" else readout)
    played = sorted({r.round for r in log.records if r.metric == "seconds" and r.round > 0})
    accuracy = log.table("accuracy", "test", readout, predict)
    bits = log.table("bits_per_character", "test", readout, predict)
    held = ~np.isnan(accuracy).all(axis=1)
    part, lost = _presence(log, played)
    return Curves(
        clients=clients,
        rounds=np.array(rounds, dtype=np.int64)[held],
        accuracy=accuracy[held],
        bits=None if np.isnan(bits).all() else bits[held],
        played=np.array(played, dtype=np.int64),
        bytes_up=_series(log, "bytes_up", "train", played, 0.0),
        bytes_down=_series(log, "bytes_down", "train", played, 0.0),
        seconds=_series(log, "seconds", "train", played, np.nan),
        seconds_judging=_series(log, "seconds", "evaluate", played, np.nan),
        took_part=part,
        lost=lost,
        clock=_series(log, "clock", "simulated", played, np.nan),
        examples=log.by_client("examples", "train"),
        epsilon=log.series("epsilon", "privacy"),
        ends=ends(log, readout, predict),
    )


def _presence(log: Log, played: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return who did local work in each round, and whose upload was lost; each (T, K)."""
    row = {round_: i for i, round_ in enumerate(played)}
    part, lost = (np.zeros((len(played), log.clients), dtype=bool) for _ in range(2))
    for r in log.records:
        if r.client < 0 or r.round not in row:
            continue
        if r.split == "train" or r.readout == "own":
            part[row[r.round], r.client] = True
        if r.metric == "lost" and r.value:
            lost[row[r.round], r.client] = True
    return part | lost, lost


def _series(log: Log, metric: str, split: str, played: Sequence[int], missing: float) -> np.ndarray:
    found = log.series(metric, split)
    return np.array([found.get(t, missing) for t in played], dtype=float)
