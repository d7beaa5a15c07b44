"""What an attacker of a claim would try: each once went past a mechanism, or past a sentence."""

import numpy as np
import pytest
from torch import nn

from fedkd.engine.failures import failure_folder, replay
from fedkd.engine.guard import Guard
from fedkd.engine.planning import _example_level
from fedkd.engine.setup import prepare
from fedkd.engine.simulation import run
from fedkd.errors import ConfigError, RunError
from fedkd.options import build
from fedkd.privacy.accounting import History
from fedkd.privacy.options import Privacy
from fedkd.privacy.plan import make_plan
from fedkd.privacy.population import Population
from fedkd.privacy.uncovered import uncovered
from fedkd.strategies import class_exchange
from fedkd.types import Upload

EXAMPLE = {
    "privacy.unit": "example",
    "privacy.noise_multiplier": 1.0,
    "privacy.delta": 1e-4,
    "privacy.release.mode": "dpsgd+release",
    "privacy.release.noise_multiplier": 2.0,
}
CENTRAL = {
    "privacy.unit": "client",
    "privacy.noise_multiplier": 1.0,
    "privacy.delta": 1e-3,
    "clients.participation": {"scheme": "poisson", "ratio": 0.5},
}


def privacy(**options):
    return build(Privacy, options)


def test_class_means_that_bypass_their_noise_do_not_leave_a_client(tiny, play, monkeypatch):
    plain = class_exchange.summarise

    def careless(client, values, counted, point=""):
        plain(client, values, counted, point)  # Noised and paid for, but not what is sent.
        client.release = None
        return plain(client, values, counted, point)

    chosen = tiny({"name": "fedproto"}, EXAMPLE)
    play(chosen, rounds=1)
    monkeypatch.setattr("fedkd.strategies.fedproto.summarise", careless)
    with pytest.raises(RunError, match="without the noise of"):
        play(chosen, rounds=1)


def test_label_counts_that_bypass_their_noise_do_not_leave_a_client(tiny, play, monkeypatch):
    def raw(client):
        return {"counts/labels": np.bincount(client.data.train.y, minlength=10).astype(np.int32)}

    chosen = tiny({"name": "fedgen", "generator_steps": 2}, EXAMPLE)
    play(chosen, rounds=1)
    monkeypatch.setattr("fedkd.strategies.fedgen.label_counts_of", raw)
    with pytest.raises(RunError, match="counts/labels"):
        play(chosen, rounds=1)


def test_an_empty_declaration_covers_nothing_under_central_noise(tiny):
    prepared = prepare(tiny("local-only", CENTRAL))
    guard, client = Guard(prepared), prepared.setting.clients[1]
    assert guard.fold(1, [Upload(client=client, arrays={})], {})[0][0].arrays == {}
    smuggled = Upload(client=client, arrays={"model/w": np.ones(3, dtype=np.float32)})
    with pytest.raises(RunError, match="no privacy mechanism covers"):
        guard.fold(1, [smuggled], {})


def test_a_client_that_fails_after_its_training_has_paid_for_it(tiny, play, monkeypatch):
    chosen = tiny("fedavg", {**EXAMPLE, "privacy.release": {}})
    kind = type(prepare(chosen).strategy)
    plain = kind.local_update

    def diverged(self, client, received):
        update = plain(self, client, received)
        if client.info.id == 2:
            raise RunError("weights are not finite")
        return update

    monkeypatch.setattr(kind, "local_update", diverged)
    done = play(chosen, rounds=2)
    guard = done.strategy.guard
    kept = guard.ledger.state_dict()["clients"]
    planned = History([(z, q, 2 * n) for z, q, n in guard.plan.round_of(2)])
    assert [tuple(event) for event in kept["2"]] == planned.events()
    assert set(kept) == {"0", "1", "2", "3"}


def test_temperatures_of_private_data_are_no_parameter_of_a_mechanism():
    facts = Population(
        scheme="poisson",
        ratio=0.1,
        rounds=10,
        examples=(50,) * 40,
        turns=(1,) * 40,
        fits=(((0.2, 5),),) * 40,
        public=True,
    )
    client = {"unit": "client", "epsilon": 8.0, "delta": 1e-5}
    swing = {"map": "adaptive", "scorer": "mask", "scorer_options": {"classes": [3]}}
    make_plan(privacy(**client, swing=swing), facts)
    swing["scorer_options"]["private"] = True
    with pytest.raises(ConfigError, match=r"scorer_options\.private"):
        make_plan(privacy(**client, swing=swing), facts)


def test_an_encoder_that_mixes_examples_is_not_frozen(tiny, monkeypatch):
    frozen = {
        **EXAMPLE,
        "privacy.release.mode": "frozen-encoder",
        "clients.training.frozen": ["fc1", "fc2"],
    }
    chosen = tiny({"name": "fedproto"}, frozen)
    setting, strategy = prepare(chosen).setting, prepare(chosen).strategy
    make = type(setting.book).make

    def mixing(self, label, *sources, **options):
        model = make(self, label, *sources, **options)
        model.add_module("norm", nn.BatchNorm1d(3, track_running_stats=False))
        return model

    assert not _example_level(chosen, strategy, setting, ())
    monkeypatch.setattr(type(setting.book), "make", mixing)
    (found,) = _example_level(chosen, strategy, setting, ())
    assert "BatchNorm" in found


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"unit": "example"}, "examples held by several clients"),
        ({"unit": "example"}, "reported to the server"),
        ({"unit": "client", "trust": "local"}, "how many training examples each client has"),
        ({"unit": "client"}, "readers of the run folder"),
        ({"unit": "client"}, "other runs on the same data"),
        ({"unit": "client"}, "failures"),
        ({"unit": "client", "release": {"votes": "confident-gnmax"}}, "max_epsilon is what"),
    ],
)
def test_what_stays_open_is_said(options, said):
    assert any(said in text for text in uncovered(privacy(**options), public=False))


def test_releases_of_whole_tables_are_not_said_to_be_sampled(tiny):
    with_tables = prepare(tiny({"name": "fedproto"}, EXAMPLE)).plan.claim().sampling
    without = prepare(tiny("fedavg", EXAMPLE)).plan.claim().sampling
    assert "none in releases of class sums" in with_tables and "none" not in without


def test_a_failure_is_replayed_under_the_plan_that_it_failed_under(tiny, tmp_path, monkeypatch):
    changes = {
        "privacy": {"unit": "example", "noise_multiplier": 1.0, "delta": 1e-4},
        "engine.checkpoint_every": 1,
        "rounds": 1,
    }
    chosen = tiny("fedavg", changes)
    kind = type(prepare(chosen).strategy)
    honest, seen = kind.local_update, []

    def watched(self, client, received):
        seen.append(client.dp)
        update = honest(self, client, received)
        if client.info.id == 1 and len(seen) <= 4:
            raise ValueError("for once")
        return update

    monkeypatch.setattr(kind, "local_update", watched)
    run(chosen, tmp_path / "run")
    replay(failure_folder(tmp_path / "run", 1, 1))
    assert seen[-1] is not None and seen[-1].noise_multiplier == 1.0
