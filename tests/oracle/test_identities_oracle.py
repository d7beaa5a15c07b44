"""Identities to the digits that a second implementation, in numpy, found for them."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from fedkd.clients.bilevel import Unrolled
from fedkd.clients.local import Occasion
from fedkd.data.federated import Split
from fedkd.distill.objectives.kl import KullbackLeibler
from fedkd.distill.objectives.pld import PlackettLuce, plackett_luce, ranking
from fedkd.distill.sinkhorn import plan, transport
from fedkd.metrics.hacking import proxy_golden
from fedkd.models.base import BlockNet
from fedkd.rng import Rng, stream

ETA, HEAT = 0.3, 1.5


def logits(n=6, classes=5, seed=0):
    return torch.randn(n, classes, generator=Rng(seed).torch(), dtype=torch.float64)


def soft(z, temperature=1.0):
    return torch.softmax(z / temperature, 1)


def test_pld_to_the_last_bits_of_its_mean():
    """A shift changes 4e-16, all weight on the label is CE, gradients add up to 1e-16."""
    z, p, y = logits(), soft(logits(seed=1)), torch.arange(6) % 5
    cost = PlackettLuce()(z, p, 1.0, y).mean()
    assert abs(float(PlackettLuce()(z + 2.0, p, 1.0, y).mean() - cost)) < 1e-15
    first = functional.one_hot(torch.zeros(6, dtype=torch.long), 5).double()
    alone = plackett_luce(z, ranking(p, y), first).mean()
    assert abs(float(alone - functional.cross_entropy(z, y))) < 1e-15
    z.requires_grad_()
    (g,) = torch.autograd.grad(PlackettLuce()(z, p, 1.0, y).mean(), z)
    assert g.abs().max() > 0.01 and abs(float(g.sum())) < 4e-16


def test_transport_to_the_digits_of_its_sum():
    """A permutation changes 2e-15, marginals are met to 2e-8, the blur of 5 goes to 2e-7."""
    a, b = soft(logits(8, 10)), soft(logits(8, 10, seed=1))
    order = torch.randperm(8, generator=Rng(3).torch())
    whole = float(transport(a, b, 0.1, 20).sum())
    assert whole > 5 and abs(float(transport(a[order], b, 0.1, 20).sum()) - whole) < 3e-15
    found = plan(torch.cdist(soft(logits()), soft(logits(seed=1)), p=1.0), 0.1, 20)
    assert (found.sum(1) - 1).abs().max() < 2.5e-8 and (found.sum(0) - 1).abs().max() < 1e-15
    blurred, sharp = (float(transport(a, a, *at).sum()) for at in ((1.0, 20), (0.02, 200)))
    assert blurred > 5 and sharp < 2e-7


def network():
    net = BlockNet({"fc1": nn.Sequential(nn.Linear(4, 5), nn.Tanh())}, nn.Linear(5, 3)).double()
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(torch.randn(*p.shape, generator=Rng(20 + i).torch(), dtype=torch.float64) / 2)
    return net


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients])


def test_the_hypergradient_of_a_ratio_is_a_product_of_gradients():
    """``d/da_n L_val = -(eta / B) <g_val, g_KD,n - g_CE,n>``, with g_val after the step."""
    net, n = network(), 6
    data = Split(logits(n, 4, seed=1), torch.arange(n) % 3)
    held = Split(logits(9, 4, seed=2), torch.arange(9) % 3)
    names, theta = zip(*net.named_parameters(), strict=True)
    teacher, truth = soft(logits(n, 3, seed=3), HEAT), functional.one_hot(data.y, 3).double()
    a = torch.linspace(0.1, 0.9, n, dtype=torch.float64)[:, None].requires_grad_()

    def taught(a):
        return KullbackLeibler()(net(data.x), a * teacher + (1 - a) * truth, HEAT)

    def after(theta):
        return functional.cross_entropy(
            functional_call(net, dict(zip(names, theta, strict=True)), (held.x,)), held.y
        )

    step = torch.autograd.grad(taught(a).mean(), theta, create_graph=True)
    moved = [p - ETA * g for p, g in zip(theta, step, strict=True)]
    g_val = flat(torch.autograd.grad(after(moved), moved, retain_graph=True))
    (whole,) = torch.autograd.grad(after(moved), a)
    two = (taught(torch.ones_like(a)), taught(torch.zeros_like(a)))
    kd, ce = (
        torch.stack([flat(torch.autograd.grad(v, theta, retain_graph=True)) for v in values])
        for values in two
    )
    wanted = -ETA / n * (kd - ce) @ g_val
    assert wanted.abs().max() > 1e-3
    assert (whole.flatten() - wanted).abs().max() < 1e-15

    z = net(data.x).detach().requires_grad_()
    given = KullbackLeibler()(z, a * teacher + (1 - a) * truth, HEAT)
    (r,) = torch.autograd.grad(given.mean(), z, create_graph=True)
    made = Unrolled(Occasion(net, data, ETA, Rng(5), {}, lambda: held), held)
    slopes = made.slopes(torch.arange(n), r.detach())
    (found,) = torch.autograd.grad((slopes * r).sum(), a)
    assert (found.flatten() - wanted).abs().max() < 1e-15


# A language model of one token: prompts with random features, an oracle, a teacher of few samples.
PROMPTS, FEATURES, TOKENS, KEPT = 40, 30, 12, (1, 2, 4, 8, 16, 32, 64, 128, 256, 400)


def log_probs(x, w):
    z = x @ w
    return z - np.logaddexp.reduce(z, 1, keepdims=True)


def drawn(logp, generator, times):
    """Return the shares of tokens among ``times`` samples for each prompt."""
    return generator.multinomial(times, np.exp(logp)) / times


def curves(times, online, seed):
    """Return proxy and golden loss of a student that learns from samples of its teacher.

    Offline the proxy is what the pool itself shows, and falls as long as it is used.
    """
    generator = stream(seed, "tokens").numpy()
    oracle = 0.6 * generator.normal(size=(FEATURES, TOKENS))
    teacher = oracle + 0.2 * generator.normal(size=oracle.shape)
    x, fresh = (generator.normal(size=(n, FEATURES)) for n in (PROMPTS, 200))
    said, golden, proxy = drawn(log_probs(x, teacher), generator, times), [], []
    student = np.zeros_like(oracle)
    truth, lesson = np.exp(log_probs(fresh, oracle)), np.exp(log_probs(fresh, teacher))
    for step in range(1, KEPT[-1] + 1):
        if online:
            x = generator.normal(size=x.shape)
            said = drawn(log_probs(x, teacher), generator, times)
        student -= 0.5 * x.T @ (np.exp(log_probs(x, student)) - said) / PROMPTS
        if step in KEPT:
            mine = log_probs(fresh, student)
            golden.append((truth * (np.log(truth) - mine)).sum(1).mean())
            own = (lesson * (np.log(lesson) - mine)).sum(1).mean()
            proxy.append(own if online else -(said * log_probs(x, student)).sum(1).mean())
    return proxy, golden


@pytest.fixture(scope="module")
def hacking():
    ways = {"once": (1, False), "eight": (8, False), "online": (1, True)}
    found = {}
    for name, way in ways.items():
        both = [curves(*way, seed) for seed in range(3)]
        proxy, golden = (np.array([pair[i] for pair in both]) for i in (0, 1))
        found[name] = proxy_golden(np.array(KEPT), proxy, golden, stream(0, "hacking"))
    return found


def test_a_pool_that_is_used_again_and_again_is_hacked_and_fresh_answers_are_not(hacking):
    once, eight, online = (hacking[name] for name in ("once", "eight", "online"))
    assert once.hacked is True and once.turning.value <= KEPT[-1] / 10
    assert once.rise.value > 1.5 * eight.rise.value
    assert online.hacked is False and online.turning.value > eight.turning.value
    assert online.rise.value < eight.rise.value / 5
