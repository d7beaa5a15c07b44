"""Canaries in a run: which secrets there are, who holds them, and what is written down of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import safetensors.numpy

from fedkd.config import Experiment
from fedkd.data.dataset import Dataset
from fedkd.data.federated import Federation, Planted
from fedkd.engine.folder import write_text, writing
from fedkd.errors import ConfigError
from fedkd.privacy.canaries.draw import CanarySet, Reserve, draw, reserve
from fedkd.privacy.payload import Payload, Weights
from fedkd.rng import Rng, stream
from fedkd.strategies.base import Setting, Strategy

CANARIES = "canaries.json"


def keep_back(experiment: Experiment, dataset: Dataset) -> tuple[Dataset, Reserve | None]:
    """Return the data without the images that canaries are made of, and those images.

    They follow from ``canaries.seed`` alone, so that every seed has the same canaries.
    """
    if experiment.canaries.kind == "none":
        return dataset, None
    return reserve(experiment.canaries, dataset, _secrets(experiment))


def planted(
    experiment: Experiment, federation: Federation, kept: Reserve | None
) -> tuple[Federation, CanarySet | None]:
    """Return the federation with its canaries planted, and the canaries.

    Raises:
        ConfigError: the options fit neither the data nor the federation.
        DataError: the tokenizer cannot write a canary, or all coins came up tails.
    """
    if experiment.canaries.kind == "none":
        return federation, None
    sizes = [federation.train_size(k) for k in range(federation.clients)]
    coins = stream(experiment.seed, "canaries", "coins", experiment.canaries.seed)
    found = draw(experiment.canaries, federation.dataset, kept, sizes, _secrets(experiment), coins)
    given: dict[int, Planted] = {}
    for k, size in enumerate(sizes):
        put = found.planted(k, size)
        if put is not None:
            given[k] = put
    return federation.plant(given), found


def write_canaries(canaries: CanarySet, folder: Path) -> None:
    """Write the canaries of a run: ``canaries.json`` for readers, their rows as safetensors."""
    write_text(folder / CANARIES, json.dumps(canaries.report(), indent=1, sort_keys=True) + "\n")
    arrays = {
        "x": canaries.x,
        "y": canaries.y,
        "inside": canaries.inside.astype(np.uint8),
        "repetitions": canaries.repetitions,
        "reference_x": canaries.reference_x,
        "reference_y": canaries.reference_y,
    }
    data = safetensors.numpy.save({k: np.ascontiguousarray(v) for k, v in arrays.items()})
    with writing(folder):
        (folder / "canaries.safetensors").write_bytes(data)


def canary_clients_fit(
    experiment: Experiment, strategy: Strategy, setting: Setting, payload: Payload
) -> None:
    """Refuse canary clients where no sum of weights is released that they could be found in.

    Raises:
        ConfigError: says what a one-shot audit needs.
    """
    count, privacy = experiment.canaries.random_clients, experiment.privacy
    if not count:
        return
    found = []
    if privacy.unit != "client" or privacy.trust != "central":
        found.append("privacy.unit = 'client' and privacy.trust = 'central'")
    elif len(payload) != 1 or not isinstance(payload[0], Weights):
        found.append("a strategy that uploads weights and nothing else (fedavg, fedprox, fedper)")
    if not np.isfinite(privacy.clipping.norm) or privacy.clipping.mode == "per-layer":
        found.append("privacy.clipping.mode = 'flat' or 'adaptive', with a finite norm")
    if found:
        raise ConfigError(
            f"canaries.random_clients = {count} is a one-shot audit of the server's noised sum of "
            f"weights; it needs {'; '.join(found)}; or set canaries.random_clients = 0"
        )


def _secrets(experiment: Experiment) -> Rng:
    return stream(experiment.canaries.seed, "canaries", "secrets")
