"""Class knowledge: what is said, remembered, fused and taught, and the terms that learn from it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from fedkd.clients.class_terms import FeatureMatch, HeadOnClasses, head_inputs
from fedkd.clients.local import Batch
from fedkd.data.federated import Split
from fedkd.distill.fusion import ClassTable, fuse_classes
from fedkd.distill.objectives.kl import KullbackLeibler
from fedkd.distill.targets import ClassTargets
from fedkd.engine.setup import prepare
from fedkd.errors import ConfigError
from fedkd.models.base import BlockNet, build
from fedkd.rng import Rng
from fedkd.strategies.class_exchange import lesson, remember, summarise, tables, targets
from fedkd.strategies.fedproto import FAR, nearest
from fedkd.types import ClientInfo, Task, Upload, kind_of, prefixed

CLASSES = 3


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=Rng(seed).torch())


def upload(k, labels, rows):
    arrays = {"labels": np.int32(labels), "probs": np.float32(rows)}
    return Upload(client=ClientInfo(id=k, examples=9, model="mlp"), arrays=prefixed("said", arrays))


def silent(k):
    return Upload(client=ClientInfo(id=k, examples=0, model="mlp"), arrays={})


def test_a_client_says_means_by_class_and_its_numbers_only_where_asked():
    values = {"probs": torch.tensor([[1.0, 3.0], [3.0, 5.0], [7.0, 7.0]])}

    def client(y):
        return SimpleNamespace(data=SimpleNamespace(train=Split(y, y)), release=None)

    held = client(torch.tensor([2, 2, 0]))
    plain, counted = summarise(held, values, False), summarise(held, values, True)
    assert plain["labels"].tolist() == [0, 2]
    assert plain["probs"].tolist() == [[7.0, 7.0], [2.0, 4.0]]
    assert set(plain) == {"labels", "probs"}
    assert counted["counts"].tolist() == [1, 2]
    assert summarise(client(torch.tensor([], dtype=torch.long)), values, True) == {}


def test_the_server_remembers_one_table_a_client():
    state = remember(
        {}, [upload(4, [0, 1], [[1, 0], [0, 1]]), upload(7, [1], [[0.5, 0.5]])], "said"
    )
    state = remember(state, [upload(4, [1], [[0.2, 0.8]]), silent(7)], "said")
    said = tables(state, "probs")
    assert list(said) == [4, 7]
    assert said[4].labels.tolist() == [1]
    assert said[7].probs.tolist() == [[0.5, 0.5]]
    assert said[7].counts.tolist() == [1]
    assert {kind_of(key) for key in state} == {"buffer"}


def test_a_client_whose_number_begins_like_anothers_is_not_forgotten():
    state = remember({}, [upload(1, [0], [[1, 0]]), upload(10, [1], [[0, 1]])], "said")
    state = remember(state, [upload(1, [1], [[0, 1]])], "said")
    assert list(tables(state, "probs")) == [1, 10]


def test_nobodys_class_is_not_taught_and_nobody_dilutes():
    said = {0: ClassTable(np.int32([0]), np.float32([[1, 0, 0]]), np.int32([5]))}
    said[1] = ClassTable(np.int32([0, 2]), np.float32([[0, 1, 0], [0, 0, 1]]), np.int32([1, 1]))
    said[2] = ClassTable(np.int32([]), np.zeros((0, 3), np.float32), np.int32([]))
    everybody = lesson(said, "probs", CLASSES, "uniform")
    assert everybody["labels"].tolist() == [0, 2]
    assert everybody["probs"].tolist() == [[0.5, 0.5, 0], [0, 0, 1]]
    assert lesson(said, "probs", CLASSES, "examples")["probs"][0].tolist() == pytest.approx(
        [5 / 6, 1 / 6, 0]
    )
    assert lesson(said, "probs", CLASSES, "uniform", leave_out=1)["labels"].tolist() == [0]
    alone = {0: said[0]}
    assert lesson(alone, "probs", CLASSES, "uniform", leave_out=0) == {}
    assert lesson({}, "probs", CLASSES, "uniform") == {}


def test_features_of_any_width_are_fused_and_names_of_clients_do_not_matter():
    rows = Rng(1).numpy().normal(size=(4, CLASSES, 7)).astype(np.float32)
    labels, counts = np.arange(CLASSES, dtype=np.int32), np.int32([3, 1, 2])
    one = {k: ClassTable(labels, rows[k], counts * (k + 1)) for k in range(4)}
    other = {k: one[(k + 2) % 4] for k in range(4)}
    fused, mask = fuse_classes(one, CLASSES, weighting="examples")
    assert fused.shape == (CLASSES, 7)
    assert mask.all()
    assert np.allclose(fused, np.average(rows, axis=0, weights=[1, 2, 3, 4]), atol=1e-6)
    renamed, _ = fuse_classes(other, CLASSES, weighting="examples")
    assert np.allclose(fused, renamed, atol=1e-6)


def test_a_lesson_becomes_targets_with_the_rest_masked():
    taught = {"labels": np.int32([2, 0]), "features": np.float32([[1, 2], [3, 4]])}
    made = targets(taught, "features", CLASSES)
    assert made.probs.tolist() == [[3, 4], [0, 0], [1, 2]]
    assert made.mask.tolist() == [True, False, True]


def network():
    return BlockNet({"fc1": nn.Linear(4, 5), "fc2": nn.Linear(5, 6)}, nn.Linear(6, CLASSES))


def batch_of(net, at, n=9):
    x = drawn(n, 4)
    logits, features = net.forward_with_features(x, at)
    return Batch(x, torch.arange(n) % CLASSES, torch.arange(n), logits, features)


def test_features_are_pulled_to_their_class_and_absent_classes_pull_nobody():
    net = network()
    batch = batch_of(net, ("fc2",))
    rows = drawn(CLASSES, 6, seed=1).requires_grad_()
    term = FeatureMatch(ClassTargets(rows, torch.tensor([True, False, True])), "fc2", 1.0)
    assert term.at() == {"fc2"}
    h, values = batch.features["fc2"], term(batch)
    (grad,) = torch.autograd.grad(values.mean(), h)
    for i, label in enumerate(batch.y.tolist()):
        difference = (h[i] - rows[label]).detach()
        known = label != 1
        assert values[i].item() == pytest.approx(float((difference**2).mean()) * known, rel=1e-5)
        assert torch.allclose(grad[i], 2 * difference / 6 / 9 * known, atol=1e-7)
    assert rows.grad is None


def test_the_head_alone_learns_from_global_features():
    net, temperature = network(), 2.0
    inputs, probs = drawn(2, 6, seed=2).requires_grad_(), torch.softmax(drawn(2, 3, seed=3), 1)
    term = HeadOnClasses(net.head, inputs, probs, KullbackLeibler(), temperature, 1.0)
    loss = term(batch_of(net, ()))
    z = net.head(inputs).detach().numpy().astype(np.float64) / temperature
    q = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    p = probs.numpy().astype(np.float64)
    assert loss.item() == pytest.approx(4 * (p * np.log(p / q)).sum(1).mean(), rel=1e-4)
    loss.backward()
    assert inputs.grad is None
    assert {n for n, w in net.named_parameters() if w.grad is not None} == {
        "head.weight",
        "head.bias",
    }


@pytest.mark.parametrize("name", ["mlp", "cnn", "lenet", "resnet8", "vit-tiny"])
def test_pooled_features_fit_every_models_head(name):
    task = Task(name="t", input_shape=(1, 28, 28), classes=5)
    net = build(name, {}, task, Rng(0))
    x = drawn(3, 1, 28, 28)
    logits, features = net.forward_with_features(x, (net.block_names[-1],))
    again = net.head(head_inputs(net, task, features[net.block_names[-1]]))
    assert again.shape == logits.shape
    exact = name in ("mlp", "cnn", "lenet")
    assert torch.allclose(again, logits, atol=1e-5) or not exact


def test_the_nearest_prototype_answers_and_unknown_classes_never_do():
    features, prototypes = drawn(6, 4), drawn(CLASSES, 4, seed=5)
    prototypes[1] = 0.0
    known = torch.tensor([True, False, True])
    scores = nearest(features, prototypes, known)
    distances = ((features[:, None] - prototypes) ** 2).sum(2)
    assert torch.allclose(scores[:, known], -distances[:, known], atol=1e-5)
    assert torch.equal(scores[:, 1], scores[:, known].amin(1) - FAR)
    naive = [min((0, 2), key=lambda c: float(distances[i, c])) for i in range(6)]
    assert scores.argmax(1).tolist() == naive


MIXED = [{"name": "mlp", "hidden": [16, 12]}, {"name": "mlp", "hidden": [10, 12]}]


@pytest.mark.parametrize(
    ("strategy", "models", "said"),
    [
        ({"name": "fedproto", "block": "fc3"}, None, r"strategy.block = 'fc3'.*allowed: fc1, fc2"),
        ({"name": "fedproto", "block": "head"}, None, "allowed: fc1, fc2"),
        ({"name": "fedproto", "block": "fc1"}, MIXED, r"differ in size \(mlp: 16, mlp#2: 10\)"),
        ({"name": "fd", "share_weights": True}, MIXED, "different architectures"),
        ("fedhkd", MIXED, "different architectures"),
        ({"name": "fd", "objective": "lk"}, None, "strategy.objective: .*did you mean 'kl'"),
        ({"name": "fedhkd", "objective": "lk"}, None, "strategy.objective: .*did you mean 'kl'"),
    ],
)
def test_what_cannot_work_is_refused_before_round_one(strategy, models, said, tiny):
    changes = {"clients.models": models} if models else {}
    with pytest.raises(ConfigError, match=said):
        prepare(tiny(strategy, changes))


@pytest.mark.parametrize("strategy", ["fd", "fedproto"])
def test_other_architectures_of_one_feature_size_learn_from_each_other(strategy, tiny, play):
    run = play(tiny(strategy, {"clients.models": MIXED, "rounds": 2}))
    alone = play(tiny("local-only", {"clients.models": MIXED, "rounds": 2}))
    for k in range(4):
        ours, theirs = (r.client_state(k)["model/head.weight"] for r in (run, alone))
        assert not np.array_equal(ours, theirs)
