"""Branches at inner blocks: who is taught there, by what, and what of it is kept."""

import pytest
import torch
from torch import nn

from fedkd.clients.local import Batch, Occasion, fit
from fedkd.clients.terms import Branch, Distil
from fedkd.clients.training import Training
from fedkd.data.federated import Split
from fedkd.distill.chosen import chosen, problems_of
from fedkd.distill.objectives.soft_ce import SoftCrossEntropy
from fedkd.distill.targets import SampleTargets
from fedkd.errors import ConfigError
from fedkd.models.base import BlockNet
from fedkd.rng import Rng
from fedkd.types import Arrays

N, CLASSES = 12, 3


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=Rng(seed).torch())


DATA = Split(drawn(N, 4, seed=1), torch.arange(N) % CLASSES)
SOFT = torch.softmax(drawn(N, CLASSES, seed=2), 1)


def network():
    net = BlockNet({"fc1": nn.Linear(4, 5), "fc2": nn.Linear(5, 6)}, nn.Linear(6, CLASSES))
    for i, p in enumerate(net.parameters()):
        p.data.copy_(drawn(*p.shape, seed=20 + i))
    return net


def ready(net, state: Arrays | None = None, **options):
    term = Distil(chosen({"name": "ofa", **options}), SampleTargets(SOFT), 2.0, 0.5)
    return list(term.placed(Occasion(net, DATA, 0.1, Rng(7), state or {})))


def test_without_branches_there_is_the_term_alone():
    net = network()
    assert len(ready(net)) == 1
    plain = Distil(SoftCrossEntropy(), SampleTargets(SOFT), 2.0, 0.5)
    assert list(plain.placed(Occasion(net, DATA, 0.1, Rng(7)))) == [plain]


def test_a_branch_at_gamma_1_is_soft_cross_entropy_of_its_head_and_reaches_what_lies_below():
    net = network()
    options = {"branches": ("fc1",), "branch_gamma": 1.0, "branch_weight": 3.0, "gamma": 2.0}
    main, branch = ready(net, **options)
    assert isinstance(branch, Branch) and branch.weight == 1.5 and branch.at() == {"fc1"}
    assert main.objective.gamma == 2.0 and branch.objective.gamma == 1.0
    logits, features = net.forward_with_features(DATA.x, ["fc1"])
    batch = Batch(DATA.x, DATA.y, torch.arange(N), logits, features)
    values = branch(batch)
    assert torch.equal(values, SoftCrossEntropy()(branch.head(features["fc1"]), SOFT, 2.0))
    (below,) = torch.autograd.grad(values.sum(), net.get_submodule("fc1").weight, retain_graph=True)
    assert below.any()
    above = torch.autograd.grad(values.sum(), net.get_submodule("fc2").weight, allow_unused=True)
    assert above == (None,)


def test_all_blocks_but_the_head_are_meant_by_all_and_a_wrong_one_is_named():
    found = ready(network(), branches=("all",), branch_hidden=0)
    assert [term.block for term in found[1:]] == ["fc1", "fc2"]
    assert sum(p.numel() for p in found[2].head.parameters()) == 6 * CLASSES + CLASSES
    with pytest.raises(ConfigError, match=r"unknown block 'fc3'; did you mean 'fc[12]'"):
        ready(network(), branches=("fc3",))


def test_heads_learn_along_are_kept_and_go_on():
    net, state = network(), {}
    terms = ready(net, branches=("fc2",))
    before = [p.detach().clone() for p in terms[1].head.parameters()]
    result = fit(net, DATA, terms, Training(steps=4, batch_size=6), 0.1, Rng(3))
    assert result.losses["branch"] > 0
    for term in terms:
        term.keep(state)
    assert {key.split("/")[:2][1] for key in state} == {"fc2"}
    _, again = ready(net, state, branches=("fc2",))
    both = zip(before, terms[1].head.parameters(), again.head.parameters(), strict=True)
    for old, kept, new in both:
        assert not torch.equal(old, kept) and torch.equal(kept, new)


def test_a_head_of_a_cut_gets_no_branches_of_its_own():
    head = nn.Linear(5, CLASSES)
    objective = chosen({"name": "ofa", "branches": ["all"]})
    term = Distil(objective, SampleTargets(SOFT), 2.0, 0.5, head, "fc1")
    assert list(term.placed(Occasion(network(), DATA, 0.1, Rng(7)))) == [term]


def test_branches_are_refused_where_no_inner_blocks_are_taught():
    named = {"name": "ofa", "branches": ["all"]}
    assert problems_of(named) == [] == problems_of("ofa", offers=())
    (said,) = problems_of(named, offers=["validation"])
    assert "strategy.objective = 'ofa' has branches" in said
