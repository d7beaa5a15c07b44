"""Laws of FedGen: off it is FedAvg, on it trains heads by more than their own labels."""

import numpy as np
import pytest

from fedkd.engine.setup import prepare
from fedkd.errors import ConfigError
from fedkd.rng import stream
from fedkd.types import Upload, prefixed, select

HALF = {"clients.participation.ratio": 0.5, "rounds": 4}
FULL = {"rounds": 3}
QUICK = {"name": "fedgen", "generator_steps": 4, "generator_hidden": 8, "noise": 4}
OFF = {"name": "fedgen", "alpha": 0, "beta": 0}


def composite(run):
    """Accuracy and loss by client and round, as judged after aggregation."""
    return [
        run.log.table(metric, split, "composite", "personal").tobytes()
        for metric in ("accuracy", "loss")
        for split in ("test", "validation")
    ]


@pytest.mark.parametrize("participation", [FULL, HALF], ids=["full", "half"])
@pytest.mark.parametrize(
    ("share", "general"),
    [("model", "fedavg"), ("head", {"name": "lg-fedavg", "shared_layers": 1})],
    ids=["model", "head"],
)
def test_without_weights_it_is_averaging(share, general, participation, tiny, play, bits):
    run, plain = (play(tiny(s, participation)) for s in ({**OFF, "share": share}, general))
    assert bits(run) == bits(plain)
    assert composite(run) == composite(plain)
    counted = [r.ledger.totals(phase="train").tensors for r in (run, plain)]
    assert counted[0] == counted[1]


@pytest.mark.parametrize("on", [{"alpha": 1.0}, {"alpha": 0, "beta": 1.0}], ids=["alpha", "beta"])
def test_the_first_round_is_fedavgs_and_the_second_is_not(on, tiny, play):
    for rounds, same in ((1, True), (2, False)):
        changes = {"rounds": rounds}
        run, plain = (play(tiny(s, changes)) for s in ({**QUICK, **on}, "fedavg"))
        ours, theirs = (select(r.state, "model") for r in (run, plain))
        assert ours.keys() == theirs.keys()
        equal = [ours[key].tobytes() == theirs[key].tobytes() for key in ours]
        assert all(equal) is same


def test_the_body_hears_of_generated_features_only_through_the_head(tiny, play):
    """In one local step gradients of generated features stop at the head: bodies stay FedAvg's."""
    one_step = {"clients.training.steps": 1, "rounds": 2}
    run = play(tiny({**QUICK, "alpha": 5.0}, one_step))
    plain = play(tiny("fedavg", one_step))
    for key, value in select(run.state, "model").items():
        same = value.tobytes() == plain.state[f"model/{key}"].tobytes()
        assert same is not key.startswith("head")


def test_clients_draw_labels_of_the_whole_federation(tiny, play):
    changes = {
        "clients.count": 5,
        "data.partition": {"name": "pathological", "classes_per_client": 2},
        "data.validation": 0.0,
    }
    run = play(tiny(QUICK, changes))
    strategy, setting = run.prepared.strategy, run.prepared.setting
    sent = strategy.broadcast(run.state, setting.clients[1], 4, setting)
    counts = run.prepared.federation.counts()
    assert (counts[1] > 0).sum() == 2
    assert np.array_equal(run.state["meta/label_counts"], counts)
    assert np.allclose(sent["counts/prior"], counts.sum(0) / counts.sum(), rtol=0, atol=1e-7)


def test_the_generator_goes_on_from_what_it_knew(tiny, play):
    """Without a step that moves it the generator stays: it is the server's, not the round's."""
    still = {**QUICK, "generator_lr": 1e-12, "generator_weight_decay": 0.0}
    generators = [select(play(tiny(still, {"rounds": r})).state, "generator") for r in (1, 3)]
    assert generators[0].keys() == generators[1].keys()
    for key, value in generators[0].items():
        assert np.allclose(value, generators[1][key], rtol=0, atol=1e-8), key
    moved = select(play(tiny({**QUICK, "generator_lr": 1e-2}, {"rounds": 3})).state, "generator")
    assert not np.allclose(moved["head.weight"], generators[0]["head.weight"], rtol=0, atol=1e-3)


def test_judging_needs_no_generator(tiny, play):
    run = play(tiny(QUICK, FULL))
    assert set(run.ledger.totals(phase="evaluate").tensors) == {"model"}
    assert {"model", "counts", "generator"} == set(run.ledger.totals(phase="train").tensors)


def test_a_head_alone_joins_different_bodies(tiny, play):
    models = [{"name": "mlp", "hidden": [16, 12]}, {"name": "mlp", "hidden": [12]}]
    changes = {"clients.models": models, "rounds": 3}
    run = play(tiny({**QUICK, "share": "head"}, changes))
    assert {c.model for c in run.prepared.setting.clients} == {"mlp", "mlp#2"}
    assert "failed" not in (run.folder.path / "events.log").read_text()
    assert set(select(run.state, "model")) == {"head.weight", "head.bias"}
    trained = run.log.by_client("loss/generated", "train", 3)
    assert np.isfinite(trained).all()
    with pytest.raises(ConfigError, match="different architectures"):
        prepare(tiny(QUICK, changes))


@pytest.mark.parametrize("model", ["cnn", "resnet8", "vit-tiny"])
def test_heads_behind_maps_and_tokens_take_a_vector(model, tiny):
    prepared = prepare(tiny({**QUICK, "share": "head"}, {"model": model}))
    setting, strategy = prepared.setting, prepared.strategy
    state = strategy.init(setting, stream(0, "init"))
    label = setting.clients[0].model
    head = {k: v for k, v in setting.book.initial(label).items() if k.startswith("head")}
    upload = Upload(
        client=setting.clients[0],
        arrays={**prefixed("model", head), "counts/labels": np.ones(10, dtype=np.int32)},
    )
    after, metrics = strategy.aggregate(state, [upload], 1, setting)
    width = [v.shape[1] for k, v in head.items() if k.endswith("weight") and v.ndim == 2]
    assert after["generator/head.weight"].shape == (width[0], 8)
    assert np.isfinite(metrics["server/fidelity"])
