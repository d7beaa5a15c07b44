"""How a student and what it was taught agree, as it is measured once after the last fit."""

import pytest
import torch
from torch import nn

from fedkd.clients import agreeing
from fedkd.clients.agreeing import agreement
from fedkd.clients.heads import Weighted
from fedkd.clients.terms import Distil, Supervised
from fedkd.clients.training import Training
from fedkd.clients.transfer import agreed, transfer
from fedkd.data.federated import Split
from fedkd.distill.objectives.kl import KullbackLeibler
from fedkd.distill.targets import ClassTargets, SampleTargets
from fedkd.metrics import agreement as meters
from fedkd.models.base import BlockNet
from fedkd.rng import Rng

N, CLASSES = 30, 4
KL = KullbackLeibler()


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=Rng(seed).torch())


DATA = Split(drawn(N, 5, seed=1), torch.arange(N) % CLASSES)
SOFT = torch.softmax(drawn(N, CLASSES, seed=2), 1)


def network():
    net = BlockNet({"fc1": nn.Linear(5, 6)}, nn.Linear(6, CLASSES))
    for i, p in enumerate(net.parameters()):
        p.data.copy_(drawn(*p.shape, seed=20 + i))
    return net


@pytest.mark.parametrize("chunk", [7, 100])
def test_it_is_what_the_meters_say_of_student_and_targets(chunk, monkeypatch):
    net = network()
    monkeypatch.setattr(agreeing, "rows_at_once", lambda x: chunk)
    found = agreement(net, DATA, [Supervised(), Distil(KL, SampleTargets(SOFT), 2.0, 0.5)])
    student = torch.softmax(net(DATA.x).detach() / 2, 1).double().numpy()
    student /= student.sum(1, keepdims=True)
    teacher = SOFT.double().numpy()
    teacher = teacher / teacher.sum(1, keepdims=True)
    assert found == {
        "agreement/top1": pytest.approx(meters.top1_agreement(teacher, student)),
        "agreement/kl": pytest.approx(meters.mean_kl(teacher, student), rel=1e-5),
        "agreement/tau": pytest.approx(meters.mean_kendall_tau(teacher, student)),
        "agreement/loyalty": pytest.approx(meters.probability_loyalty(teacher, student), rel=1e-5),
        "agreement/cka": pytest.approx(meters.linear_cka(teacher, student), rel=1e-5),
    }


def test_a_student_that_says_what_it_is_taught_agrees_wholly():
    net = network()
    own = torch.softmax(net(DATA.x).detach() / 3, 1)
    found = agreement(net, DATA, [Distil(KL, SampleTargets(own), 3.0, 1.0)])
    assert found["agreement/top1"] == found["agreement/tau"] == 1.0
    assert found["agreement/kl"] == pytest.approx(0, abs=1e-6)
    assert found["agreement/cka"] == pytest.approx(1, abs=1e-6)


def test_only_examples_with_a_target_count_and_a_head_is_told_apart():
    net, head = network(), nn.Linear(6, CLASSES)
    mask = torch.tensor([True, False, False, False])
    table = torch.softmax(drawn(CLASSES, CLASSES, seed=5), 1)
    main = Distil(KL, ClassTargets(table, mask), 1.0, 1.0)
    inner = Distil(KL, SampleTargets(SOFT), 1.0, 1.0, head, "fc1")
    found = agreement(net, DATA, [main, inner])
    some = DATA.y == 0
    student = net(DATA.x).detach()[some].argmax(1)
    same = (student == table[0].argmax()).double().mean().item()
    assert found["agreement/top1"] == pytest.approx(same)
    # One target for all of them: there is nothing that an alignment could be of.
    assert "agreement/cka" not in found
    assert {name for name in found if name.endswith("@fc1")} == {
        f"agreement/{name}@fc1" for name in ("top1", "kl", "tau", "loyalty", "cka")
    }


def test_who_was_taught_nothing_says_nothing():
    nobody = Distil(KL, ClassTargets(torch.eye(CLASSES), torch.zeros(CLASSES).bool()), 1.0, 1.0)
    assert agreement(network(), DATA, [Supervised()]) == {}
    assert agreement(network(), DATA, [nobody]) == {}
    empty = Split(DATA.x[:0], DATA.y[:0])
    assert agreement(network(), empty, [Distil(KL, SampleTargets(SOFT), 1.0, 1.0)]) == {}


@pytest.mark.parametrize("row", [[0.0] * 4, [1.2, -0.2, 0.0, 0.0], [float("nan")] * 4])
def test_a_measurement_ends_no_run(row):
    """Targets of a method that somebody adds may be no distributions."""
    odd = SOFT.clone()
    odd[3] = torch.tensor(row)
    assert agreement(network(), DATA, [Distil(KL, SampleTargets(odd), 1.0, 1.0)]) == {}


def test_many_examples_are_looked_at_evenly(monkeypatch):
    seen = []
    monkeypatch.setattr(agreeing, "MOST", 10)
    monkeypatch.setattr(agreeing, "_measured", lambda s, t: seen.append(t) or {})
    agreement(network(), DATA, [Distil(KL, SampleTargets(SOFT), 1.0, 1.0)])
    assert torch.equal(seen[0].float(), SOFT[::3])


def test_text_is_compared_token_by_token():
    class Words(BlockNet):
        def forward(self, x):
            return nn.functional.one_hot(x, CLASSES).float() * 3

    x = torch.tensor([[0, 1, 2], [3, 0, 1]])
    y = torch.tensor([[1, 2, -1], [0, 1, -1]])
    soft = torch.softmax(nn.functional.one_hot(x, CLASSES).float() * 3, -1)
    soft[0, 0] = soft[0, 0].roll(1)
    term = Distil(KL, SampleTargets(soft), 1.0, 1.0)
    found = agreement(Words({"none": nn.Identity()}, nn.Identity()), Split(x, y), [term])
    assert found["agreement/top1"] == 0.75


def test_a_server_says_it_of_its_students_by_name_where_it_is_asked():
    kept = {}
    for measure in (False, True):
        net = network()
        kept[measure] = (
            net,
            transfer(
                net,
                DATA.x,
                SOFT,
                objective=KL,
                temperature=1.0,
                training=Training(steps=3, batch_size=10, lr=0.1),
                rng=Rng(1),
                weights=torch.linspace(0.5, 1.5, N),
                measure=measure,
            ),
        )
    (without, plain), (student, result) = kept.values()
    assert plain.agreement == {} and result.losses == plain.losses
    assert all(map(torch.equal, without.parameters(), student.parameters()))
    again = agreement(student, DATA, [Weighted(Distil(KL, SampleTargets(SOFT), 1.0, 1.0), SOFT)])
    assert result.agreement == again
    assert agreed(result, "mlp")["server/agreement/top1/mlp"] == again["agreement/top1"]
