"""pfl-research as a contender: Apple's simulator, with as many processes as it is given workers.

Its best setting on a CPU is ``torch.distributed`` with one torch thread a process. It takes
differences of weights in float32 whatever the network's type, so it cannot be exact.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import socket
import uuid
from collections import deque
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from fedkd.bench.backends.base import Backend
from fedkd.bench.backends.nets import network
from fedkd.bench.registries import backends
from fedkd.bench.work import Work, load

SELDOM = 10**9
"""Central iterations between evaluations."""


@backends.register("pfl")
class Pfl(Backend):
    """pfl-research 0.6: FederatedAveraging on SimulatedBackend, evaluation off."""

    external = True
    exact = False
    workers = 2

    def available(self) -> str:
        """Return an empty string, or in a few words why it cannot run here."""
        if importlib.util.find_spec("pfl") is None:
            return "pfl is not installed: pip install 'fedkd[bench-pfl]'"
        return ""

    def start(self, work: Work, dtype: str, threads: int, workers: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            meeting = (uuid.uuid4().hex, free.getsockname()[1], workers)
        context = multiprocessing.get_context("spawn")
        self.others = []
        for rank in range(1, workers):
            ours, theirs = context.Pipe()
            given = (theirs, str(work.folder), dtype, threads, meeting, rank)
            process = context.Process(target=_follow, args=given)
            process.start()
            self.others.append((process, ours))
        self.one = _Process(work, dtype, threads, meeting, 0)

    def round(self, round_: int) -> None:
        for _, connection in self.others:
            connection.send(round_)
        self.one.round(round_)

    def weights(self) -> dict[str, np.ndarray]:
        named = self.one.model.pytorch_model.named_parameters()
        return {name: value.detach().numpy().copy() for name, value in named}

    def samples(self) -> int:
        found = self.one.trained
        for _, connection in self.others:
            connection.send("samples")
            found += connection.recv()
        return found

    def close(self) -> None:
        for process, connection in self.others:
            connection.send(None)
            process.join()


def _follow(
    connection: Connection,
    folder: str,
    dtype: str,
    threads: int,
    meeting: tuple[str, int, int],
    rank: int,
) -> None:
    """Do in another process what the first one does."""
    # pfl joins its processes only where this is the name, as torchrun's are all called.
    multiprocessing.current_process().name = "MainProcess"
    one = _Process(load(Path(folder)), dtype, threads, meeting, rank)
    while (asked := connection.recv()) is not None:
        if asked == "samples":
            connection.send(one.trained)
        else:
            one.round(asked)


class _Process:
    """One of pfl's processes: all hold the same model, each trains its part of a cohort."""

    def __init__(
        self, work: Work, dtype: str, threads: int, meeting: tuple[str, int, int], rank: int
    ) -> None:
        import torch

        run, port, self.size = meeting
        if self.size > 1:
            names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK")
            values = (run, "127.0.0.1", str(port), str(rank), str(rank))
            os.environ.update(zip(names, values, strict=True))
            os.environ.update(WORLD_SIZE=str(self.size), LOCAL_WORLD_SIZE=str(self.size))
        torch.set_num_threads(threads)
        kind = getattr(torch, dtype)
        self.work, self.played, self.trained = work, 0, 0
        self.users: deque[tuple[int, int]] = deque()
        self.data = [
            (torch.from_numpy(work.x[own]).to(kind), torch.from_numpy(work.y[own]))
            for own in work.owners
        ]
        self._build(network(work, dtype))

    def _build(self, net: Any) -> None:
        import torch
        from pfl.aggregate.simulate import SimulatedBackend
        from pfl.aggregate.weighting import WeightByDatapoints
        from pfl.algorithm.federated_averaging import FederatedAveraging
        from pfl.data.federated_dataset import FederatedDataset
        from pfl.hyperparam import NNTrainHyperParams
        from pfl.model.pytorch import PyTorchModel
        from torch.nn import functional

        def loss(x: Any, y: Any) -> Any:
            return functional.cross_entropy(net(x), y)

        vars(net).update(loss=loss, metrics=lambda x, y: {})
        self.model = PyTorchModel(net, torch.optim.SGD, torch.optim.SGD(net.parameters(), lr=1.0))
        self.backend = SimulatedBackend(
            training_data=FederatedDataset(self._examples, self.users.popleft),
            val_data=None,
            postprocessors=[WeightByDatapoints()],
        )
        self.algorithm = FederatedAveraging()
        self.options = NNTrainHyperParams(
            local_num_epochs=1,
            local_learning_rate=self.work.lr,
            local_batch_size=self.work.batch_size,
        )

    def _examples(self, user: tuple[int, int]) -> Any:
        import torch
        from pfl.data.dataset import Dataset

        round_, k = user
        x, y = self.data[k]
        order = torch.from_numpy(self.work.order(round_, k))
        self.trained += len(y)
        return Dataset(raw_data=[x[order], y[order]], user_id=f"{round_}/{k}")

    def round(self, round_: int) -> None:
        """Play one central iteration; pfl evaluates before its very first only."""
        from pfl.algorithm.base import NNAlgorithmParams

        cohort = balanced([(self.work.size(k), k) for k in self.work.cohort(round_)], self.size)
        self.users.clear()
        self.users.extend((round_, k) for k in cohort)
        self.users.extend([(round_, cohort[-1])] * (-len(cohort) % self.size))
        self.played, self.trained = self.played + 1, 0
        told = NNAlgorithmParams(
            central_num_iterations=self.played,
            evaluation_frequency=SELDOM,
            train_cohort_size=len(cohort),
            val_cohort_size=0,
        )
        self.algorithm.run(
            told, self.backend, self.model, self.options, send_metrics_to_platform=False
        )


def balanced(sized: list[tuple[int, int]], processes: int) -> list[int]:
    """Return clients of (size, client) in the order in which processes, by turns, get equal work.

    Largest first to whoever has least, of those that have room. pfl's own balance samples thousands
    of users ahead in a further process; this one is free.

    >>> balanced([(1, 0), (9, 1), (3, 2), (7, 3)], 2)
    [1, 3, 0, 2]
    """
    room = -(-len(sized) // processes)
    lists: list[list[tuple[int, int]]] = [[] for _ in range(processes)]
    for one in sorted(sized, reverse=True):
        least = min((x for x in lists if len(x) < room), key=lambda x: sum(size for size, _ in x))
        least.append(one)
    lists.sort(key=len, reverse=True)
    turns = [x[i] for i in range(room) for x in lists if i < len(x)]
    return [k for _, k in turns]
