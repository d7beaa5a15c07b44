"""Policies with networks of their own: routing over teachers, a discriminator, a learned ratio."""

import math

import pytest
import torch
from torch import nn

from fedkd.clients.guided import Guide, distil, guide
from fedkd.clients.local import Batch, Occasion, fit
from fedkd.clients.training import Training
from fedkd.data.federated import Split
from fedkd.distill.chosen import chosen_policy, mixing, problems_of, retempering
from fedkd.distill.objectives.kl import KullbackLeibler
from fedkd.distill.policies.base import Taught
from fedkd.distill.targets import SampleTargets
from fedkd.errors import ConfigError, RunError
from fedkd.models.base import BlockNet
from fedkd.rng import Rng
from fedkd.types import select

N, CLASSES, K = 8, 4, 3
KL = KullbackLeibler()


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=Rng(seed).torch())


EACH = torch.softmax(2 * drawn(K, N, CLASSES, seed=1), 2)
LOGITS = drawn(N, CLASSES, seed=2)


def made(name, teachers=K, **options):
    policy = chosen_policy({"name": name, **options})
    policy.sized(CLASSES, teachers, Rng(4))
    return policy


def taught(logits=LOGITS, probs=None, **more):
    return Taught(logits, EACH.mean(0) if probs is None else probs, 2.0, teachers=EACH, **more)


def same_gates(policy, values):
    """Let the gate say the same of every example: its last layer is a bias."""
    (net,) = policy.modules()
    *_, weight, bias = net.parameters()
    weight.data.zero_()
    bias.data.copy_(torch.tensor(values).log())


# Routing.


def test_even_gates_on_all_teachers_are_the_mean_of_their_probabilities_and_cost_nothing():
    policy = made("mst", top=None, balance=2.0)
    same_gates(policy, [1.0, 1.0, 1.0])
    found = policy(taught())
    assert torch.allclose(found.probs, EACH.mean(0), atol=1e-6)
    assert policy.penalty(found).detach().abs().max() < 1e-6
    same_gates(policy, [0.5, 0.3, 0.2])
    found = policy(taught())
    uneven = -sum(math.log(K * g) for g in (0.5, 0.3, 0.2)) / K
    assert policy.penalty(found).detach().tolist() == pytest.approx([2 * uneven] * N, abs=1e-5)


@pytest.mark.parametrize(("top", "wanted"), [(1, [1, 0, 0]), (2, [0.625, 0.375, 0])])
def test_only_the_top_teachers_of_an_example_are_heard(top, wanted):
    policy = made("mst", top=top)
    same_gates(policy, [0.5, 0.3, 0.2])
    shares = torch.tensor(wanted, dtype=torch.float32)
    assert torch.allclose(policy(taught()).probs, torch.einsum("k,kbc->bc", shares, EACH))


def test_the_gate_descends_the_weighted_losses_of_the_teachers_and_the_student_does_not_see_it():
    policy = made("mst", balance=0.0)
    z = LOGITS.clone().requires_grad_()
    found = policy(taught(z))
    extra = policy.penalty(found)
    own = [p for module in policy.modules() for p in module.parameters()]
    gradients = torch.autograd.grad(extra.mean(), own, retain_graph=True)
    assert torch.autograd.grad(extra.mean(), z, allow_unused=True) == (None,)
    gates = policy.gates(z)
    apart = torch.stack([KL(LOGITS, p, 2.0) / 4 for p in EACH], 1)
    wanted = torch.autograd.grad((gates * apart).sum(1).mean(), own)
    for g, w in zip(gradients, wanted, strict=True):
        assert g.any() and torch.allclose(g, w, atol=1e-7)


def student():
    net = BlockNet({"fc1": nn.Linear(2, 16)}, nn.Linear(16, CLASSES))
    for i, p in enumerate(net.parameters()):
        p.data.copy_(drawn(*p.shape, seed=20 + i) / 3)
    return net


def test_a_gate_finds_the_teacher_that_knows_a_class_and_beats_the_mean_of_all():
    """Four clusters; teachers 0 and 1 know two each, and the third none."""
    centres = 3 * torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    y = torch.arange(200) % CLASSES
    x = centres[y] + 0.3 * drawn(200, 2, seed=9)
    sure = torch.softmax(4.0 * nn.functional.one_hot(y, CLASSES).float(), 1)
    wrong = torch.softmax(3.0 * nn.functional.one_hot((y + 1) % CLASSES, CLASSES).float(), 1)
    knows = (y < 2).unsqueeze(1)
    each = torch.stack([torch.where(knows, sure, wrong), torch.where(knows, wrong, sure), wrong])
    right = []
    for named in (["mst"], None):
        net = student()
        by = guide(named, 1, 1, 400)
        if by is not None:
            by.teachers = each
        term = distil(KL, SampleTargets(each.mean(0)), 1.0, 1.0, guide=by)
        data = Split(x, torch.full((200,), -1))
        terms = term.placed(Occasion(net, data, 0.1, Rng(5)))
        # The student begins with a little knowledge, as an average of clients does.
        first = distil(KL, SampleTargets(sure), 1.0, 1.0)
        fit(net, data, [first], Training(steps=100, batch_size=20), 0.02, Rng(6))
        fit(net, data, terms, Training(steps=400, batch_size=20), 0.1, Rng(7))
        right.append(float((net(x).argmax(1) == y).float().mean()))
        if by is not None:
            gates = by.policies[0].gates(net(x)).detach()
            owner = torch.where(y < 2, 0, 1)
            hits = float((gates.argmax(1) == owner).float().mean())
            assert hits > 0.9
            entropy = float(torch.special.entr(gates).sum(1).mean())
            assert entropy < 0.8 * math.log(K)
    assert right[0] > 0.95 and right[0] > right[1] + 0.2


# A discriminator.


def test_a_student_that_is_its_teacher_cannot_be_told_from_it():
    policy = made("meal", weight=3.0)
    (net,) = policy.modules()
    for p in list(net.parameters())[-2:]:
        p.data.zero_()
    own = torch.softmax(LOGITS / 2, 1)
    found = policy(taught(probs=own))
    assert found.probs is own
    assert policy.penalty(found).tolist() == pytest.approx([3 * math.log(2)] * N)


def test_the_student_works_against_the_discriminator_unless_it_is_as_released():
    gradients = {}
    for adversarial in (True, False):
        policy = made("meal", adversarial=adversarial)
        z = LOGITS.clone().requires_grad_()
        own = [p for module in policy.modules() for p in module.parameters()]
        extra = policy.penalty(policy(taught(z)))
        assert extra.shape == (N,)
        gradients[adversarial] = torch.autograd.grad(extra.mean(), [z, *own])
    (turned, *one), (straight, *other) = gradients[True], gradients[False]
    assert straight.any() and torch.equal(turned, -straight)
    assert all(g.any() and torch.equal(g, h) for g, h in zip(one, other, strict=True))


def test_a_discriminator_learns_to_tell_a_student_from_its_teacher():
    policy = made("meal")
    own = [p for module in policy.modules() for p in module.parameters()]
    losses = []
    for _ in range(200):
        loss = policy.penalty(policy(taught())).mean()
        losses.append(float(loss.detach()))
        for p, g in zip(own, torch.autograd.grad(loss, own), strict=True):
            p.data -= 0.5 * g
    assert losses[0] > 0.5 and losses[-1] < 0.3


# A learned ratio.


def test_a_ratio_lies_between_teacher_and_truth_and_begins_where_it_is_told():
    policy = made("tgeo", start=0.8)
    y = torch.tensor([0, 1, 2, 3, 0, -1, 2, 3])
    given = taught(labels=y)
    a, truth = policy.ratios(given)
    assert ((a > 0) & (a < 1)).all() and (a.detach() - 0.8).abs().max() < 0.05
    assert truth[5].argmax() == given.probs[5].argmax() and truth[1, 1] == 1
    found = policy(given)
    assert torch.allclose(found.probs, a * given.probs + (1 - a) * truth)
    (net,) = policy.modules()
    for p in list(net.parameters())[-2:-1]:
        p.data.zero_()
    assert torch.allclose(policy.ratios(given)[0], torch.tensor(0.8))


def test_the_mean_by_class_is_that_of_all_examples_seen():
    policy = made("tgeo")
    y = torch.arange(N) % CLASSES
    first = taught(labels=y)
    policy(first)
    later = taught(probs=EACH[0], labels=y.flip(0))
    policy(later)
    both = torch.cat([first.probs, EACH[0]])
    labels = torch.cat([y, y.flip(0)])
    for c in range(CLASSES):
        wanted = both[labels == c].double().mean(0)
        assert torch.allclose(policy._ratio.sums[c] / policy._ratio.counts[c], wanted)


def test_a_ratio_learns_whom_to_believe():
    """Labels are wrong on the even classes, and the teacher on the odd ones."""
    centres = 3 * torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    y = torch.arange(160) % CLASSES
    x = centres[y] + 0.3 * drawn(160, 2, seed=9)
    said = torch.where(y % 2 == 0, y, (y + 1) % CLASSES)
    told = torch.where(y % 2 == 0, (y + 2) % CLASSES, y)
    soft = torch.softmax(3.0 * nn.functional.one_hot(said, CLASSES).float(), 1)
    held = Split(x[:40], y[:40])
    net, data = student(), Split(x[40:], told[40:])
    by = guide([{"name": "tgeo", "lr": 0.05}], 1, 1, 60)
    term = distil(KL, SampleTargets(soft[40:]), 1.0, 1.0, guide=by)
    terms = term.placed(Occasion(net, data, 0.2, Rng(5), {}, lambda: held))
    fit(net, data, terms, Training(steps=60, batch_size=20), 0.2, Rng(7))
    given = Taught(net(data.x).detach(), soft[40:], 1.0, labels=data.y)
    a = by.policies[0].ratios(given)[0].detach().squeeze(1)
    right = y[40:] % 2 == 0
    assert a[right].mean() > 0.8 and a[~right].mean() < 0.2
    assert float((net(x).argmax(1) == y).float().mean()) > 0.9


def test_without_validation_examples_nothing_is_learned_and_without_a_split_it_is_refused():
    net = student()
    data = Split(drawn(N, 2, seed=3), torch.arange(N) % CLASSES)
    empty = Split(data.x[:0], data.y[:0])
    by = guide(["tgeo"], 1, 1, 4)
    term = distil(KL, SampleTargets(EACH[0]), 1.0, 1.0, guide=by)
    terms = term.placed(Occasion(net, data, 0.2, Rng(5), {}, lambda: empty))
    before = [p.detach().clone() for p in by.policies[0].modules()[0].parameters()]
    fit(net, data, terms, Training(steps=4, batch_size=4), 0.2, Rng(7))
    assert all(map(torch.equal, before, by.policies[0].modules()[0].parameters()))
    for name, what in (("tgeo", "validation"), ("mst", "teachers")):
        other = distil(KL, SampleTargets(EACH[0]), 1.0, 1.0, guide=guide([name], 1, 1, 4))
        with pytest.raises(ConfigError, match=f"needs {what}"):
            other.placed(Occasion(net, data, 0.2, Rng(5)))


# Where they may be used.


def test_what_a_place_does_not_offer_is_refused_by_name():
    (said,) = problems_of("kl", guided=["mst"])
    assert "'mst' chooses between teachers" in said and "feddf" in said
    (said,) = problems_of("kl", guided=["tgeo"], offers=["teachers"])
    assert "'tgeo' learns from a client's validation examples" in said
    assert problems_of("kl", guided=["tgeo", "meal"]) == []
    assert problems_of("kl", guided=["mst"], offers=["teachers"]) == []
    (said,) = mixing("kl", guided=["tgeo"])
    assert "validation examples, which no accountant counts" in said


def test_what_would_undo_swing_distillation_is_refused_beside_it():
    own, single = retempering(["meal", "temperature", "ctkd", "mst"])
    assert "'temperature' puts a temperature of its own" in own
    assert "'mst' teaches what single clients say, without" in single
    assert retempering(["meal", "tgeo", "taid"]) == [] == retempering(None)


def test_a_policy_that_was_not_told_its_sizes_says_so():
    with pytest.raises(RunError, match="before its sizes were known"):
        chosen_policy("meal").penalty(taught())


@pytest.mark.parametrize("start", [0.0, 1.0])
def test_a_ratio_that_could_not_learn_is_refused(start):
    with pytest.raises(ConfigError, match="ground-truth"):
        chosen_policy({"name": "tgeo", "start": start})


@pytest.mark.parametrize("name", ["meal", "tgeo"])
def test_what_a_client_learned_goes_on_in_its_next_round(name):
    data = Split(drawn(N, 2, seed=3), torch.arange(N) % CLASSES)
    held = Split(drawn(N, 2, seed=4), torch.arange(N) % CLASSES)

    def one(net, state, rounds):
        for _ in range(rounds):
            by = guide([name], 1, 2, 3, state)
            term = distil(KL, SampleTargets(EACH[0]), 2.0, 1.0, guide=by)
            terms = term.placed(Occasion(net, data, 0.2, Rng(5), state, lambda: held))
            fit(net, data, terms, Training(steps=3, batch_size=4), 0.2, Rng(7))
            for made_ready in terms:
                made_ready.keep(state)
        return state

    first, second = {}, {}
    one(student(), first, 1)
    assert select(first, "policies/0")
    halfway = {key: value.copy() for key, value in first.items()}
    one(student(), second, 1)
    assert all((first[k] == second[k]).all() for k in first)
    one(student(), first, 1)
    assert any((first[k] != halfway[k]).any() for k in first)


def test_a_guide_is_sized_once_and_knows_which_rows_are_asked():
    net = student()
    data = Split(drawn(N, 2, seed=3), torch.arange(N) % CLASSES)
    policy = chosen_policy("mst")
    by = Guide((policy,), 0.0, 1.0, 4)
    by.teachers = EACH
    term = distil(KL, SampleTargets(EACH.mean(0)), 1.0, 1.0, guide=by)
    gates = []
    for _ in range(2):
        term.placed(Occasion(net, data, 0.2, Rng(5)))
        gates.append(policy.modules())
    assert gates[0] == gates[1]
    index = torch.tensor([5, 1])
    batch = Batch(data.x[index], data.y[index], index, net(data.x[index]), {})
    term(batch)
    told = by._asked()
    assert torch.equal(told, EACH[:, index])
