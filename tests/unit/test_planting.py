"""Canaries in a run: planted before round 1, written down, equal for every seed but the coins."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fedkd.config import Experiment
from fedkd.engine.folder import RunFolder
from fedkd.engine.setup import prepare
from fedkd.engine.simulation import Run, run
from fedkd.errors import ConfigError, DataError

IMAGES = {
    "canaries.kind": "random-image",
    "canaries.count": 6,
    "canaries.repetitions": [1, 4],
    "canaries.references": 30,
}
DP = {
    "privacy.unit": "client",
    "privacy.noise_multiplier": 0.01,
    "privacy.delta": 1e-3,
    "privacy.clipping.norm": 1.0,
    "clients.participation.scheme": "poisson",
    "clients.participation.ratio": 0.8,
}


def test_canaries_are_in_the_training_parts_of_their_holders(tiny):
    prepared = prepare(tiny("fedavg", IMAGES))
    clean = prepare(tiny("fedavg"))
    canaries = prepared.canaries
    assert canaries is not None
    for k in range(4):
        put = canaries.planted(k, 0)
        more = 0 if put is None else len(put.y)
        assert prepared.setting.clients[k].examples == clean.setting.clients[k].examples + more
        assert prepared.federation.sizes(k)["train"] == prepared.federation.train_size(k)
        assert len(prepared.federation.client(k).train) == prepared.federation.train_size(k)
        for part in ("validation", "test"):
            mine = getattr(prepared.federation.client(k), part)
            assert (mine.x == getattr(clean.federation.client(k), part).x).all()
    assert prepared.federation.counts().sum() == sum(
        prepared.federation.train_size(k) for k in range(4)
    )
    everybody = sum(prepared.federation.train_size(k) for k in range(4))
    assert len(prepared.federation.pooled().train) == everybody


@pytest.mark.parametrize("kind", ["random-image", "mislabelled"])
@pytest.mark.parametrize("pool", [0, 30])
def test_other_seeds_flip_other_coins_for_the_same_canaries(tiny, kind, pool):
    changes = {**IMAGES, "canaries.kind": kind, "data.public.size": pool}
    one, two = (prepare(tiny("fedavg", {**changes, "seed": s})).canaries for s in (0, 1))
    assert one is not None
    assert two is not None
    assert np.array_equal(one.x, two.x)
    assert np.array_equal(one.reference_x, two.reference_x)
    assert one.holders == two.holders
    assert not np.array_equal(one.inside, two.inside)


def test_a_run_writes_its_canaries_down(tiny, tmp_path):
    made = tiny("fedavg", {**IMAGES, "rounds": 1})
    run(made, tmp_path / "run")
    written = json.loads((tmp_path / "run" / "canaries.json").read_text())
    canaries = prepare(made).canaries
    assert canaries is not None
    assert written["digest"] == canaries.digest()
    assert (tmp_path / "run" / "canaries.safetensors").is_file()
    assert sum(c["inside"] for c in written["canaries"]) == int(canaries.inside.sum())


def test_without_canaries_a_digest_is_what_it_was(tiny):
    made = tiny("fedavg")
    assert "canaries" in made.table()
    assert made.digest() != tiny("fedavg", {"canaries.kind": "random-image"}).digest()
    assert made.digest() == tiny("fedavg", {"audit.reference_models": 3}).digest()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"canaries.kind": "text"}, "text"),
        ({"canaries.repetitions": []}, "at least one level"),
        ({"canaries.share": 0.5}, "share"),
        ({"canaries.random_clients": 3}, "privacy.unit = 'client'"),
        ({"canaries.random_clients": 3, **DP, "strategy": "fd"}, "weights and nothing else"),
        ({"canaries.random_clients": 3, **DP, "privacy.clipping.mode": "per-layer"}, "flat"),
    ],
)
def test_what_cannot_be_planted_is_refused(tiny, changes, says):
    with pytest.raises((ConfigError, DataError), match=says):
        prepare(tiny("fedavg", changes))


def test_text_is_refused_by_strategies_that_need_classes(tiny):
    text = {
        "data.source": {"name": "pydoc-topics", "topics": 4, "rows_per_topic": 6},
        "data.partition": "natural",
        "model": "gpt-tiny",
    }
    with pytest.raises(ConfigError, match=r"exchanges knowledge by class.*fedavg"):
        prepare(tiny("fd", text))
    prepare(tiny("fedavg", text))


def shot(tiny, **more: object) -> Experiment:
    averaging = {"name": "fedavg", "weighting": "uniform"}
    return tiny(averaging, {"canaries.random_clients": 8, **DP, "rounds": 4, **more})


def test_canary_clients_are_found_in_what_is_released(tiny, play):
    played = play(shot(tiny))
    guard = played.strategy.guard
    seen, came = np.array(guard.canaries.observed), np.array(guard.canaries.came)
    assert seen.shape == came.shape == (4, 8)
    assert came.any()
    assert not came.all()
    # Eight unit vectors among four clients' updates: with next to no noise they cannot hide.
    assert seen[came].min() > 0.1
    assert np.abs(seen[~came]).max() < 0.15


def test_canary_clients_survive_a_resume(tiny, play, tmp_path):
    made = shot(tiny, **{"engine.checkpoint_every": 1})
    whole = Run(prepare(made), RunFolder(tmp_path / "whole"))
    play(made, run=whole)
    half = Run(prepare(made), RunFolder(tmp_path / "half"))
    play(made, 2, run=half)
    rest = Run(prepare(made), RunFolder(tmp_path / "half"))
    play(made, run=rest)
    assert rest.strategy.guard.canaries.observed == whole.strategy.guard.canaries.observed
    assert rest.strategy.guard.canaries.came == whole.strategy.guard.canaries.came
    assert all((rest.state[k] == whole.state[k]).all() for k in whole.state)
