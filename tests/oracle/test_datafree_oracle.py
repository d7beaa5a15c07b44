"""FedFTG and DFRD against plain loops written from the formulas."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fedkd.clients.local import Batch
from fedkd.clients.synthesis import Answers
from fedkd.clients.training import Training
from fedkd.clients.transfer import Ensemble
from fedkd.distill.fusion_rules import ClassCounts, label_shares
from fedkd.distill.generator import Codes
from fedkd.engine.simulate import in_process
from fedkd.models.base import BlockNet
from fedkd.models.initial import initialise
from fedkd.rng import stream
from fedkd.strategies import alternating
from fedkd.strategies.alternating import Continued
from fedkd.strategies.dfrd import DFRD
from fedkd.strategies.fedftg import FedFTG
from fedkd.types import select

D, C, B, K, NOISE = 6, 4, 9, 3, 5
RNG = stream(0, "oracle")
COUNTS = np.array([[7, 0, 2, 0], [1, 5, 0, 0], [0, 5, 6, 3]], dtype=np.float64)
QUICK = {"server_steps": 5, "student_steps": 2, "generator_width": 2, "noise": 4}
SIZES = {"server_batch_size": 8, "generator_batch_size": 6, "generator_steps": 2}


def net(*address):
    made = BlockNet({"fc1": nn.Sequential(nn.Linear(D, 7), nn.Tanh())}, nn.Linear(7, C))
    initialise(made, RNG.child(*address))
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(4)
    return made.double()


@pytest.fixture
def scene():
    """Three teachers, a student, one generated batch and its codes."""
    labels = torch.arange(B) % C
    noise = torch.randn(B, NOISE, generator=RNG.child("noise").torch()).double()
    codes = Codes(noise, labels, C)
    x = torch.randn(B, D, generator=RNG.child("x").torch()).double().requires_grad_()
    teachers = [net("teacher", k) for k in range(K)]
    shares = label_shares(torch.tensor(COUNTS))
    answers = Answers(Ensemble(teachers, ClassCounts(), shares))
    index = torch.arange(B)
    return Batch(index, labels, index, x, {}), codes, answers, net("student")


def total(terms, batch):
    return sum(term.weight * term(batch).mean() for term in terms)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def known(batch, answers, student):
    """Everything that the formulas need, as NumPy arrays."""
    with torch.no_grad():
        t = np.stack([k(batch.logits).numpy() for k in answers.ensemble.teachers])
        s = student(batch.logits).numpy()
    y = batch.y.numpy()
    total_ = COUNTS.sum(0)
    a = np.where(total_ > 0, COUNTS / np.maximum(total_, 1), 1 / K)[:, y]
    return t, s, y, a, batch.logits.detach().numpy()


def diversity(codes, x):
    e = codes.noise.detach().numpy()
    mean = 0.0
    for i in range(B):
        for j in range(B):
            mean += np.mean((e[i] - e[j]) ** 2) * np.mean(np.abs(x[i] - x[j])) / B**2
    return np.exp(-mean)


def test_what_fedftgs_generator_minimises(scene):
    batch, codes, answers, student = scene
    strategy = FedFTG(hard_weight=0.7, fidelity_weight=1.3, diversity_weight=2.0)
    t, s, y, a, x = known(batch, answers, student)
    loss = 0.0
    for i in range(B):
        for k in range(K):
            fidelity = -np.log(softmax(t[k, i])[y[i]])
            hard = np.mean(np.abs(s[i] - t[k, i]))
            loss += a[k, i] * (1.3 * fidelity - 0.7 * hard) / B
    loss += 2.0 / K * diversity(codes, x)
    found = total(strategy.generator_terms(answers, codes, [student]), batch)
    np.testing.assert_allclose(float(found.detach()), loss, rtol=1e-10)


def test_weights_of_single_samples_do_not_collapse(scene):
    """A mean over the batch before weighting would give sum_k mean(a_k) mean(CE_k)."""
    batch, codes, answers, student = scene
    t, _, y, a, _ = known(batch, answers, student)
    ce = np.array([[-np.log(softmax(t[k, i])[y[i]]) for i in range(B)] for k in range(K)])
    strategy = FedFTG(hard_weight=0, diversity_weight=0)
    found = float(total(strategy.generator_terms(answers, codes, [student]), batch).detach())
    np.testing.assert_allclose(found, (a * ce).sum(0).mean(), rtol=1e-10)
    assert abs(found - (a.mean(1) * ce.mean(1)).sum()) > 0.05


def test_what_dfrds_generator_minimises(scene):
    batch, codes, answers, student = scene
    strategy = DFRD(transfer_weight=0.7, fidelity_weight=1.3, diversity_weight=2.0)
    t, s, y, a, x = known(batch, answers, student)
    loss, apart = 0.0, 0
    for i in range(B):
        p = sum(a[k, i] * softmax(t[k, i]) for k in range(K))
        q = softmax(s[i])
        loss -= 1.3 * np.log(p[y[i]]) / B
        if p.argmax() != q.argmax():
            apart += 1
            loss -= 0.7 * np.sum(p * (np.log(p) - np.log(q))) / B
    assert 0 < apart < B
    loss += 2.0 * diversity(codes, x)
    found = total(strategy.generator_terms(answers, codes, [student]), batch)
    np.testing.assert_allclose(float(found.detach()), loss, rtol=1e-10)


@pytest.mark.parametrize("strategy", [FedFTG(), DFRD()], ids=["fedftg", "dfrd"])
def test_several_students_share_the_weight_of_one(strategy, scene):
    batch, codes, answers, student = scene
    other = net("other")
    alone = [total(strategy.generator_terms(answers, codes, [s]), batch) for s in (student, other)]
    both = total(strategy.generator_terms(answers, codes, [student, other]), batch)
    torch.testing.assert_close(both, (alone[0] + alone[1]) / 2)


@pytest.mark.parametrize("strategy", [FedFTG(), DFRD()], ids=["fedftg", "dfrd"])
def test_gradient_of_the_generators_loss_reaches_samples_and_no_teacher(strategy, scene):
    batch, codes, answers, student = scene
    total(strategy.generator_terms(answers, codes, [student]), batch).backward()
    assert float(batch.logits.grad.abs().sum()) > 0
    for teacher in answers.ensemble.teachers:
        assert all(p.grad is None for p in teacher.parameters())


def test_terms_of_weight_zero_are_left_out(scene):
    _, codes, answers, student = scene
    none = FedFTG(hard_weight=0, diversity_weight=0).generator_terms(answers, codes, [student])
    assert [term.name for term in none] == ["fidelity"]
    none = DFRD(transfer_weight=0, fidelity_weight=0).generator_terms(answers, codes, [student])
    assert [term.name for term in none] == ["diversity"]


@pytest.mark.parametrize(
    "training",
    [Training(optimizer="adam", lr=0.1), Training(optimizer="sgd", momentum=0.9, lr=0.1)],
    ids=["adam", "momentum"],
)
def test_a_continued_optimizer_remembers(training):
    """Two turns of one step are two steps; with a fresh optimizer each they are not."""

    def steps(make):
        w = nn.Parameter(torch.tensor([2.0, -1.0]))
        holder = nn.Module()
        holder.w = w
        give = make(holder)
        for _ in range(2):
            optimizer = give()
            optimizer.zero_grad()
            (w**2).sum().backward()
            optimizer.step()
        return w.detach()

    def continued(m):
        made = Continued(training, m)
        assert (made.lr, made.momentum) == (training.lr, training.momentum)
        return lambda: made.make(list(m.parameters()), made.lr)

    def plain(m):
        one = training.make(m.parameters(), training.lr)
        return lambda: one

    fresh = steps(lambda m: lambda: training.make(m.parameters(), training.lr))
    assert torch.equal(steps(continued), steps(plain))
    assert not torch.equal(steps(continued), fresh)


def uploads_of(run, monkeypatch):
    """Play round 1 and return what the server was given, and the state before and after."""
    seen = {}
    original = type(run.prepared.strategy).aggregate

    def aggregate(self, state, uploads, round_, setting):
        seen.update(before=dict(state), uploads=list(uploads))
        return original(self, state, uploads, round_, setting)

    monkeypatch.setattr(type(run.prepared.strategy), "aggregate", aggregate)
    with in_process():
        run.play(1)
    return seen


def reference(strategy, seen, setting):
    """FedFTG's server in one plain loop: autograd, torch's Adam, and the same addressed draws."""
    label = setting.clients[0].model
    uploads = seen["uploads"]
    n = np.array([u.client.examples for u in uploads], dtype=np.float64)
    weights = [select(u.arrays, "model") for u in uploads]
    mean = {
        key: (sum(w[key].astype(np.float64) * k for w, k in zip(weights, n, strict=True)) / n.sum())
        .astype(np.float32)
        for key in weights[0]
    }  # fmt: skip
    student = setting.book.make(label, mean)
    teachers = [setting.book.make(label, w).requires_grad_(False) for w in weights]
    counts = torch.tensor(np.stack([u.arrays["counts/labels"] for u in uploads])).float()
    held = counts.sum(0)
    a = torch.where(held > 0, counts / held.clamp_min(1), torch.tensor(1 / len(uploads)))
    generator = strategy.generator(setting, stream(setting.seed, "server", "generator"))
    g_adam = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.999))
    s_adam = torch.optim.Adam(student.parameters(), lr=strategy.server_lr)

    def codes(size, rng):
        y = torch.multinomial(held, size, replacement=True, generator=rng.child("labels").torch())
        e = torch.randn(size, strategy.noise, generator=rng.child("noise").torch())
        return y, e, torch.cat([e, functional.one_hot(y, len(held)).float()], 1)

    def order(size, rng):
        return torch.randperm(size, generator=rng.child("epoch", 0).torch())

    for turn, steps in enumerate([2, 2, 1]):
        rng = stream(setting.seed, "server", "turn", turn, 1)
        y, e, code = codes(12, rng.child("codes"))
        for batch in order(12, rng.child("generator")).split(6):
            x = generator(code[batch])
            t, s = torch.stack([k(x) for k in teachers]), student(x)
            share = a[:, y[batch]]
            ce = torch.stack([functional.cross_entropy(k, y[batch], reduction="none") for k in t])
            gap = (t - s).abs().mean(2)
            e_apart = ((e[batch][:, None] - e[batch][None]) ** 2).mean(2)
            x_apart = (x[:, None] - x[None]).abs().flatten(2).mean(2)
            loss = (share * (ce - gap)).sum(0).mean()
            loss = loss + torch.exp(-(e_apart * x_apart).mean()) / len(teachers)
            g_adam.zero_grad()
            loss.backward()
            g_adam.step()
        own = rng.child("student", label)
        y, _, code = codes(8 * steps, own.child("samples").child(0))
        x = generator(code).detach()
        for batch in order(8 * steps, own).split(8):
            softened = torch.stack([functional.softmax(k(x[batch]), 1) for k in teachers])
            p = (a[:, y[batch], None] * softened).sum(0)
            logq = functional.log_softmax(student(x[batch]), 1)
            s_adam.zero_grad()
            functional.kl_div(logq, p, reduction="batchmean").backward()
            s_adam.step()
    return student, generator


def test_a_round_of_fedftg_is_a_plain_loop(tiny, play, monkeypatch):
    options = {"name": "fedftg", **QUICK, **SIZES, "generator_lr": 1e-3}
    options |= {"hard_weight": 1.0, "fidelity_weight": 1.0, "diversity_weight": 1.0}
    options |= {"server_lr": 1e-3, "server_optimizer": "adam", "temperature": 1.0}
    run = play(tiny(options, {"rounds": 1, "data.partition.alpha": 0.1}), rounds=0)
    seen = uploads_of(run, monkeypatch)
    student, generator = reference(run.prepared.strategy, seen, run.prepared.setting)
    for key, value in select(run.state, "model").items():
        expected = student.get_parameter(key).detach().numpy()
        np.testing.assert_allclose(value, expected, rtol=0, atol=2e-5)
    for key, value in select(run.state, "generator").items():
        expected = generator.get_parameter(key).detach().numpy()
        np.testing.assert_allclose(value, expected, rtol=0, atol=2e-5)


def test_the_slow_copy_is_the_moving_average_of_the_generators(tiny, play):
    options = {"name": "dfrd", **QUICK, "ema": 0.8}
    run = play(tiny(options, {"rounds": 3, "evaluate.every": 3}), rounds=0)
    slow = None
    with in_process():
        for round_ in (1, 2, 3):
            run.play(round_)
            now = select(run.state, "generator")
            slow = now if slow is None else {k: 0.8 * slow[k] + 0.2 * v for k, v in now.items()}
            kept = select(run.state, "generator_ema")
            assert kept.keys() == slow.keys()
            for key, value in kept.items():
                assert value.dtype == np.float32
                np.testing.assert_allclose(value, slow[key], rtol=0, atol=1e-6)
    assert any(not np.allclose(kept[k], now[k], rtol=0, atol=1e-5) for k in now)


@pytest.mark.parametrize(("share", "expected"), [(0.5, [8, 8]), (0.25, [12, 4]), (0.0, [16])])
def test_the_slow_copy_makes_its_share_of_the_samples(share, expected, tiny, play, monkeypatch):
    options = {"name": "dfrd", **QUICK, **SIZES, "server_steps": 2, "ema_share": share}
    run = play(tiny(options, {"rounds": 2, "evaluate.every": 2}), rounds=1)
    asked = []
    original = alternating.sample
    monkeypatch.setattr(
        alternating, "sample", lambda g, c: (asked.append(len(c.labels)), original(g, c))[1]
    )
    with in_process():
        run.play(2)
    assert asked == expected
