"""Laws of the data-free methods with many rounds: what switched off is FedAvg, and what is not."""

from dataclasses import replace

import numpy as np
import pytest

from fedkd.engine.setup import prepare, resolve
from fedkd.engine.simulate import in_process
from fedkd.errors import ConfigError, RunError
from fedkd.strategies import alternating
from fedkd.types import Upload, select

HALF = {"clients.participation.ratio": 0.5, "rounds": 3, "evaluate.every": 3}
FULL = {"rounds": 2}
QUICK = {"server_steps": 4, "student_steps": 2, "generator_width": 2, "noise": 4}
NAMES = ["fedftg", "dfrd"]
each = pytest.mark.parametrize("name", NAMES)


def quick(name, **options):
    return {"name": name, **QUICK, **options}


def composite(run):
    """Accuracy and loss by client and round, as judged after aggregation."""
    return [
        run.log.table(metric, split, "composite", "personal").tobytes()
        for metric in ("accuracy", "loss")
        for split in ("test", "validation")
    ]


@each
@pytest.mark.parametrize("participation", [FULL, HALF], ids=["full", "half"])
def test_without_steps_of_the_student_it_is_fedavg(name, participation, tiny, play, bits):
    one = play(tiny({"name": name, "server_steps": 0}, participation))
    other = play(tiny("fedavg", participation))
    assert bits(one) == bits(other)
    assert composite(one) == composite(other)
    assert one.ledger.by_round() == other.ledger.by_round()


@each
@pytest.mark.parametrize("participation", [FULL, HALF], ids=["full", "half"])
def test_steps_of_the_student_change_the_model_and_only_the_servers_state(
    name, participation, tiny, play, bits
):
    run, plain = play(tiny(quick(name), participation)), play(tiny("fedavg", participation))
    ours, theirs = select(run.state, "model"), select(plain.state, "model")
    assert ours.keys() == theirs.keys()
    assert all(ours[key].tobytes() != theirs[key].tobytes() for key in ours)
    kept = {k: v for k, v in bits(run).items() if k != "server"}
    assert kept == {k: v for k, v in bits(plain).items() if k != "server"}


@each
def test_the_generator_stays_on_the_server_and_goes_on_from_round_to_round(name, tiny, play):
    run = play(tiny(quick(name), {"rounds": 3}), rounds=2)
    before = select(run.state, "generator")
    assert before
    with in_process():
        run.play(3)
    after = select(run.state, "generator")
    assert before.keys() == after.keys()
    assert any(before[key].tobytes() != after[key].tobytes() for key in before)
    setting = run.prepared.setting
    sent = run.prepared.strategy.broadcast(run.state, setting.clients[0], 4, setting)
    assert {key.split("/")[0] for key in sent} == {"model"}
    # Without its memory the generator would start from the same numbers in every round.
    forgetful = play(tiny(quick(name), {"rounds": 3}), rounds=2)
    for key in [k for k in forgetful.state if k.startswith("generator/")]:
        del forgetful.state[key]
    with in_process():
        forgetful.play(3)
    other = select(forgetful.state, "generator")
    assert any(other[key].tobytes() != after[key].tobytes() for key in after)


def test_without_a_share_there_is_no_slow_copy(tiny, play, bits):
    none = play(tiny(quick("dfrd", ema_share=0.0), FULL))
    other = play(tiny(quick("dfrd", ema_share=0.0, ema=0.9), FULL))
    some = play(tiny(quick("dfrd", ema_share=0.5), FULL))
    assert not select(none.state, "generator_ema")
    assert select(some.state, "generator_ema").keys() == select(none.state, "generator").keys()
    assert bits(none) == bits(other)
    assert bits(none) != bits(some)


def test_the_slow_copy_takes_part_from_the_second_round_on(tiny, play, bits):
    none, some = (play(tiny(quick("dfrd", ema_share=s), {"rounds": 1})) for s in (0.0, 0.5))
    ours, theirs = select(some.state, "model"), select(none.state, "model")
    assert all(ours[key].tobytes() == theirs[key].tobytes() for key in ours)


@each
def test_a_class_that_nobody_holds_is_never_made(name, tiny, play, monkeypatch):
    asked = []
    original = alternating.sample

    def watched(generator, codes):
        asked.append(codes.labels.clone())
        return original(generator, codes)

    monkeypatch.setattr(alternating, "sample", watched)
    partition = {"name": "pathological", "classes_per_client": 3}
    run = play(tiny(quick(name), {"data.partition": partition, **HALF}))
    held = run.prepared.federation.counts() > 0
    trained = [run.log.by_client("loss/supervised", "train", r) for r in (1, 2, 3)]
    known = [set(np.flatnonzero(held[~np.isnan(t)].any(0))) for t in trained]
    assert all(len(classes) < 10 for classes in known), "two of four clients leave classes out"
    # Two turns a round, from the second round on with a slow copy's samples in dfrd.
    rounds = [1, 1, 2, 2, 3, 3] if name == "fedftg" else [1, 1, *[2] * 4, *[3] * 4]
    for round_, labels in zip(rounds, asked, strict=True):
        assert set(labels.tolist()) <= known[round_ - 1]


@each
def test_one_client_alone(name, tiny, play):
    one = {"rounds": 2, "clients.count": 1, "data.partition": "iid"}
    # The only teacher is the student itself: there is nothing that it could be taught. Adam would
    # make small steps of rounding errors, sgd leaves them what they are.
    run, plain = play(tiny(quick(name, server_optimizer="sgd"), one)), play(tiny("fedavg", one))
    for key, value in select(run.state, "model").items():
        np.testing.assert_allclose(value, select(plain.state, "model")[key], rtol=0, atol=1e-6)
    assert np.isfinite(run.log.table("loss", "test", "composite", "personal")).all()


@each
def test_participants_without_examples_neither_teach_nor_are_asked(name, tiny, play, monkeypatch):
    calls = []
    original = alternating.train_generator

    def counted(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(alternating, "train_generator", counted)
    run = play(tiny(quick(name), {"rounds": 1}))
    assert calls
    strategy, setting = run.prepared.strategy, run.prepared.setting
    before = dict(run.state)
    sent_back = {k: v for k, v in before.items() if k.startswith("model/")}
    counts = {"counts/labels": np.zeros(10, dtype=np.int32)}
    nobody = [
        Upload(client=replace(c, examples=0), arrays={**sent_back, **counts})
        for c in setting.clients[:2]
    ]
    calls.clear()
    state, _ = strategy.aggregate(before, nobody, 2, setting)
    assert calls == []
    assert all(state[k].tobytes() == v.tobytes() for k, v in before.items() if "meta" not in k)


@each
def test_a_generator_that_diverges_says_which_option_to_lower(name, tiny, play):
    wild = quick(name, generator_lr=1e38, generator_steps=3)
    with pytest.raises(RunError, match=r"generator diverged.*lower strategy\.generator_lr"):
        play(tiny(wild, {"rounds": 2}))


@each
def test_a_student_that_diverges_says_which_option_to_lower(name, tiny, play):
    wild = quick(name, server_lr=1e38, server_optimizer="sgd", server_momentum=0.9)
    with pytest.raises(RunError, match=r"lower strategy\.server_lr"):
        play(tiny(wild, {"rounds": 2}))


@each
def test_unknown_parts_are_refused_before_round_one(name, tiny):
    for options in ({"fusion": "class-count"}, {"objective": "kll"}):
        with pytest.raises(ConfigError, match="did you mean"):
            prepare(tiny({"name": name, **options}))


@each
def test_several_architectures_learn_from_one_ensemble(name, tiny, play):
    models = [{"name": "mlp", "hidden": [16, 12]}, {"name": "mlp", "hidden": [10]}]
    mixed = {"clients.models": models, "rounds": 2}
    run, plain = (
        play(tiny(quick(name), mixed)),
        play(tiny({"name": name, "server_steps": 0}, mixed)),
    )
    for place in ("model", "models/mlp#2"):
        ours, theirs = select(run.state, place), select(plain.state, place)
        assert ours.keys() == theirs.keys()
        assert all(ours[k].tobytes() != theirs[k].tobytes() for k in ours)


def test_turns_cut_the_steps_exactly(tiny, play, monkeypatch):
    sizes = []
    original = alternating.transfer

    def counted(student, x, probs, **kwargs):
        result = original(student, x, probs, **kwargs)
        sizes.append((len(x), result.steps))
        return result

    monkeypatch.setattr(alternating, "transfer", counted)
    options = {"server_steps": 7, "student_steps": 3, "server_batch_size": 8}
    play(tiny(quick("fedftg", **options), {"rounds": 1}))
    assert sizes == [(24, 3), (24, 3), (8, 1)]


@each
def test_a_replay_of_one_turn_is_the_published_method(name, tiny, play, bits):
    assert bits(play(tiny(quick(name, replay=1), FULL))) == bits(play(tiny(quick(name), FULL)))


@each
def test_a_replay_saves_turns_of_the_generator_and_questions_to_teachers(
    name, tiny, play, bits, monkeypatch
):
    turns, asked = [], []
    train, targets = alternating.train_generator, alternating.Ensemble.targets
    monkeypatch.setattr(
        alternating, "train_generator", lambda *a, **k: turns.append(1) or train(*a, **k)
    )
    monkeypatch.setattr(
        alternating.Ensemble, "targets", lambda *a, **k: asked.append(1) or targets(*a, **k)
    )
    found = {}
    for replay in (1, 2, 3):
        turns.clear(), asked.clear()
        run = play(tiny(quick(name, server_steps=9, replay=replay), {"rounds": 1}))
        found[replay] = bits(run)["server"]
        # 5 turns of 2, 2, 2, 2 and 1 steps.
        assert len(turns) == len(asked) == {1: 5, 2: 3, 3: 2}[replay]
    assert len(set(found.values())) == 3


@each
def test_no_replay_is_in_no_digest(name, tiny):
    written = resolve(tiny(quick(name)))
    assert "replay" not in written.strategy.options
    assert written.digest() != resolve(tiny(quick(name, replay=2))).digest()
