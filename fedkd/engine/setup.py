"""From an experiment to its parts, with every problem found before the first round."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fedkd.clients.attendance import Attendance
from fedkd.clients.availability import label_shares
from fedkd.config import Component, Experiment
from fedkd.data import manifest
from fedkd.data.dataset import Dataset
from fedkd.data.federated import Federation, Split
from fedkd.data.partition import Partition, divide
from fedkd.data.public import foreign_pool, take_public
from fedkd.data.registries import partitions, sources
from fedkd.distill.chosen import asks, chosen, named
from fedkd.distill.objectives.base import objectives
from fedkd.engine.planning import plan_for
from fedkd.engine.planting import keep_back, planted
from fedkd.engine.sinks.base import check as check_sinks
from fedkd.engine.sinks.base import sinks
from fedkd.engine.swinging import swing_plan, with_pool
from fedkd.errors import ConfigError
from fedkd.models.book import ModelBook
from fedkd.models.registries import models
from fedkd.options import build
from fedkd.privacy.canaries.draw import CanarySet
from fedkd.privacy.plan import PrivacyPlan
from fedkd.privacy.swing import SwingPlan
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
    plan: PrivacyPlan
    attendance: Attendance
    swing: SwingPlan | None = None
    canaries: CanarySet | None = None

    @property
    def cohort_of(self) -> tuple[int, ...]:
        """The clients that can take part: all, or the pseudo-client of a pooled strategy."""
        return (0,) if self.strategy.pooled else tuple(c.id for c in self.setting.clients)


def load_workspace(workspace: Path | None) -> None:
    """Import the user's drop-ins; this executes the files in ``strategies/`` and ``sinks/``."""
    if workspace is not None:
        strategies.load_workspace(workspace)
        sinks.load_workspace(workspace)


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
            public=replace(
                data.public,
                source=data.public.source
                and full(sources, data.public.source, "data.public.source"),
            ),
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
    return load_data(experiment)[0]


def load_data(experiment: Experiment) -> tuple[Federation, Split | None]:
    """Return the federation and its public pool; see :func:`gather`."""
    federation, pool, _ = gather(experiment)
    return federation, pool


def gather(experiment: Experiment) -> tuple[Federation, Split | None, CanarySet | None]:
    """Return federation, public pool and canaries; equal for every strategy of one seed.

    A pool without a source of its own is taken out of the training examples *before* these are
    divided, so no client holds any of it. A manifest is one of the examples that are left, so its
    seed, and not the experiment's, then decides which ones those are.

    Raises:
        ConfigError: unknown source or scheme, or options that cannot be met.
        DataError: the data are missing, damaged, or too few for the pool.
    """
    data, public = experiment.data, experiment.data.public
    # First, so that canaries are made of the same images whatever the seed takes for the pool.
    dataset, kept = keep_back(experiment, _load(data.source, "data.source"))
    scheme = build(partitions.get(data.partition.name), data.partition.options, "data.partition")
    rng = stream(experiment.seed, "data")
    drawn = manifest.seed_of(Path(data.manifest)) if data.manifest else experiment.seed
    pool_rng = stream(drawn, "data", "public")
    pool: Split | None = None
    if public.source is not None:
        if not public.size:
            raise ConfigError(
                "data.public.source is set, but data.public.size = 0; say how many examples the "
                "pool has, as in data.public.size = 500"
            )
        if _same_data(data.source, public.source):
            raise ConfigError(
                f"data.public.source = {public.source.name!r} is what the clients train on; leave "
                "it out: then the pool is taken out of the training data, and nobody holds it twice"
            )
        other = _load(public.source, "data.public.source")
        pool = foreign_pool(other, dataset.task(), public.size, pool_rng)
    elif public.size:
        dataset, pool = take_public(dataset, public.size, pool_rng)
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
    federation = Federation.build(dataset, partition, validation=data.validation, rng=rng)
    federation, canaries = planted(experiment, federation, kept)
    return federation, pool, canaries


def _load(component: Component, where: str) -> Dataset:
    return build(sources.get(component.name), component.options, where).load()


def _same_data(one: Component, other: Component) -> bool:
    """Return whether two sources read the same data, however many examples they keep of it."""

    def read(component: Component) -> dict[str, Any]:
        options = asdict(build(sources.get(component.name), component.options))
        return {k: v for k, v in options.items() if k not in ("limit", "test_limit")}

    return one.name == other.name and read(one) == read(other)


def prepare(experiment: Experiment) -> Prepared:
    """Return the parts of a run.

    Raises:
        ConfigError: something does not exist or does not work together; all of it is listed.
        DataError: the data are missing or damaged.
    """
    experiment = resolve(experiment)
    check_sinks(experiment.engine.sinks)
    strategy = make_strategy(experiment.strategy)
    device = pick_device(experiment.engine.device)
    federation, public, canaries = gather(experiment)
    if federation.task.sequence and not strategy.sequences:
        able = [name for name in strategies.names() if strategies.get(name).sequences]
        raise ConfigError(
            f"strategy {experiment.strategy.name!r} exchanges knowledge by class, and a row of "
            f"text ({federation.task.name!r}) has none; use one of: {', '.join(able)}"
        )
    wanted = experiment.clients.models or (experiment.model,)
    labels: list[str] = []
    specs: dict[str, tuple[str, dict[str, object]]] = {}
    for component in wanted:
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
    if public is not None:
        public = Split(public.x.to(device), public.y.to(device))
    setting = Setting(
        federation.task, book, clients, experiment.rounds, experiment.seed, public, device
    )
    swing = swing_plan(experiment, strategy, setting)
    setting = with_pool(setting, swing, strategy)
    problems = [
        *strategy.problems(setting),
        *_nobody_to_learn_from(experiment, federation, strategy),
        *_branching_text(federation, strategy),
    ]
    if strategy.needs_public() and public is None:
        problems = [
            f"strategy {experiment.strategy.name!r} needs a public pool, and there is none; set "
            "data.public.size = 500 (taken out of the training data) or data.public.source",
            *problems,
        ]
    if problems:
        raise ConfigError("\n".join(problems))
    attendance = attend(experiment, strategy, federation)
    plan = plan_for(experiment, strategy, setting, attendance)
    return Prepared(
        experiment, federation, setting, strategy, device, plan, attendance, swing, canaries
    )


def _nobody_to_learn_from(
    experiment: Experiment, federation: Federation, strategy: Strategy
) -> list[str]:
    """Return why policies that learn from validation examples would not learn; nothing: they do."""
    guided = getattr(strategy, "policies", None) or ()
    asking = [named(policy) for policy in guided if asks(policy, "validation")]
    if not asking or any(federation.sizes(k)["validation"] for k in range(federation.clients)):
        return []
    return [
        f"strategy.policies = {asking[0]!r} learns from clients' validation examples, and with "
        f"data.validation = {experiment.data.validation:g} no client has any; set data.validation "
        "= 0.1 (a share of each client's training examples), or leave it out"
    ]


def _branching_text(federation: Federation, strategy: Strategy) -> list[str]:
    """Return why inner blocks cannot be taught, if so: features of a text are means of tokens."""
    asked = getattr(strategy, "objective", None)
    if not federation.task.sequence or asked is None or named(asked) not in objectives.names():
        return []
    if chosen(asked).inner() is None:
        return []
    return [
        f"strategy.objective = {named(asked)!r}: its branches read one row of features for each "
        f"example, and text ({federation.task.name!r}) is taught token by token; leave branches out"
    ]


def attend(experiment: Experiment, strategy: Strategy, federation: Federation) -> Attendance:
    """Return who takes part when; a pooled strategy is one pseudo-client that always does.

    Raises:
        ConfigError: options of a model of availability that is not used, or classes of a text.
    """
    participation = experiment.clients.participation
    problems = participation.problems()
    if problems:
        raise ConfigError("\n".join(problems))
    if participation.availability == "label" and federation.task.sequence:
        raise ConfigError(
            "clients.participation.availability = 'label' follows the classes of clients' "
            f"examples, and a row of text ({federation.task.name!r}) has none; use 'power-law'"
        )
    return Attendance(
        participation,
        experiment.seed,
        tuple(federation.train_size(k) for k in range(federation.clients)),
        label_shares(federation.counts()) if participation.availability == "label" else None,
        strategy.pooled,
    )


def pick_device(name: str) -> torch.device:
    """Return the server's device: ``auto`` is the first CUDA device where there is one, or the CPU.

    Clients work on the others, too: see :mod:`fedkd.engine.placement`.

    Raises:
        ConfigError: CUDA was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("engine.device = 'cuda', but torch sees no CUDA device; use 'auto'")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    # With its number, as tensors that are there have it: without, it would be another device.
    return torch.device("cuda", 0)
