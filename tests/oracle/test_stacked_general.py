"""Stacked fits of any network against ``fit`` of one client after the other, in float64."""

import pytest
import torch

from fedkd.clients.class_terms import FeatureMatch, HeadOnClasses
from fedkd.clients.dp_sgd import DpSgd
from fedkd.clients.heads import make_head
from fedkd.clients.local import Batch, FitResult, fit
from fedkd.clients.stacked import general
from fedkd.clients.stacked.stack import Request, stack
from fedkd.clients.teacher_terms import FromPeer, LogitMatch, NotTrue, Peer, PeerSupervised, ToPeer
from fedkd.clients.terms import Distil, HeadSupervised, OnWeights, Proximal, Supervised
from fedkd.clients.training import Training
from fedkd.data.federated import Split
from fedkd.distill.objectives.kl import KullbackLeibler
from fedkd.distill.targets import ClassTargets, MaskedTargets, SampleTargets
from fedkd.errors import RunError
from fedkd.models.base import HEAD, build
from fedkd.rng import Rng
from fedkd.types import Task

IMAGES = Task(name="i", input_shape=(1, 12, 12), classes=4)
TEXT = Task(name="t", input_shape=(6,), classes=5, sequence=True)
SIZES = [9, 4, 23, 1, 12]
NETWORKS = {
    "mlp": {"hidden": [7, 6]},
    "cnn": {"channels": [3, 4], "hidden": 8},
    "lenet": {},
    "resnet8": {"width": 4, "groups": 2},
    "vit-tiny": {"width": 8, "depth": 1, "heads": 2, "hidden": 12},
    "lstm": {"width": 5, "hidden": 6, "depth": 1},
    "gpt-tiny": {"width": 8, "depth": 1, "heads": 2, "hidden": 12},
}
EVERY = pytest.mark.parametrize("name", [n for n in NETWORKS if n != "lstm"])


def normal(rng, *shape):
    return torch.randn(shape, generator=rng.torch(), dtype=torch.float64)


def probs(rng, *shape):
    return torch.softmax(2 * normal(rng, *shape), -1)


def data(k, task=IMAGES):
    n, rng = SIZES[k], Rng(1).child(k)
    if task.sequence:
        tokens = torch.randint(0, 5, (n, 7), generator=rng.torch())
        y = tokens[:, 1:].clone()
        y[:, 4:][y[:, 4:] < 2] = -1
        return Split(tokens[:, :-1].contiguous(), y)
    y = torch.randint(0, 4, (n,), generator=rng.child("y").torch())
    return Split(normal(rng, n, *task.input_shape), y)


def network(name, k):
    task = TEXT if name in ("gpt-tiny", "lstm") else IMAGES
    return build(name, NETWORKS.get(name, {}), task, Rng(k)).double()


def requests(name, terms, training, dp=None):
    found = []
    for k in range(len(SIZES)):
        model = network(name, k)
        split = data(k, TEXT if name in ("gpt-tiny", "lstm") else IMAGES)
        found.append(
            Request(model, split, terms(model, split, k), training, 0.1, Rng(7).child(k), dp)
        )
    return found


def parameters(request):
    parts = [request.model, *(m for t in request.terms for m in t.modules())]
    return [p.detach() for part in parts for p in part.parameters()]


def both(name, terms, training, dp=None, bucketed=False):
    """Weights and results of both ways, in the order of the requests; they have to be stacked."""
    one, other = (requests(name, terms, training, dp) for _ in range(2))
    alone = [fit(r.model, r.data, r.terms, r.training, r.lr, r.rng, r.dp) for r in one]
    made = stack(other)
    assert made is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(general, "alone", lambda r: pytest.fail("trained one after the other"))
        found = general.train(made, bucketed)
    found = [found[made.plan.order.index(k)] for k in range(len(SIZES))]
    return [parameters(r) for r in one], [parameters(r) for r in other], alone, found


def gap(one, other):
    return max(
        float((a - b).abs().max())
        for p, q in zip(one, other, strict=True)
        for a, b in zip(p, q, strict=True)
    )


def agree(name, terms, training, dp=None, within=1e-9, **more):
    one, other, alone, found = both(name, terms, training, dp, **more)
    start = [parameters(r) for r in requests(name, terms, training, dp)]
    assert all(gap([a], [b]) > 1e-4 for a, b in zip(one, start, strict=True)), "nothing was trained"
    assert gap(one, other) <= within
    for mine, theirs in zip(found, alone, strict=True):
        assert isinstance(mine, FitResult)
        assert (mine.steps, mine.examples, mine.private) == (
            theirs.steps,
            theirs.examples,
            theirs.private,
        )
        assert mine.losses == pytest.approx(theirs.losses, rel=1e-5)


def supervised(model, split, k):
    return [Supervised()]


@EVERY
def test_networks(name):
    agree(name, supervised, Training(batch_size=5, epochs=2))


OPTIONS = {
    "momentum": {"momentum": 0.9, "weight_decay": 0.01},
    "adam": {"optimizer": "adam", "weight_decay": 0.01},
    "clipped": {"max_grad_norm": 0.2},
    "steps": {"steps": 7},
    "frozen": {"frozen": ("fc1",), "momentum": 0.5},
    "one batch": {"batch_size": 64},
}


@pytest.mark.parametrize("label", OPTIONS)
def test_options(label):
    agree("mlp", supervised, Training(**{"batch_size": 5, "epochs": 2, **OPTIONS[label]}))


def test_prefixes_rounded_up_change_nothing():
    agree("mlp", supervised, Training(batch_size=5, epochs=2, momentum=0.9), bucketed=True)


def proximal(model, split, k):
    reference = {
        n: p.detach() + 0.1 * normal(Rng(k).child(n), *p.shape) for n, p in model.named_parameters()
    }
    return [Supervised(label_smoothing=0.1), Proximal(model, reference, 0.7)]


def heads(model, split, k):
    head = make_head(6, 5, 4, Rng(3).child(k), {}).double()
    other = make_head(7, 0, 4, Rng(4).child(k), {}).double()
    targets = ClassTargets(probs(Rng(5).child(k), 4, 4), torch.arange(4) != k)
    return [
        Supervised(),
        HeadSupervised(head, "fc2", 0.5),
        HeadSupervised(other, "fc1", 1.5),
        Distil(KullbackLeibler(), targets, 2.0, 0.7, head, "fc2"),
    ]


def taught(model, split, k):
    rng, n = Rng(5).child(k), len(split)
    hot = 1 + normal(rng.child("t"), n).abs()
    counts = normal(rng.child("c"), n).abs()
    mask = torch.rand(n, generator=rng.child("m").torch()) < 0.6
    kl = KullbackLeibler()
    return [
        Supervised(),
        Distil(kl, SampleTargets(probs(rng, n, 4)), hot, 0.7, rescale=False, counts=counts),
        Distil(kl, MaskedTargets(probs(rng.child(1), n, 4), mask), 3.0, 0.4),
        NotTrue(normal(rng.child(2), n, 4), 2.0, 0.5),
        LogitMatch(normal(rng.child(3), n, 4), 0.3),
    ]


def classes(model, split, k):
    rng = Rng(5).child(k)
    return [
        Supervised(),
        FeatureMatch(ClassTargets(normal(rng, 4, 6), torch.arange(4) != k), "fc2", 0.5),
        HeadOnClasses(
            model.get_submodule(HEAD),
            normal(rng, 3, 6),
            probs(rng, 3, 4),
            KullbackLeibler(),
            2.0,
            0.9,
        ),
    ]


def mutual(model, split, k):
    peer = Peer(network("cnn", 40 + k))
    return [Supervised(), PeerSupervised(peer, 0.5), FromPeer(peer, 0.6), ToPeer(peer, 0.4)]


MERGED = {
    "proximal": proximal,
    "heads": heads,
    "taught": taught,
    "classes": classes,
    "mutual": mutual,
}


@pytest.mark.parametrize("label", MERGED)
def test_merged_terms_train_as_their_clients_own(label):
    agree("mlp", MERGED[label], Training(batch_size=5, epochs=2))


def lesson(model, split, k):
    rng, n = Rng(5).child(k), len(split)
    hot = 1 + normal(rng.child("t"), n, 6).abs()
    targets = SampleTargets(probs(rng, n, 6, 5))
    return [
        Supervised(),
        Distil(KullbackLeibler(), targets, hot, 0.7),
        LogitMatch(normal(rng, n, 6, 5), 0.2),
    ]


def test_text_is_taught_token_by_token():
    agree("gpt-tiny", lesson, Training(batch_size=5))


@pytest.mark.parametrize("label", ["proximal", "heads", "taught", "classes", "mutual"])
def test_merged_terms_give_each_row_its_own_loss(label):
    """On the rows of all clients at once, the merged terms say what each client's term says."""
    made = requests("mlp", MERGED[label], Training())
    columns = list(zip(*(r.terms for r in made), strict=True))
    splits = [r.data for r in made]
    offsets = torch.tensor([0, *SIZES]).cumsum(0)
    for column in columns:
        if column[0].modules():
            continue
        term = type(column[0]).merged(column, splits)
        batches, rows = [], [3, 0, 2]
        for k, r in enumerate(made):
            index = torch.tensor(rows) % SIZES[k]
            x = r.data.x[index]
            logits, features = r.model.forward_with_features(x, ("fc1", "fc2"))
            batches.append(Batch(x, r.data.y[index], index, logits, features))
        if isinstance(term, OnWeights):
            names = dict(made[0].model.named_parameters())
            weights = {n: torch.stack([r.model.get_parameter(n) for r in made[:3]]) for n in names}
            found = term(Batch(*[torch.zeros(0)] * 4, {}, weights))
            expected = torch.stack([t(b) for t, b in zip(column[:3], batches, strict=False)])
        elif isinstance(term, FromPeer):
            continue
        else:
            joint = Batch(
                torch.cat([b.x for b in batches]),
                torch.cat([b.y for b in batches]),
                torch.cat([b.index + offsets[k] for k, b in enumerate(batches)]),
                torch.cat([b.logits for b in batches]),
                {at: torch.cat([b.features[at] for b in batches]) for at in ("fc1", "fc2")},
            )
            found = term(joint)
            expected = torch.cat([t(b) for t, b in zip(column, batches, strict=True)])
        assert torch.allclose(found, expected, rtol=0, atol=1e-12)
        assert float(expected.detach().abs().max()) > 1e-3


PRIVATE = {
    "noise": DpSgd(0.7, 0.5),
    "no noise": DpSgd(0.0, 0.3),
    "no bound": DpSgd(0.0, float("inf")),
    "in parts": DpSgd(0.7, 0.5, max_physical_batch_size=2),
}


@pytest.mark.parametrize("label", PRIVATE)
def test_private_steps(label):
    """Batches are Poisson samples of five on average, and some of them empty."""
    agree("mlp", supervised, Training(batch_size=5, epochs=2), PRIVATE[label])


@pytest.mark.parametrize("name", ["cnn", "resnet8", "vit-tiny", "gpt-tiny"])
def test_private_networks(name):
    agree(name, supervised, Training(batch_size=4), PRIVATE["noise"])


@pytest.mark.parametrize("label", MERGED)
def test_private_terms(label):
    training = Training(batch_size=5, momentum=0.5, max_grad_norm=0.4)
    agree("mlp", MERGED[label], training, PRIVATE["noise"])


def test_private_steps_with_prefixes_rounded_up():
    agree("mlp", supervised, Training(batch_size=2, epochs=2), PRIVATE["noise"], bucketed=True)


def test_gradients_in_parts_are_the_gradients_at_once(monkeypatch):
    monkeypatch.setattr("fedkd.clients.stacked.clipped.BYTES_AT_ONCE", 1)
    agree("mlp", supervised, Training(batch_size=5), PRIVATE["noise"])


def test_an_example_without_a_finite_gradient_contributes_nothing():
    def spoilt(model, split, k):
        if k == 2:
            split.x[3] = torch.inf
        return [Supervised()]

    agree("mlp", spoilt, Training(batch_size=5, epochs=2), PRIVATE["noise"])


def test_a_client_that_diverges_gets_its_error_and_others_go_on():
    def spoilt(model, split, k):
        if k == 2:
            split.x[3] = torch.nan
        return [Supervised()]

    made = [requests("mlp", spoilt, Training(batch_size=5)) for _ in range(2)]
    with pytest.raises(RunError) as error:
        r = made[0][2]
        fit(r.model, r.data, r.terms, r.training, r.lr, r.rng)
    one = stack(made[1])
    results = general.train(one)
    place = one.plan.order.index(2)
    assert isinstance(results[place], RunError)
    assert str(results[place]) == str(error.value)
    for k in (0, 1, 3, 4):
        r = made[0][k]
        fit(r.model, r.data, r.terms, r.training, r.lr, r.rng)
        assert gap([parameters(r)], [parameters(made[1][k])]) < 1e-9
        assert isinstance(results[one.plan.order.index(k)], FitResult)


class Doubled(Supervised):
    def __call__(self, batch):
        return 2 * super().__call__(batch)


def test_what_differs_is_not_merged():
    splits = [data(0), data(1)]
    kl, table = KullbackLeibler(), ClassTargets(probs(Rng(0), 4, 4), torch.ones(4) > 0)
    samples = [SampleTargets(probs(Rng(0), n, 4)) for n in SIZES[:2]]
    nets = [network("mlp", k) for k in range(2)]
    start = [dict(net.named_parameters()) for net in nets]
    small, large = (make_head(6, hidden, 4, Rng(0), {}) for hidden in (3, 5))
    hot = torch.ones(SIZES[0])
    pairs = [
        (Supervised(), Supervised(0.5)),
        (Supervised(), Supervised(label_smoothing=0.1)),
        (Supervised(), Doubled()),
        (Doubled(), Doubled()),
        (Proximal(nets[0], start[0], 0.1), Proximal(nets[1], start[1], 0.2)),
        (
            Proximal(nets[0], start[0], 0.1),
            Proximal(nets[1], {"head.bias": nets[1].head.bias}, 0.1),
        ),
        (HeadSupervised(small, "fc2", 1.0), HeadSupervised(large, "fc2", 1.0)),
        (HeadSupervised(small, "fc2", 1.0), HeadSupervised(small, "fc1", 1.0)),
        (Distil(kl, table, 1.0, 1.0), Distil(kl, table, 2.0, 1.0)),
        (Distil(kl, table, hot, 1.0), Distil(kl, table, 2.0, 1.0)),
        (Distil(kl, table, 1.0, 1.0), Distil(kl, samples[1], 1.0, 1.0)),
        (Distil(kl, table, 1.0, 1.0), Distil(kl, table, 1.0, 1.0, rescale=False)),
        (Distil(kl, table, 1.0, 1.0), Distil(kl, table, 1.0, 1.0, counts=hot)),
        (Distil(kl, table, 1.0, 1.0), Distil(kl, table, 1.0, 1.0, small, "fc2")),
        (NotTrue(hot, 1.0, 1.0), NotTrue(hot, 2.0, 1.0)),
        (FeatureMatch(table, "fc1", 1.0), FeatureMatch(table, "fc2", 1.0)),
    ]
    for pair in pairs:
        assert type(pair[0]).merged(pair, splits) is None, pair
        if type(pair[0]) is not Doubled:
            assert type(pair[0]).merged((pair[0], pair[0]), [splits[0]] * 2) is not None


def foreign(model, split, k):
    other = network("mlp", k)
    return [
        Supervised(),
        Proximal(other, {n: p.detach() for n, p in other.named_parameters()}, 1.0),
    ]


def frozen_peers(model, split, k):
    return [Supervised(), FromPeer(Peer(network("mlp", 9)), 1.0)]


SHARED = make_head(6, 0, 4, Rng(0), {}).double()


def one_head_for_all(model, split, k):
    return [Supervised(), HeadSupervised(SHARED, "fc2", 0.5)]


def test_a_term_on_another_network_is_not_merged():
    assert stack(requests("mlp", foreign, Training(batch_size=5))) is None


@pytest.mark.parametrize("terms", [frozen_peers, one_head_for_all])
def test_what_is_no_stack_is_trained_one_after_the_other(terms, monkeypatch):
    called = []
    real = general.alone
    monkeypatch.setattr(general, "alone", lambda r: called.append(1) or real(r))
    made = stack(requests("mlp", terms, Training(batch_size=5)))
    assert made is not None
    assert all(isinstance(found, FitResult) for found in general.train(made))
    assert called


@pytest.mark.parametrize("layer", [torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(6)])
def test_layers_that_cannot_be_stacked_are_named(layer):
    made = requests("mlp", supervised, Training(batch_size=5))
    assert general.reason(made[0]) == ""
    made[0].model.fc2.append(layer)
    assert type(layer).__name__ in general.reason(made[0])


def test_a_network_that_vmap_cannot_run_is_trained_one_after_the_other():
    made = requests("lstm", supervised, Training(batch_size=5))
    alone = requests("lstm", supervised, Training(batch_size=5))
    for r in alone:
        fit(r.model, r.data, r.terms, r.training, r.lr, r.rng)
    assert all(isinstance(found, FitResult) for found in general.train(stack(made)))
    assert gap([parameters(r) for r in alone], [parameters(r) for r in made]) == 0
