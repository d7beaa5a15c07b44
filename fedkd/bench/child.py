"""The process that hosts one contender: it takes requests as JSON lines on stdin and answers them.

Time is taken in here, around rounds alone; start and end of the process are seen from outside.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedkd.bench.backends.base import Backend
from fedkd.bench.operations.base import Operations
from fedkd.bench.registries import backends, operations
from fedkd.bench.work import Plan, Work, load
from fedkd.errors import ConfigError, FedkdError

Answer = dict[str, Any]


class Host:
    """Answers requests with its one backend, or with the operations of one kind."""

    def __init__(self) -> None:
        self.backend: Backend | None = None
        self.work: Work | None = None
        self.operations: Operations | None = None

    def answer(self, request: dict[str, Any]) -> Answer:
        """Do what is asked for: ``{"do": NAME, ...arguments}``."""
        arguments = {k: v for k, v in request.items() if k != "do"}
        requests: dict[str, Callable[..., Answer]] = {
            "make": self.make,
            "start": self.start,
            "hash": self.hash,
            "rounds": self.rounds,
            "samples": self.samples,
            "weights": self.weights,
            "operations": self.prepare,
            "time": self.time,
            "stop": self.close,
            "close": self.close,
        }
        return requests[request["do"]](**arguments)

    def make(self, plan: dict[str, Any], folder: str) -> Answer:
        """Make a work and save it."""
        from fedkd.bench.making import make

        made = make(Plan(**plan), Path(folder))
        made.save(Path(folder))
        return {"facts": made.facts()}

    def start(self, folder: str, backend: str, dtype: str, threads: int, workers: int) -> Answer:
        """Load the work and get the backend ready, or say why it cannot run here."""
        made = backends.get(backend)()
        why = made.available()
        if why:
            return {"skipped": why}
        self.work = load(Path(folder))
        made.start(self.work, dtype, threads, workers)
        self.backend = made
        return {}

    def hash(self) -> Answer:
        """Return the hash of the work as the backend has it."""
        assert self.backend is not None and self.work is not None
        return {"hash": self.backend.hash(self.work)}

    def rounds(self, first: int, count: int, least: float = 0.0) -> Answer:
        """Play rounds, again and again for ``least`` seconds or more; return how long it took."""
        assert self.backend is not None
        play = self.backend.round
        repeats, start = 0, time.perf_counter()
        seconds = 0.0
        while not repeats or seconds < least:
            for round_ in range(first, first + count):
                play(round_)
            repeats += 1
            seconds = time.perf_counter() - start
        return {"seconds": seconds, "repeats": repeats}

    def samples(self) -> Answer:
        """Return how many examples the last round trained on."""
        assert self.backend is not None
        return {"samples": self.backend.samples()}

    def weights(self, file: str) -> Answer:
        """Write the global model into a file."""
        import numpy as np
        from safetensors.numpy import save_file

        assert self.backend is not None
        arrays = {name: np.ascontiguousarray(w) for name, w in self.backend.weights().items()}
        save_file(arrays, file)
        return {}

    def prepare(self, name: str, options: dict[str, Any]) -> Answer:
        """Get operations ready; return their names, what was measured so far, and what is wrong."""
        self.operations = operations.get(name)()
        self.operations.start(**options)
        return {"names": list(self.operations.steps()), "facts": self.operations.facts()}

    def time(self, name: str, least: float) -> Answer:
        """Do one operation, again and again until ``least`` seconds are over."""
        assert self.operations is not None
        step = self.operations.steps()[name]
        repeats, start = 0, time.perf_counter()
        seconds = 0.0
        while not repeats or seconds < least:
            step()
            repeats += 1
            seconds = time.perf_counter() - start
        return {"seconds": seconds, "repeats": repeats}

    def close(self) -> Answer:
        """End what was started."""
        for started in (self.backend, self.operations):
            if started is not None:
                started.close()
        self.backend = self.operations = None
        return {}


def main() -> None:
    """Answer until stdin ends; whatever else is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    host = Host()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = host.answer(request)
        except FedkdError as error:
            answer = {"error": str(error), "bad_input": isinstance(error, ConfigError)}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        if request["do"] == "close":
            return
    host.close()


if __name__ == "__main__":
    main()
