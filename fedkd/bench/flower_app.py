"""One Flower app for all that run Flower: nothing in it knows who runs it.

As Flower's documentation writes apps: ``ArrayRecord`` of a ``state_dict`` in both directions,
``FedAvg`` of ``flwr.serverapp.strategy``, a plain loop on the client, which keeps its network and
its data between messages. Only cohorts are set, so that all contenders train the same clients.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch.nn import functional

from fedkd.bench.backends.nets import network
from fedkd.bench.work import Work, load

ENDLESS = 10**6
ROUND = "bench-round"
Wait = Callable[[ArrayRecord, int], int]


class Ended(Exception):  # noqa: N818 no error: the way out of Flower's loop
    """The bench has seen enough rounds."""


@lru_cache(maxsize=1)
def _loaded(folder: str, dtype: str) -> tuple[Work, torch.nn.Module, dict[int, Any]]:
    """Return work, network, data by client: once in each process that runs clients."""
    work = load(Path(folder))
    return work, network(work, dtype), {}


def client_app(folder: Path, dtype: str, threads: int) -> ClientApp:
    """Return the client's side."""
    app, where = ClientApp(), str(folder)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        work, net, cache = _loaded(where, dtype)
        k = int(context.node_config["partition-id"])
        if k not in cache:
            own = work.owners[k]
            x = torch.from_numpy(work.x[own]).to(getattr(torch, dtype))
            cache[k] = x, torch.from_numpy(work.y[own])
        x, y = cache[k]
        net.load_state_dict(message.content["arrays"].to_torch_state_dict())
        order = torch.from_numpy(work.order(int(message.content["config"][ROUND]), k))
        _train(net, x[order], y[order], work)
        metrics = MetricRecord({"num-examples": len(y)})
        content = RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics})
        return Message(content, reply_to=message)

    @app.query()
    def which(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"client": int(context.node_config["partition-id"])})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def _train(net: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, work: Work) -> None:
    optimizer, size = torch.optim.SGD(net.parameters(), lr=work.lr), work.batch_size
    for i in range(0, len(y), size):
        optimizer.zero_grad()
        functional.cross_entropy(net(x[i : i + size]), y[i : i + size]).backward()
        optimizer.step()


class Fixed(FedAvg):
    """FedAvg over the cohorts of the work.

    ``wait(weights, examples)`` is called before each round: it returns the number of the round to
    play, and is told what the one before came to.
    """

    def __init__(self, work: Work, wait: Wait) -> None:
        super().__init__(fraction_evaluate=0.0)
        self.work, self.wait, self.trained = work, wait, 0
        self.nodes: dict[int, int] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return this round's messages."""
        if not self.nodes:
            asks = [Message(RecordDict(), node, "query") for node in grid.get_node_ids()]
            for reply in grid.send_and_receive(asks):
                client = int(reply.content["metrics"]["client"])
                self.nodes[client] = reply.metadata.src_node_id
        config[ROUND] = self.wait(arrays, self.trained)
        record = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: config})
        chosen = [self.nodes[k] for k in self.work.cohort(config[ROUND])]
        return self._construct_messages(record, chosen, "train")

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average as FedAvg does.

        Raises:
            RuntimeError: a client failed.
        """
        received = list(replies)
        for reply in received:
            if reply.has_error():
                raise RuntimeError(f"a client of Flower failed: {reply.error.reason}")
        self.trained = sum(int(r.content["metrics"]["num-examples"]) for r in received)
        return super().aggregate_train(server_round, received)

    def summary(self) -> None:
        """Say nothing."""


def server_app(work: Work, dtype: str, wait: Wait) -> ServerApp:
    """Return the server's side, which plays rounds until ``wait`` raises :class:`Ended`."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        while len(list(grid.get_node_ids())) < work.clients:
            time.sleep(0.05)
        kind = np.dtype(dtype)
        first = {k: torch.from_numpy(v.astype(kind)) for k, v in work.initial.items()}
        try:
            Fixed(work, wait).start(grid, ArrayRecord(first), num_rounds=ENDLESS)
        except Ended:
            return

    return app
