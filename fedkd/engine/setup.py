"""From an experiment to its parts, with every problem found before the first round."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fedkd.config import Component, Experiment
from fedkd.data import manifest
from fedkd.data.federated import Federation
from fedkd.data.partition import Partition, divide
from fedkd.data.registries import partitions, sources
from fedkd.errors import ConfigError
from fedkd.models.book import ModelBook
from fedkd.models.registries import models
from fedkd.options import build
from fedkd.presets import preset
from fedkd.registry import Registry
from fedkd.rng import stream
from fedkd.strategies.base import Setting, Strategy, strategies
from fedkd.types import ClientInfo


@dataclass(frozen=True)
class Prepared:
    """The parts of one run, built from its experiment."""

    experiment: Experiment
    federation: Federation
    setting: Setting
    strategy: Strategy
    device: torch.device

    @property
    def cohort_of(self) -> tuple[int, ...]:
        """The clients that can take part: all, or the pseudo-client of a pooled strategy."""
        return (0,) if self.strategy.pooled else tuple(c.id for c in self.setting.clients)


def load_workspace(workspace: Path | None) -> None:
    """Import the user's drop-in strategies; this executes the files in ``strategies/``."""
    if workspace is not None:
        strategies.load_workspace(workspace)


def resolve(experiment: Experiment) -> Experiment:
    """Return the same experiment with every option of its components written out.

    So that its file says what was run even after a default has changed, and equal experiments have
    equal digests. Components that do not exist are left as they are; ``prepare`` refuses them.
    """

    def full(registry: Registry[Any], component: Component, where: str) -> Component:
        if component.name not in registry.names():
            return component
        options = asdict(build(registry.get(component.name), component.options, where))
        return Component(component.name, {k: v for k, v in options.items() if v is not None})

    data, clients = experiment.data, experiment.clients
    return replace(
        experiment,
        strategy=full(strategies, experiment.strategy, "strategy"),
        model=full(models, experiment.model, "model"),
        data=replace(
            data,
            source=full(sources, data.source, "data.source"),
            partition=full(partitions, data.partition, "data.partition"),
        ),
        clients=replace(
            clients, models=tuple(full(models, m, "clients.models") for m in clients.models)
        ),
    )


def make_strategy(component: Component) -> Strategy:
    """Return the strategy that an experiment names.

    Raises:
        ConfigError: it does not exist, or an option is wrong.
    """
    return build(strategies.get(component.name), component.options, "strategy")


def make_federation(experiment: Experiment) -> Federation:
    """Load the data and divide them over the clients; equal for every strategy of one seed.

    Raises:
        ConfigError: unknown source or scheme, or options that cannot be met.
        DataError: the data are missing or damaged.
    """
    data = experiment.data
    source = build(sources.get(data.source.name), data.source.options, "data.source")
    scheme = build(partitions.get(data.partition.name), data.partition.options, "data.partition")
    dataset = source.load()
    rng = stream(experiment.seed, "data")
    count = experiment.clients.count
    partition: Partition
    if data.manifest:
        partition = manifest.load(Path(data.manifest), dataset)
        if partition.clients != count:
            raise ConfigError(
                f"clients.count = {count}, but the manifest {data.manifest} divides the data over "
                f"{partition.clients} clients; set clients.count = {partition.clients}"
            )
    else:
        partition = divide(dataset, scheme, count, rng.child("partition"), data.partition.name)
    return Federation.build(dataset, partition, validation=data.validation, rng=rng)


def prepare(experiment: Experiment) -> Prepared:
    """Return the parts of a run.

    Raises:
        ConfigError: something does not exist or does not work together; all of it is listed.
        DataError: the data are missing or damaged.
    """
    experiment = resolve(experiment)
    strategy = make_strategy(experiment.strategy)
    preset("privacy", experiment.privacy)
    device = pick_device(experiment.engine.device)
    federation = make_federation(experiment)
    chosen = experiment.clients.models or (experiment.model,)
    labels: list[str] = []
    specs: dict[str, tuple[str, dict[str, object]]] = {}
    for component in chosen:
        spec = (component.name, component.options)
        same = [label for label, other in specs.items() if other == spec]
        label = same[0] if same else component.name
        if not same and label in specs:
            label = f"{component.name}#{sum(s[0] == component.name for s in specs.values()) + 1}"
        specs[label] = spec
        labels.append(label)
    book = ModelBook(federation.task, specs, experiment.seed)
    clients = tuple(
        ClientInfo(id=k, examples=federation.train_size(k), model=labels[k % len(labels)])
        for k in range(federation.clients)
    )
    for label in specs:
        book.initial(label)
    setting = Setting(federation.task, book, clients, experiment.rounds, experiment.seed)
    problems = strategy.problems(setting)
    if problems:
        raise ConfigError("\n".join(problems))
    return Prepared(experiment, federation, setting, strategy, device)


def pick_device(name: str) -> torch.device:
    """Return the device: ``auto`` is CUDA where there is one, else the CPU.

    Raises:
        ConfigError: CUDA was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("engine.device = 'cuda', but torch sees no CUDA device; use 'auto'")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
