"""Rounds on demand where Flower owns the loop: its server runs in a thread and waits for us."""

from __future__ import annotations

import queue
import threading
from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np

from fedkd.bench.backends.base import Backend
from fedkd.bench.work import Work

if TYPE_CHECKING:
    from flwr.app import ArrayRecord

PATIENCE = 300
"""Seconds without a word from Flower after which it counts as stuck."""
_END = 0


class FlowerBackend(Backend):
    """Plays the one Flower app; who runs it is the subclass's."""

    def start(self, work: Work, dtype: str, threads: int, workers: int) -> None:
        import logging

        from fedkd.bench.flower_app import client_app, server_app

        logging.getLogger("flwr").setLevel(logging.ERROR)
        self.work, self.asked = work, queue.Queue[int]()
        self.stands = queue.Queue[Any]()
        server = server_app(work, dtype, self._wait)
        client = client_app(work.folder, dtype, threads)

        def play() -> None:
            try:
                self.simulate(server, client, threads, workers)
                self.stands.put(RuntimeError("Flower's server app ended by itself"))
            except BaseException as error:
                self.stands.put(error)

        self.thread = threading.Thread(target=play, daemon=True)
        self.thread.start()
        self._standing()

    @abstractmethod
    def simulate(self, server: Any, client: Any, threads: int, workers: int) -> None:
        """Run the app to its end."""

    def round(self, round_: int) -> None:
        self.asked.put(round_)
        self._standing()

    def weights(self) -> dict[str, np.ndarray]:
        return {k: v.numpy() for k, v in self.arrays.to_torch_state_dict().items()}

    def samples(self) -> int:
        return self.trained

    def close(self) -> None:
        self.asked.put(_END)
        self.thread.join(PATIENCE)

    def _wait(self, arrays: ArrayRecord, trained: int) -> int:
        """Say in Flower's thread where it stands, and wait for what to do."""
        from fedkd.bench.flower_app import Ended

        self.stands.put((arrays, trained))
        asked = self.asked.get()
        if asked == _END:
            raise Ended
        return asked

    def _standing(self) -> None:
        found = self.stands.get(timeout=PATIENCE)
        if isinstance(found, BaseException):
            raise found
        self.arrays, self.trained = found
