"""A finished run, read back from its folder without changing anything in it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fedkd.clients.client import Client, Predictor
from fedkd.data import manifest
from fedkd.data.federated import Split, as_split
from fedkd.engine.checkpoint import Checkpoint
from fedkd.engine.client_app import ClientSide
from fedkd.engine.folder import RunFolder
from fedkd.engine.memory import require
from fedkd.engine.setup import Prepared, prepare
from fedkd.errors import ConfigError, DataError
from fedkd.models.base import BlockNet
from fedkd.privacy.canaries.draw import CanarySet, enumerate_space
from fedkd.strategies.reinforcement import Packing, unpacked
from fedkd.types import Arrays, select


@dataclass(frozen=True, eq=False)
class Finished:
    """What a run left: its parts, the server's state, the clients' memories."""

    folder: Path
    prepared: Prepared
    round: int
    state: Arrays
    clients: dict[int, Arrays]
    extra: dict[str, Any]

    @classmethod
    def load(cls, path: Path) -> Finished:
        """Read a run folder.

        Raises:
            ConfigError: there is no run, it is not finished, or no canary was planted in it.
        """
        folder = RunFolder(path)
        if not folder.exists():
            raise ConfigError(f"{path} holds no run; name a folder that fedkd run has written to")
        if folder.summary() is None:
            raise ConfigError(
                f"the run in {path} is not finished; go on with it: fedkd run "
                f"{path / 'config.toml'} --out {path} --resume"
            )
        experiment = folder.experiment()
        if experiment.canaries.kind == "none" and not experiment.canaries.random_clients:
            raise ConfigError(
                f"no canary was planted in the run in {path}, so there is nothing to audit; run it "
                "again with canaries.kind = 'text', 'random-image' or 'mislabelled', or with "
                "canaries.random_clients"
            )
        loaded = Checkpoint(path / "checkpoint", experiment.digest()).load()
        if loaded is None:
            raise ConfigError(f"the run in {path} has no checkpoint, so its networks are gone")
        prepared = prepare(experiment)
        require(loaded.extra.get("runtime"), loaded.clients)
        return cls(path, prepared, loaded.round, loaded.server, loaded.clients, loaded.extra)

    @property
    def canaries(self) -> CanarySet:
        """The canaries of this run.

        Raises:
            DataError: those that were planted are not those that the configuration gives now.
        """
        found = self.prepared.canaries
        if found is None:
            raise ConfigError("this run has canary clients only, and no canaries in its data")
        return found

    def check(self) -> None:
        """Refuse a run whose data or canaries cannot be made again.

        Students are taught on those data, and references are to have had the same.

        Raises:
            DataError: names the file that differs.
        """
        manifest.load(self.folder / "partition.json", self.prepared.federation.dataset)
        file = self.folder / "canaries.json"
        if self.prepared.canaries is None:
            return
        try:
            written = json.loads(file.read_text(encoding="utf-8"))["digest"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{file} cannot be read ({error!r}); run the experiment again"
            ) from None
        if written != self.canaries.digest():
            raise DataError(
                f"{file} lists other canaries than its configuration gives now: the data or the "
                "tokenizer have changed since; run the experiment again in another folder"
            )

    @cached_property
    def examples(self) -> Split:
        """The canaries as examples, (m, ...), in order."""
        found = self.canaries
        return as_split(found.x, found.y, self.prepared.setting.task)

    @cached_property
    def references(self) -> Split:
        """The references as examples, (N, ...), in order."""
        found = self.canaries
        return as_split(found.reference_x, found.reference_y, self.prepared.setting.task)

    @cached_property
    def space(self) -> Split:
        """All secrets that there could be, as examples.

        Raises:
            ConfigError: they are too many, or images.
        """
        canaries = self.prepared.experiment.canaries
        rows = enumerate_space(canaries, self.prepared.federation.dataset)
        if rows is None:
            raise ConfigError(
                f"audit.estimator = 'exact' ranks a canary among all {self.canaries.space:g} "
                "possible ones, which are too many (or images); use 'auto', or a pattern with "
                "fewer gaps"
            )
        zeros = np.zeros(len(rows), dtype=np.int64)
        return as_split(rows, zeros, self.prepared.setting.task)

    @property
    def predict(self) -> str:
        """The name of the predictor that this strategy is compared by."""
        return self.prepared.experiment.predict

    def teacher(self) -> BlockNet | None:
        """Return the global network, in evaluation mode; None where the strategy has none."""
        weights = self.prepared.strategy.server_model(self.state)
        book = self.prepared.setting.book
        # Some methods share a part of the network only: with an initial head it is nobody's.
        if weights is None or set(weights) < set(book.initial(book.labels[0])):
            return None
        network = book.make(book.labels[0], weights, device=self.prepared.device)
        network.eval()
        return network

    def personal(self, k: int) -> Predictor:
        """Return what client ``k`` predicts with after the last round."""
        prepared, setting = self.prepared, self.prepared.setting
        client = Client(
            info=setting.clients[k],
            data=ClientSide(prepared).data(k),
            state=dict(self.clients.get(k, {})),
            book=setting.book,
            training=prepared.experiment.clients.training,
            seed=prepared.experiment.seed,
            round=self.round,
            rounds=prepared.experiment.rounds,
            device=prepared.device,
            public=setting.public,
        )
        received = prepared.strategy.judging(self.state, setting.clients[k], self.round, setting)
        return prepared.strategy.predictor(client, received)

    def released(self) -> np.ndarray | None:
        """Return what the server releases beside weights as one vector (D,), or None.

        Soft labels, consensus, prototypes: all that client 0 would receive next, or where no more
        is sent received last; networks and their factors are left out. What is sent by class has
        its place by class, 0 where one is missing.
        """
        setting = self.prepared.setting
        for round_ in (self.round + 1, self.round):
            client = setting.clients[0]
            sent = self.prepared.strategy.broadcast(self.state, client, round_, setting)
            parts = self._knowledge(sent)
            if parts:
                return np.concatenate(parts)
        return None

    def _knowledge(self, sent: Arrays) -> list[np.ndarray]:
        setting = self.prepared.setting
        known = {name for label in setting.book.labels for name in setting.book.initial(label)}
        parts = []
        sent = self._by_class(sent)
        for key in sorted(sent):
            value = sent[key]
            if value.dtype.kind != "f" or not known.isdisjoint(key.split("/")):
                continue
            labels = sent.get(f"{key.rpartition('/')[0]}/labels")
            if labels is not None and len(labels) == len(value):
                # Runs of other seeds send other classes; only like may be compared with like.
                whole = np.zeros((setting.task.classes, *value.shape[1:]))
                whole[labels] = value
                value = whole
            parts.append(value.astype(np.float64).ravel())
        return parts

    def _by_class(self, sent: Arrays) -> Arrays:
        """Return what is sent, lists of the likeliest classes as soft labels of all classes."""
        packed = {k.removesuffix("/values") for k in sent if k.endswith("/values")}
        packed = {place for place in packed if f"{place}/ids" in sent}
        if not packed:
            return sent
        classes = self.prepared.setting.task.classes
        rest = getattr(self.prepared.strategy, "packing", Packing())
        found = {k: v for k, v in sent.items() if k.rpartition("/")[0] not in packed}
        return found | {p: rest.dense(unpacked(select(sent, p), classes)) for p in packed}
