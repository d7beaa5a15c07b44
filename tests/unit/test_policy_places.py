"""Where policies and branches may be used, and what is refused there before a run begins."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from fedkd.audit.finished import Finished
from fedkd.clients.agreeing import _pairs
from fedkd.clients.bilevel import Unrolled
from fedkd.clients.guided import guide
from fedkd.clients.heads import Weighted
from fedkd.clients.local import Occasion
from fedkd.clients.terms import Branch, Distil
from fedkd.clients.training import Training
from fedkd.clients.transfer import transfer
from fedkd.data.federated import Split
from fedkd.distill.chosen import chosen, learns
from fedkd.distill.targets import SampleTargets
from fedkd.engine.setup import prepare
from fedkd.engine.simulate import in_process
from fedkd.errors import ConfigError
from fedkd.models.base import BlockNet
from fedkd.models.gpt import CausalAttention
from fedkd.rng import Rng
from fedkd.strategies.reinforcement import Packing
from fedkd.types import prefixed

N, CLASSES = 8, 4
PRIVATE = {"privacy.unit": "example", "privacy.noise_multiplier": 1.0, "privacy.delta": 1e-5}
TEXT = {
    "model": {"name": "gpt-tiny", "width": 8, "depth": 1, "heads": 2, "hidden": 8},
    "data.source": {"name": "pydoc-topics", "topics": 3, "rows_per_topic": 8, "length": 16},
    "data.partition": "natural",
    "clients.count": 3,
}
BRANCHING = {"name": "ofa", "branches": ["all"]}
FEDMD = {"name": "fedmd", "digest_loss": "kl"}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=Rng(seed).torch())


def network(first=None):
    net = BlockNet({"fc1": first or nn.Linear(4, 6)}, nn.Linear(6, CLASSES))
    for i, p in enumerate(net.parameters()):
        p.data.copy_(drawn(*p.shape, seed=20 + i) / 2)
    return net


DATA = Split(drawn(N, 4, seed=1), torch.arange(N) % CLASSES)
SOFT = torch.softmax(drawn(N, CLASSES, seed=2), 1)


@pytest.mark.parametrize(
    ("strategy", "changes", "said"),
    [
        ({"name": "fedgkd"}, {"data.validation": 0.0}, "data.validation = 0 no client has any"),
        ({"name": "fedgkd", "objective": "sinkd"}, {}, "'sinkd' cannot be differentiated again"),
        ({"name": "ds-fl"}, {}, "validation examples, which there are not where"),
        ({"name": "dho"}, {}, "validation examples, which there are not where"),
        ({"name": "fml"}, {}, "validation examples, which there are not where"),
        ({"name": "fedhkd"}, {}, "validation examples, which there are not where"),
        ({"name": "fedgen", "beta": 1.0}, {}, "validation examples, which there are not where"),
        (FEDMD, PRIVATE, "validation examples, which no accountant counts"),
    ],
)
def test_a_ratio_is_refused_where_it_could_not_learn_or_learns_from_what_nobody_counts(
    strategy, changes, said, tiny
):
    with pytest.raises(ConfigError, match=said):
        prepare(tiny({**strategy, "policies": ["tgeo"]}, changes))


@pytest.mark.parametrize(
    "strategy",
    [FEDMD, {"name": "ds-fl", "server_epochs": 0}, {"name": "dho", "unlabelled_weight": 0.0}],
    ids=lambda s: s["name"],
)
def test_a_ratio_is_allowed_where_it_learns(strategy, tiny):
    with in_process():
        assert prepare(tiny({**strategy, "policies": ["tgeo"]})).strategy.policies


def test_what_is_trained_gets_no_noise_for_nobody_also_if_it_is_made_later(tiny):
    assert [learns(p) for p in ("meal", "mst", "tgeo", "ctkd", "taid")] == [True] * 4 + [False]
    with pytest.raises(ConfigError, match="'meal' is trained along"):
        prepare(tiny({"name": "fedhkd", "policies": ["meal"]}, PRIVATE))


def test_branches_of_text_are_refused(tiny):
    with pytest.raises(ConfigError, match="taught token by token; leave branches out"):
        prepare(tiny({"name": "fedgkd", "objective": BRANCHING}, TEXT))
    with in_process():
        prepare(tiny({"name": "fedgkd", "objective": "ofa"}, TEXT))


def test_weights_of_examples_hide_nothing_of_the_term_inside():
    weights = torch.linspace(0.5, 1.5, N)
    by = guide(["meal"], 1, 1, 4)
    training = Training(steps=4, batch_size=4)
    options = {"temperature": 1.0, "training": training, "rng": Rng(3), "weights": weights}
    net = network()
    transfer(net, DATA.x, SOFT, objective=chosen("kl"), guide=by, **options)
    assert by.step == 4 and by.policies[0].arrays()
    inside = Distil(chosen(BRANCHING), SampleTargets(SOFT), 1.0, 1.0)
    first, branch = Weighted(inside, weights).placed(Occasion(net, DATA, 0.1, Rng(3)))
    assert first.term is inside and isinstance(branch.term, Branch)
    state = {}
    branch.keep(state)
    assert any(key.startswith("branch/fc1/") for key in state)
    told = []
    inside.begins = lambda: told.append(1)
    first.begins()
    assert told == [1]


def test_looking_a_step_ahead_leaves_running_means_alone():
    net = network(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))).train()
    before = {k: b.clone() for k, b in net.named_buffers()}
    Unrolled(Occasion(net, DATA, 0.1, Rng(3)), DATA).slopes(torch.arange(N), SOFT)
    assert before and all(torch.equal(before[k], b) for k, b in net.named_buffers())


def test_looking_a_step_ahead_goes_through_fused_attention():
    net = BlockNet({"read": CausalAttention(4, 2)}, nn.Linear(4, CLASSES))
    for i, p in enumerate(net.parameters()):
        p.data.copy_(drawn(*p.shape, seed=20 + i) / 2)
    rows = Split(drawn(N, 3, 4, seed=1), torch.arange(3 * N).view(N, 3) % CLASSES)
    r = drawn(3 * N, CLASSES, seed=5)
    found = Unrolled(Occasion(net, rows, 0.1, Rng(3)), rows).slopes(torch.arange(N), r)
    assert found.shape == r.shape and torch.isfinite(found).all() and found.any()


def test_of_text_no_more_tokens_are_compared_than_asked_for(monkeypatch):
    monkeypatch.setattr("fedkd.clients.agreeing.MOST", 6)
    net = BlockNet({"fc1": nn.Linear(4, 4)}, nn.Linear(4, CLASSES))
    data = Split(drawn(9, 3, 4, seed=1), torch.zeros(9, 3, dtype=torch.long))
    term = Distil(chosen("kl"), SampleTargets(torch.full((9, 3, CLASSES), 0.25)), 1.0, 1.0)
    pairs = _pairs(net, data, [term])[""]
    assert sum(len(student) for student, _ in pairs) == 6


@pytest.mark.parametrize("rest", ["smooth", "renormalise"])
def test_an_audit_reads_a_list_of_the_likeliest_classes_by_class(rest):
    packing = Packing(k=2, rest=rest)
    arrays = packing.packed(np.array([[0.1, 0.2, 0.7], [0.5, 0.4, 0.1]], dtype=np.float32))
    task = SimpleNamespace(classes=3)
    book = SimpleNamespace(labels=[])
    prepared = SimpleNamespace(
        setting=SimpleNamespace(task=task, book=book), strategy=SimpleNamespace(packing=packing)
    )
    made = Finished(None, prepared, 1, {}, {}, {})
    (found,) = made._knowledge(prefixed("soft_labels/consensus", arrays))
    rows = found.reshape(2, 3)
    assert rows.argsort(1)[:, ::-1][:, :2].tolist() == [[2, 1], [0, 1]]
    assert np.allclose(rows.sum(1), 1, atol=1e-6)
