"""FedGen's losses against independent numpy computations, and what they must not touch."""

import numpy as np
import pytest
import torch

from fedkd.clients.generated_terms import Generated, GeneratedTargets, reader
from fedkd.clients.local import Batch
from fedkd.clients.synthesis import codes_for
from fedkd.distill.generator import feature_generator, filled
from fedkd.distill.objectives.base import objectives
from fedkd.engine.setup import prepare
from fedkd.models.base import build
from fedkd.rng import stream
from fedkd.types import Task, Upload, prefixed

CLASSES, NOISE, LATENT, HIDDEN = 4, 3, 5, 7
TASK = Task(name="toy", input_shape=(6,), classes=CLASSES)


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def generate(weights, noise, labels, classes):
    """Linear, LayerNorm, ReLU, linear, from noise beside the one-hot label."""
    x = np.concatenate([noise, np.eye(classes)[labels]], 1)
    h = x @ weights["hidden.0.weight"].T + weights["hidden.0.bias"]
    h = (h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 1e-5)
    h = np.maximum(h * weights["hidden.1.weight"] + weights["hidden.1.bias"], 0)
    return h @ weights["head.weight"].T + weights["head.bias"]


def arrays(module):
    return {k: p.detach().double().numpy() for k, p in module.named_parameters()}


@pytest.fixture
def parts():
    rng = stream(3, "oracle")
    model = build("mlp", {"hidden": [8, LATENT]}, TASK, rng.child("model"))
    generator = filled(feature_generator(NOISE, CLASSES, LATENT, HIDDEN), rng.child("generator"))
    x = torch.randn(6, 6, generator=rng.torch())
    y = torch.tensor([0, 1, 2, 3, 3, 0])
    return model, generator, Batch(x, y, torch.arange(6), model(x), {})


def head_of(model, z):
    weights = arrays(model)
    return z @ weights["head.weight"].T + weights["head.bias"]


def test_generated_is_cross_entropy_of_the_head_alone(parts):
    model, generator, batch = parts
    prior, rng = torch.tensor([0.5, 0.0, 0.25, 0.25]), stream(3, "draws")
    term = Generated(
        reader(model, TASK), generator, prior, noise=NOISE, size=40, rng=rng, weight=2.0
    )
    found = []
    for step in (0, 1):
        codes = codes_for(40, NOISE, prior, rng.child(step))
        labels = codes.labels.numpy()
        assert set(labels) == {0, 2, 3}, "a class of no weight is never drawn"
        z = generate(arrays(generator), codes.noise.detach().numpy(), labels, CLASSES)
        expected = -log_softmax(head_of(model, z))[np.arange(40), labels].mean()
        found.append(term(batch))
        assert found[-1].item() == pytest.approx(expected, rel=1e-5)
    assert found[0].item() != found[1].item(), "every step draws afresh"
    found[0].backward()
    moved = {k for k, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"head.weight", "head.bias"}
    assert all(p.grad is None for p in generator.parameters())


def test_generated_targets_are_constants_and_masked(parts):
    model, generator, batch = parts
    prior, rng = torch.tensor([0.5, 0.25, 0.0, 0.25]), stream(3, "draws")
    term = GeneratedTargets(
        reader(model, TASK),
        generator,
        prior,
        objective=objectives.get("kl")(),
        noise=NOISE,
        rng=rng,
        weight=1.0,
    )
    noise = torch.randn(6, NOISE, generator=rng.child(0).torch()).double().numpy()
    z = generate(arrays(generator), noise, batch.y.numpy(), CLASSES)
    logt, logs = log_softmax(head_of(model, z)), log_softmax(batch.logits.detach().numpy())
    expected = (np.exp(logt) * (logt - logs)).sum(1)
    expected[batch.y.numpy() == 2] = 0
    loss = term(batch)
    assert np.allclose(loss.detach().numpy(), expected, rtol=1e-4, atol=1e-6)
    assert (expected > 0).sum() == 5
    # KL's gradient with a constant target is softmax(f) - t; a target that moved would add to it.
    (gradient,) = torch.autograd.grad(loss.sum(), batch.logits, retain_graph=True)
    slope = (np.exp(logs) - np.exp(logt)) * (batch.y.numpy() != 2)[:, None]
    assert np.allclose(gradient.numpy(), slope, atol=1e-6)
    bias = torch.autograd.grad(loss.sum(), model.get_parameter("head.bias"))[0]
    assert np.allclose(bias.numpy(), slope.sum(0), atol=1e-5)


@pytest.mark.parametrize("fidelity", ["ensemble", "teachers"])
def test_the_servers_losses(fidelity, tiny):
    """One step from known weights: what is logged is eq. 4 at these weights."""
    n, classes, latent = 64, 10, 12
    options = {"noise": NOISE, "generator_hidden": HIDDEN, "generator_steps": 1}
    options |= {"generator_batch_size": n, "fidelity": fidelity}
    prepared = prepare(tiny({"name": "fedgen", **options}))
    strategy, setting = prepared.strategy, prepared.setting
    draw = stream(5, "heads").numpy()
    known = filled(feature_generator(NOISE, classes, latent, HIDDEN), stream(5, "known"))
    weights = {k: v.astype(np.float32) for k, v in arrays(known).items()}
    counts = np.zeros((2, classes), dtype=np.int32)
    counts[0, :4], counts[1, 2:6] = [5, 5, 6, 1], [2, 3, 4, 5]
    uploads = []
    for k in (0, 1):
        head = {
            "head.weight": draw.normal(size=(classes, latent)).astype(np.float32),
            "head.bias": draw.normal(size=classes).astype(np.float32),
        }
        values = {**prefixed("model", head), "counts/labels": counts[k]}
        uploads.append(Upload(client=setting.clients[k], arrays=values))
    made, result = strategy.learn(weights, uploads, 2, setting)

    rng = stream(setting.seed, "server", "generator", 2).child("codes")
    codes = codes_for(n, NOISE, torch.from_numpy(counts.sum(0)).float(), rng)
    labels, noise = codes.labels.numpy(), codes.noise.detach().double().numpy()
    assert labels.max() < 6, "a class that no teacher holds is not asked for"
    z = generate(arrays(known), noise, labels, classes)
    logits = np.stack(
        [z @ u.arrays["model/head.weight"].T + u.arrays["model/head.bias"] for u in uploads]
    )
    rows = np.arange(n)
    if fidelity == "ensemble":
        expected = -log_softmax(logits.mean(0))[rows, labels].mean()
    else:
        shares = counts / np.maximum(counts.sum(0), 1)
        losses = -log_softmax(logits)[:, rows, labels]
        expected = (shares[:, labels] * losses).sum(0).mean()
    assert result.losses["fidelity"] == pytest.approx(expected, rel=1e-5)
    apart = ((noise[:, None] - noise[None]) ** 2).mean(2)
    spread = np.abs(z[:, None] - z[None]).mean(2)
    assert result.losses["diversity"] == pytest.approx(np.exp(-(apart * spread).mean()), rel=1e-4)
    assert result.steps == 1
    moved = [not np.array_equal(weights[k], v) for k, v in arrays(made).items()]
    assert all(moved)


def test_nobody_with_examples_teaches_nothing(tiny):
    prepared = prepare(tiny("fedgen"))
    strategy, setting = prepared.strategy, prepared.setting
    state = strategy.init(setting, stream(0, "init"))
    model = prefixed("model", setting.book.initial(setting.clients[0].model))
    empty = {**model, "counts/labels": np.zeros(10, dtype=np.int32)}
    after, metrics = strategy.aggregate(
        state, [Upload(client=setting.clients[0], arrays=empty)], 1, setting
    )
    assert metrics == {}
    assert not any(key.startswith("generator") for key in after)
    sent = strategy.broadcast(after, setting.clients[1], 2, setting)
    assert set(sent) == set(model)
