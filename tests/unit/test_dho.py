"""DHO in a federation: two heads, who teaches the second one, what travels and what is refused."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fedkd.clients.dual_head import Labelled, OnPool, answers, dual, mixed_heads
from fedkd.clients.guided import Guide
from fedkd.clients.local import Batch, fit
from fedkd.clients.terms import Distil, Supervised
from fedkd.clients.training import Training
from fedkd.data.federated import Split
from fedkd.distill.chosen import chosen_policy
from fedkd.distill.objectives.kl import KullbackLeibler
from fedkd.distill.objectives.sinkd import Sinkhorn
from fedkd.distill.targets import SampleTargets
from fedkd.engine.setup import make_strategy, prepare
from fedkd.engine.simulate import in_process
from fedkd.errors import ConfigError
from fedkd.models.base import BlockNet
from fedkd.options import build
from fedkd.rng import Rng
from fedkd.strategies.base import strategies
from fedkd.types import select

N, D, C, T = 12, 5, 4, 2.0
KL = KullbackLeibler()
SHORT = {"rounds": 2, "evaluate.every": 2}
FEW = {**SHORT, "clients.count": 2, "data.source.limit": 80, "data.public.size": 40}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=Rng(seed).torch())


def network(seed=1, size=D, hidden=6, classes=C):
    layer = nn.Sequential(nn.Linear(size, hidden), nn.ReLU())
    net = BlockNet({"fc1": layer}, nn.Linear(hidden, classes))
    for i, p in enumerate(net.parameters()):
        p.data.copy_(drawn(*p.shape, seed=(seed + 1) * 10 + i) / 2)
    return net


def linear(hidden=6, classes=C, seed=5):
    head = BlockNet({"hidden": nn.Identity()}, nn.Linear(hidden, classes))
    for i, p in enumerate(head.parameters()):
        p.data.copy_(drawn(*p.shape, seed=seed + i) / 2)
    return head


X, Y = drawn(N, D, seed=3), torch.arange(N) % C
SOFT = torch.softmax(drawn(N, C, seed=4), 1)


def batch(net):
    logits, features = net.forward_with_features(X, ("fc1",))
    return Batch(X, Y, torch.arange(N), logits, features)


def on_pool(net, size=5, objective=KL, weight=1.0, **more):
    given = {"objective": objective, "temperature": T, "weight": weight, "size": size}
    return OnPool(net, X, SOFT, **given, rng=Rng(0), **more)


def played(tiny, play, options=None, changes=None):
    return play(tiny({"name": "dho", **(options or {})}, {**SHORT, **(changes or {})}))


def judged(run, predict):
    return [run.log.table(m, "test", "composite", predict).tolist() for m in ("accuracy", "loss")]


# What the two heads say together.


@pytest.mark.parametrize(("a", "b"), [(0.5, 1.0), (0.3, 2.0), (0.9, 0.5)])
def test_the_mixture_is_of_probabilities(a, b):
    ce, kd = drawn(N, C, seed=6).double(), drawn(N, C, seed=7).double()
    plain = a * torch.softmax(ce, 1) + (1 - a) * torch.softmax(kd / b, 1)
    assert torch.allclose(mixed_heads(ce, kd, a, b).exp(), plain, rtol=1e-12)


def test_the_ends_of_the_mixture_are_single_heads():
    ce, kd = drawn(N, C, seed=6), drawn(N, C, seed=7)
    assert torch.equal(mixed_heads(ce, kd, 1.0, 3.0), functional.log_softmax(ce, 1))
    assert torch.equal(mixed_heads(ce, kd, 0.0, 3.0), functional.log_softmax(kd / 3, 1))
    # Where a head is sure beyond what a float holds, the other still counts.
    sure = torch.tensor([[500.0, -500.0]])
    assert torch.isfinite(mixed_heads(sure, -sure, 0.5, 1.0)).all()


def test_the_predictor_shows_the_mixture_and_either_head_by_one_pass():
    net, head = network(), linear()
    predict = dual(net, head, "fc1", 0.3, 2.0)
    found = predict(X)
    assert set(found) == {"personal", "ce_head", "kd_head"}
    assert torch.equal(found["kd_head"], net(X))
    assert torch.equal(found["ce_head"], head(net.features(X, "fc1")))
    assert torch.equal(found["personal"], mixed_heads(found["ce_head"], net(X), 0.3, 2.0))
    assert torch.allclose(found["personal"], answers(net, head, "fc1", X, 0.3, 2.0))
    rules = {dual(net, head, "fc1", a, b).rule for a, b in ((0.3, 2.0), (0.3, 1.0), (0.5, 2.0))}
    assert len(rules) == 3, "what is kept of one mixture must not be taken for another's"


@pytest.mark.parametrize(("mix", "head"), [(1.0, "ce_head"), (0.0, "kd_head")])
def test_a_share_of_one_or_none_judges_by_one_head(mix, head, tiny, play):
    run = played(tiny, play, {"mix": mix})
    assert np.allclose(judged(run, "personal"), judged(run, head), rtol=1e-5)
    assert judged(run, "ce_head") != judged(run, "kd_head")


# The loss.


def test_two_heads_that_are_one_have_the_loss_of_one_head():
    """Tied heads: the gradient is that of ``l CE + (1 - l) KD`` of a plain network."""
    net = network()
    tied = BlockNet({"hidden": nn.Identity()}, net.get_submodule("head"))
    distil = Distil(KL, SampleTargets(SOFT), T, 0.7)
    gradients = []
    for labels in (Labelled(tied, "fc1", 0.3), Supervised(0.3)):
        terms, seen = [labels, distil], batch(net)
        total = sum(term.weight * term.mean(seen) for term in terms)
        gradients.append(torch.autograd.grad(total, list(net.parameters())))
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)
        assert one.abs().max() > 1e-3


def test_labels_move_their_own_head_and_soft_targets_the_other():
    net, head = network(), linear()
    before = copy.deepcopy((net.state_dict(), head.state_dict()))
    data, once = Split(X, Y), Training(steps=1, batch_size=N, lr=0.5)
    fit(net, data, [Labelled(head, "fc1", 1.0)], once, 0.5, Rng(0))
    assert torch.equal(net.state_dict()["head.weight"], before[0]["head.weight"])
    assert not torch.equal(head.state_dict()["head.weight"], before[1]["head.weight"])
    assert not torch.equal(net.state_dict()["fc1.0.weight"], before[0]["fc1.0.weight"])
    kept = copy.deepcopy(head.state_dict())
    fit(net, data, [on_pool(net)], once, 0.5, Rng(0))
    assert torch.equal(head.state_dict()["head.weight"], kept["head.weight"])
    assert not torch.equal(net.state_dict()["head.weight"], before[0]["head.weight"])


def test_a_pass_through_the_pool_asks_for_each_example_once():
    net = network()
    term, found = on_pool(net), []
    sizes = [5, 5, 2, 5]
    for size in sizes:
        found.append(term(batch(net)).item() * size)
    whole = KL(net(X), SOFT, T).sum().item()
    assert sum(found[:3]) == pytest.approx(whole, rel=1e-5)
    assert found[3] != pytest.approx(found[0], rel=1e-6), "the next pass has another order"
    again = on_pool(net)
    assert [again(batch(net)).item() * s for s in sizes] == found


def test_the_pool_is_not_what_a_batch_holds():
    net = network()
    nobody = Batch(X[:0], Y[:0], torch.arange(0), X.new_zeros(0, 0), {})
    one, two = on_pool(net), on_pool(net)
    assert torch.equal(one(nobody), two(batch(net)))
    assert one.dp == "weights-only"
    coupled = on_pool(net, objective=Sinkhorn())
    assert coupled.dp == "weights-only", "what mixes public examples reads no private one"
    assert torch.isfinite(coupled(nobody))
    twin = copy.deepcopy(one)
    assert torch.equal(one(nobody), twin(nobody)), "a copy goes on where the term was"


def test_policies_lead_what_is_learned_on_the_pool():
    net = network()
    policy = chosen_policy({"name": "temperature", "start": 8.0})
    guided = on_pool(net, guide=Guide((policy,), 0.0, 1.0, 4))
    plain = on_pool(net)
    assert guided(batch(net)).item() != pytest.approx(plain(batch(net)).item(), rel=1e-3)


# Who teaches, and when.


def losses(run, name, round_):
    return np.flatnonzero(~np.isnan(run.log.by_client(f"loss/{name}", "train", round_))).tolist()


def test_a_head_teaches_once_it_has_seen_labels(tiny, play, monkeypatch):
    from fedkd.clients.participation import Participation

    plan = {1: [0, 1], 2: [1, 2], 3: [0, 2, 3]}
    monkeypatch.setattr(Participation, "cohort", lambda self, seed, round_, clients: plan[round_])
    run = played(tiny, play, changes={"rounds": 3})
    assert [losses(run, "distil", r) for r in (1, 2, 3)] == [[], [1], [0, 2]]
    # The consensus of those who were there a round ago is for whoever comes.
    assert [losses(run, "pool_distil", r) for r in (1, 2, 3)] == [[], [1, 2], [0, 2, 3]]


def test_the_consensus_is_the_mean_of_what_clients_predict(tiny, play, monkeypatch):
    kind, seen = strategies.get("dho"), []
    fuse = kind.aggregate

    def spy(self, state, uploads, round_, setting):
        seen.append([u.arrays["soft_labels/scores"] for u in uploads])
        return fuse(self, state, uploads, round_, setting)

    monkeypatch.setattr(kind, "aggregate", spy)
    run = play(tiny({"name": "dho", "subset": 16}, SHORT), rounds=1)
    (said,) = seen
    assert run.state["consensus/scores"].shape == (16, 10)
    assert np.allclose(run.state["consensus/scores"], np.mean(said, axis=0), atol=1e-6)
    assert all(np.allclose(scores.sum(1), 1, atol=1e-5) for scores in said)
    assert run.state["consensus/round"].tolist() == [2]
    strategy, setting = run.prepared.strategy, run.prepared.setting
    info = setting.clients[0]
    assert "soft_labels/consensus" in strategy.broadcast(run.state, info, 2, setting)
    assert "soft_labels/consensus" not in strategy.broadcast(run.state, info, 3, setting)


@pytest.mark.parametrize("supervised_head", ["personal", "averaged"])
def test_without_a_pool_a_client_teaches_itself(supervised_head, tiny, play):
    alone = {"teacher": "composite", "supervised_head": supervised_head}
    run = played(tiny, play, alone, {"data.public.size": 0})
    assert losses(run, "distil", 2) == [0, 1, 2, 3]
    assert losses(run, "pool_distil", 2) == []
    with_pool = played(tiny, play, alone, {"data.public.size": 40})
    assert losses(with_pool, "pool_distil", 2) == [0, 1, 2, 3]
    assert "soft_labels" not in with_pool.ledger.totals().tensors


@pytest.fixture(scope="module")
def usual(tiny, play):
    """The global network after two rounds of the defaults."""
    return select(played(tiny, play, None, FEW).state, "model")


@pytest.mark.parametrize(
    "options",
    [
        {"lam": 0.9},
        {"labelled_weight": 0},
        {"unlabelled_weight": 0},
        {"teacher": "composite"},
        {"supervised_head": "averaged"},
        {"objective": "reverse-kl"},
        {"policies": ["confidence-gate"]},
        {"temperature": 1.0},
        {"teacher_mix": 0.9},
        {"subset": 16},
        {"pool_batch_size": 5},
    ],
    ids=lambda o: next(iter(o)),
)
def test_every_option_matters(options, tiny, play, usual):
    other = select(played(tiny, play, options, FEW).state, "model")
    assert any(usual[key].tobytes() != other[key].tobytes() for key in usual)


def test_how_heads_are_mixed_in_predictions_changes_no_training(tiny, play, bits):
    one, other = (played(tiny, play, o, FEW) for o in ({}, {"mix": 0.9, "sharpness": 0.5}))
    assert bits(one) == bits(other)
    assert judged(one, "personal") != judged(other, "personal")
    assert judged(one, "kd_head") == judged(other, "kd_head")


# Limits.


def test_labels_alone_leave_the_distilled_head_as_it_was(tiny, play):
    options = {"name": "dho", "lam": 1.0}
    run = play(tiny(options, SHORT))
    assert not run.prepared.strategy.needs_public()
    fresh = run.prepared.setting.book.initial(run.prepared.setting.clients[0].model)
    model = select(run.state, "model")
    for key, value in model.items():
        assert (value.tobytes() == fresh[key].tobytes()) is key.startswith("head."), key
    assert set(run.ledger.totals().tensors) == {"model"}
    assert {r.metric for r in run.log.records if r.metric.startswith("loss/")} == {
        "loss/supervised"
    }


def test_a_personal_head_stays_where_it_is(tiny, play):
    run = played(tiny, play)
    assert set(run.ledger.totals(phase="train", direction="up").tensors) == {"model", "soft_labels"}
    assert not any(key.startswith(("head/", "global_head/")) for key in run.state)
    kept = [select(run.client_state(k), "head/fc2") for k in range(4)]
    assert all(set(head) == {"head.weight", "head.bias"} for head in kept)
    assert kept[0]["head.weight"].tobytes() != kept[1]["head.weight"].tobytes()


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_an_averaged_head_is_averaged_as_the_blocks_are(weighting, tiny, play):
    options = {"name": "dho", "supervised_head": "averaged", "weighting": weighting}
    run = play(tiny(options, SHORT), rounds=1)
    with in_process():
        replies = run.grid.send_and_receive(run.strategy.train_messages(2, run.state, run.grid))
    strategy, setting = run.prepared.strategy, run.prepared.setting
    uploads = []
    aggregate = type(strategy).aggregate
    with pytest.MonkeyPatch.context() as patch:

        def spy(self, state, given, round_, setting):
            uploads.extend(given)
            return aggregate(self, state, given, round_, setting)

        patch.setattr(type(strategy), "aggregate", spy)
        state = run.strategy.fold_train(2, run.state, replies).state
    weights = [u.client.examples if weighting == "examples" else 1 for u in uploads]
    for key in ("global_head/fc2/head.weight", "model/head.weight"):
        mean = np.average([u.arrays[key] for u in uploads], axis=0, weights=weights)
        assert np.allclose(state[key], mean, atol=1e-6), key
        assert state[key].tobytes() != run.state[key].tobytes()
    sent = strategy.broadcast(state, setting.clients[0], 3, setting)
    assert "global_head/fc2/head.weight" in sent
    assert not any(k.startswith("head/") for k in run.client_state(0))


# What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labelled_weight": 0, "unlabelled_weight": 0}, "distilled head would learn nothing"),
        ({"labelled_weight": 0, "teacher": "composite"}, "distilled head would learn nothing"),
        ({"lam": 1.0, "mix": 0.0}, "leaves the distilled head as it was drawn"),
        ({"objective": "lk"}, "strategy.objective: .*did you mean 'kl'"),
        ({"policies": ["tiad"]}, "strategy.policies: .*did you mean 'taid'"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message, tiny):
    with pytest.raises(ConfigError, match=message):
        prepare(tiny({"name": "dho", **options}))


def test_the_ensemble_needs_a_pool(tiny):
    with pytest.raises(ConfigError, match=r"set data\.public\.size"):
        prepare(tiny("dho", {"data.public.size": 0}))
    for options in ({"teacher": "composite"}, {"unlabelled_weight": 0}, {"lam": 1.0}):
        prepare(tiny({"name": "dho", **options}, {"data.public.size": 0}))


def test_a_loss_without_labels_is_refused():
    with pytest.raises(ConfigError, match="lam"):
        build(strategies.get("dho"), {"lam": 0.0}, "strategy")


def test_what_mixes_private_examples_is_refused_and_what_mixes_public_ones_is_not(tiny, play):
    private = {"privacy.unit": "example", "privacy.noise_multiplier": 1.0, "privacy.delta": 1e-4}
    with pytest.raises(ConfigError, match="clipping each example's gradient bounds nothing"):
        prepare(tiny({"name": "dho", "objective": "sinkd"}, private))
    public = {"name": "dho", "objective": "sinkd", "labelled_weight": 0}
    run = play(tiny(public, {**FEW, **private}))
    assert losses(run, "pool_distil", 2) == [0, 1]
    assert all(np.isfinite(value).all() for value in run.state.values())
    led = make_strategy(tiny({**public, "policies": ["ctkd"]}).strategy)
    assert any("'ctkd'" in why for why in led.coupled())
    assert make_strategy(tiny(public).strategy).coupled() == []
