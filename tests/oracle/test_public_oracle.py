"""FedMD and DS-FL against the formulas, written down once more in numpy and plain torch loops."""

import numpy as np
import pytest
import torch

from fedkd.clients.local import Batch
from fedkd.distill.fusion_rules import fusions, label_shares
from fedkd.engine.simulate import in_process
from fedkd.rng import stream
from fedkd.strategies.ds_fl import DsFl, sharpened
from fedkd.strategies.public_exchange import MatchScores, part
from fedkd.types import select

SIZE, POOL, LR, BATCH = 16, 40, 0.2, 16


def chosen(round_, seed=0):
    order = stream(seed, "public", "part", round_).numpy().permutation(POOL)
    return np.sort(order[:SIZE])


def forward(weights, x):
    """The perceptron's logits in double precision."""
    h = np.asarray(x, dtype=np.float64).reshape(len(x), -1)
    names = sorted({k.rsplit(".", 1)[0] for k in weights})
    for name in names:
        h = h @ weights[f"{name}.weight"].T.astype(np.float64) + weights[f"{name}.bias"]
        h = h if name == names[-1] else np.maximum(h, 0)
    return h


def softmax(z, axis=-1):
    e = np.exp(z - z.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def sgd(net, x, y, loss, rng, lr=LR, batch=BATCH):
    """One epoch of plain gradient descent in the order of the stream."""
    order = torch.randperm(len(x), generator=rng.child("epoch", 0).torch())
    for index in order.split(batch):
        net.zero_grad()
        loss(net(x[index]), y[index]).backward()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.sub_(lr * parameter.grad)


def close(net, weights):
    for key, value in net.named_parameters():
        np.testing.assert_allclose(value.detach().numpy(), weights[key], atol=2e-6, err_msg=key)


def states(run):
    return [select(run.client_state(k), "model") for k in range(4)]


@pytest.fixture(scope="module")
def two_rounds(tiny, play):
    """Return ``get(options)``: a run after rounds 1 and 2 of 3, and what it was after round 1."""

    def get(options):
        run = play(tiny({"subset": SIZE, **options}, {"rounds": 3}), rounds=1)
        first = ([dict(s) for s in states(run)], dict(run.state))
        with in_process():
            run.play(2)
        return run, *first

    return get


def test_distance_is_the_mean_over_classes_and_its_gradient_a_sign():
    logits = torch.tensor([[1.0, -2.0, 0.5], [0.0, 4.0, 1.0]], requires_grad=True)
    scores = torch.tensor([[9.0] * 3, [0.0, 1.0, 2.0], [2.0, -2.5, 0.0]])
    batch = Batch(torch.zeros(2), torch.zeros(2), torch.tensor([2, 1]), logits, {})
    loss = MatchScores(scores)(batch)
    np.testing.assert_allclose(loss.detach(), [(1 + 0.5 + 0.5) / 3, (0 + 3 + 1) / 3])
    squares = MatchScores(scores, squared=True)(batch)
    np.testing.assert_allclose(squares.detach(), [(1 + 0.25 + 0.25) / 3, (9 + 1) / 3])
    loss.mean().backward()
    np.testing.assert_allclose(logits.grad, np.array([[-1, 1, 1], [0, 1, -1]]) / 6, rtol=1e-6)


def test_era_in_closed_form_and_at_its_limits():
    p = np.random.Generator(np.random.Philox(key=3)).dirichlet([1.0] * 5, 200)
    probs = torch.from_numpy(p)
    for temperature in (0.05, 0.1, 1.0, 7.0):
        np.testing.assert_allclose(sharpened(probs, temperature), softmax(p / temperature))
    uniform = torch.full((1, 5), 0.2)
    np.testing.assert_allclose(sharpened(uniform, 0.1), uniform)
    np.testing.assert_allclose(sharpened(probs, 1e-6), np.eye(5)[p.argmax(1)], atol=1e-9)

    def entropy(q):
        return float(torch.special.entr(q).sum(1).mean())

    assert entropy(sharpened(probs, 0.05)) < entropy(probs) < entropy(sharpened(probs, 1.0))
    assert np.array_equal(sharpened(probs, 0.1).argmax(1), p.argmax(1))


@pytest.mark.parametrize("aggregation", ["era", "sa"])
def test_ds_fl_fuses_probabilities_as_any_rule_would_fuse_logits(aggregation):
    logits = torch.randn(3, 6, 4, generator=stream(0, "logits").torch())
    counts = torch.tensor([[5.0, 0, 0, 1], [0, 2, 0, 1], [5, 0, 0, 2]])
    strategy = DsFl(aggregation=aggregation)
    for name in fusions.names():
        rule = fusions.get(name)()
        found = strategy.consensus(softmax_of(logits), rule, label_shares(counts))
        wanted = rule(logits, 1.0, label_shares(counts))
        wanted = sharpened(wanted, 0.1) if aggregation == "era" else wanted
        np.testing.assert_allclose(found, wanted, atol=1e-5, err_msg=name)


def softmax_of(logits):
    return torch.from_numpy(softmax(logits.numpy()))


def test_certain_clients_leave_the_consensus_finite():
    sure = torch.eye(4)[None].repeat(2, 1, 1)
    for name in fusions.names():
        found = DsFl(aggregation="sa").consensus(sure, fusions.get(name)(), None)
        np.testing.assert_allclose(found, np.eye(4), atol=1e-6, err_msg=name)


def test_the_part_of_a_round_is_drawn_afresh_without_repetition(tiny, play):
    run = play(tiny("fedmd"), rounds=1)
    pool = run.prepared.setting.public
    parts = [part(pool, SIZE, 0, r) for r in range(1, 30)]
    for round_, made in enumerate(parts, start=1):
        assert torch.equal(made.x, pool.x[chosen(round_)])
        assert torch.equal(made.y, pool.y[chosen(round_)])
    seen = {row.numpy().tobytes() for made in parts for row in made.x}
    assert len(seen) == len({row.numpy().tobytes() for row in pool.x})
    assert part(pool, 0, 0, 1) is pool and part(pool, POOL, 0, 1) is pool


def test_fedmd_consensus_is_the_mean_of_logits_after_the_revisit(two_rounds):
    run, before, server = two_rounds({"name": "fedmd"})
    pool = run.prepared.setting.public
    for weights, state, round_ in ((before, server, 2), (states(run), run.state, 3)):
        logits = np.stack([forward(w, pool.x[chosen(round_)]) for w in weights])
        np.testing.assert_allclose(state["consensus/scores"], logits.mean(0), atol=1e-5)
        assert state["consensus/round"].tolist() == [round_]
    probs = softmax(run.state["consensus/scores"].astype(np.float64))
    hits = (probs.argmax(1) == pool.y[chosen(3)].numpy()).mean()
    assert run.log.series("consensus/accuracy")[2] == pytest.approx(hits)
    entropy = -(probs * np.log(probs)).sum(1).mean()
    assert run.log.series("consensus/entropy")[2] == pytest.approx(entropy, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "loss"),
    [
        ({}, lambda z, s: (z - s).abs().mean()),
        ({"digest_loss": "mse"}, lambda z, s: ((z - s) ** 2).mean()),
        (
            {"digest_loss": "kl", "temperature": 2.0},
            lambda z, s: 4 * torch.nn.functional.kl_div(
                (z / 2).log_softmax(1), s, reduction="batchmean"
            ),
        ),
    ],
    ids=["mae", "mse", "kl"],
)  # fmt: skip
def test_fedmd_digests_and_then_revisits(options, loss, two_rounds):
    run, before, server = two_rounds({"name": "fedmd", "digest_lr": 0.1, **options})
    setting, pool = run.prepared.setting, run.prepared.setting.public
    consensus = torch.from_numpy(server["consensus/scores"])
    if "temperature" in options:
        logits = np.stack([forward(w, pool.x[chosen(2)]) for w in before]).mean(0)
        np.testing.assert_allclose(consensus, softmax(logits / 2), atol=1e-5)
    for k in range(4):
        net = setting.book.make("mlp", before[k])
        sgd(net, pool.x[chosen(2)], consensus, loss, stream(0, "digest", 2, k), lr=0.1)
        own = run.prepared.federation.client(k).train
        supervised = torch.nn.functional.cross_entropy
        sgd(net, own.x, own.y, supervised, stream(0, "local", 2, k))
        close(net, states(run)[k])


def test_fedmd_pretrains_on_the_labels_of_the_whole_pool(two_rounds):
    run, before, _ = two_rounds({"name": "fedmd", "pretrain_epochs": 1})
    setting, pool = run.prepared.setting, run.prepared.setting.public
    supervised = torch.nn.functional.cross_entropy
    net = setting.book.make("mlp")
    sgd(net, pool.x, pool.y, supervised, stream(0, "pretrain", 1, 2))
    own = run.prepared.federation.client(2).train
    sgd(net, own.x, own.y, supervised, stream(0, "local", 1, 2))
    close(net, before[2])


def test_ds_fl_teaches_clients_and_the_global_network_the_sharpened_mean(two_rounds):
    run, before, server = two_rounds({"name": "ds-fl", "server_lr": 0.3, "server_batch_size": 8})
    setting, pool = run.prepared.setting, run.prepared.setting.public
    mean = np.mean([softmax(forward(w, pool.x[chosen(2)])) for w in before], axis=0)
    np.testing.assert_allclose(server["consensus/scores"], softmax(mean / 0.1), atol=1e-5)
    consensus = torch.from_numpy(server["consensus/scores"])

    def soft(z, q):
        return -(q * z.log_softmax(1)).sum(1).mean()

    x = pool.x[chosen(2)]
    net = setting.book.make("mlp")
    sgd(net, x, consensus, soft, stream(0, "server", "distil", 1), lr=0.3, batch=8)
    close(net, select(server, "model"))
    for k in range(4):
        net = setting.book.make("mlp", before[k])
        sgd(net, x, consensus, soft, stream(0, "digest", 2, k))
        own = run.prepared.federation.client(k).train
        sgd(net, own.x, own.y, torch.nn.functional.cross_entropy, stream(0, "local", 2, k))
        close(net, states(run)[k])


def test_class_counts_weigh_clients_by_what_they_have_seen(two_rounds):
    run, before, server = two_rounds(
        {"name": "ds-fl", "fusion": "class-counts", "aggregation": "sa"}
    )
    pool, counts = run.prepared.setting.public, run.prepared.federation.counts()
    probs = np.stack([softmax(forward(w, pool.x[chosen(2)])) for w in before])
    held = counts.sum(0)
    shares = np.where(held > 0, counts / np.maximum(held, 1), 1 / 4)
    wanted = (probs * shares[:, None, :]).sum(0)
    wanted /= wanted.sum(1, keepdims=True)
    np.testing.assert_allclose(server["consensus/scores"], wanted, atol=1e-5)
