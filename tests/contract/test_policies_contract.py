"""What every registered target policy promises: read off its class, and then tried."""

import dataclasses

import pytest
import torch

from fedkd.distill.chosen import chosen_policy
from fedkd.distill.objectives.base import objectives
from fedkd.distill.policies.base import Taught, policies
from fedkd.options import build
from fedkd.rng import Rng

NAMES = policies.names()
N, CLASSES, TEACHERS = 8, 5, 3
CASES = [
    *((name, {}) for name in NAMES),
    ("confidence-gate", {"soft": True, "cooled": True}),
    ("entropy-gate", {"cooled": True, "most": 0.8}),
    ("ferkd", {"low": 0.1, "middle": 0.4, "top": 0.6, "cooled": True}),
    ("taid", {"adaptive": False}),
    ("temperature", {"schedule": "cosine"}),
    ("meal", {"adversarial": False}),
    ("mst", {"top": None}),
    ("tgeo", {"features": "edges"}),
    ("weight", {"schedule": "cosine", "until": 0.7}),
]


def told(case):
    return "-".join([case[0], *(f"{key}={value}" for key, value in case[1].items())])


def made(case, kept=None):
    policy = build(policies.get(case[0]), case[1])
    policy.remember(kept or {})
    policy.sized(CLASSES, TEACHERS, Rng(8))
    return policy


every = pytest.mark.parametrize("name", NAMES)
each = pytest.mark.parametrize("case", CASES, ids=told)
alone = pytest.mark.parametrize("case", [c for c in CASES if made(c).dp == "per-example"], ids=told)
LABELS = torch.tensor([0, -1, 2, 3, -1, 1, 4, 0])
HOT = torch.tensor([1.0, 2.0, 4.0, 1.0, 3.0, 2.0, 1.5, 8.0])


def drawn(seed):
    return 2 * torch.randn(N, CLASSES, generator=Rng(seed).torch(), dtype=torch.float64)


def batch(seed=0, at=2.0, progress=0.4, **more):
    heat = at.unsqueeze(1) if isinstance(at, torch.Tensor) else at
    given = {"labels": LABELS, "weights": torch.linspace(0.5, 2.0, N, dtype=torch.float64)}
    said = [torch.softmax(3 * drawn(seed + 2 + k) / heat, 1) for k in range(TEACHERS)]
    given["teachers"] = torch.stack(said)
    probs = torch.softmax(3 * drawn(seed + 1) / heat, 1)
    return Taught(drawn(seed).requires_grad_(), probs, at, progress=progress, **(given | more))


def rows(taught, index):
    def some(value):
        return value[index] if isinstance(value, torch.Tensor) else value

    fields = [f.name for f in dataclasses.fields(taught) if f.name != "teachers"]
    found = {name: some(getattr(taught, name)) for name in fields}
    return Taught(**found, teachers=taught.teachers[:, index])


def heat(taught):
    """The temperature of each example."""
    return torch.as_tensor(taught.temperature, dtype=torch.float64).expand(len(taught.probs))


def same(one, other, atol=0.0):
    for field in ("probs", "weights"):
        a, b = getattr(one, field), getattr(other, field)
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=0, atol=atol)
    assert torch.allclose(heat(one), heat(other), rtol=0, atol=atol)


@every
def test_it_says_what_it_is_and_where_from(name):
    policy = chosen_policy(name)
    assert dataclasses.is_dataclass(policy) and policies.summary(name).endswith(".")
    assert policy.source and policy.evidence in ("paper", "code", "reconstruction")
    doc = type(policy).__doc__
    assert "Limits:" in doc or name == "correct-gate"
    assert ("A reconstruction" in doc) == (policy.evidence == "reconstruction")
    described = type(policy).__pydantic_fields__.values()
    assert all(field.description for field in described)


@each
@pytest.mark.parametrize("at", [2.0, HOT], ids=["one", "own"])
def test_targets_stay_distributions_and_everything_is_of_its_shape(case, at):
    given = batch(at=at)
    before = rows(given, torch.arange(N))
    found = made(case)(given)
    assert found.probs.shape == (N, CLASSES) and found.probs.dtype == torch.float64
    assert (found.probs >= 0).all()
    assert torch.allclose(found.probs.sum(1), torch.ones(N, dtype=torch.float64), atol=1e-12)
    assert found.weights.shape == (N,) and (found.weights >= 0).all()
    assert heat(found).shape == (N,) and (heat(found) > 0).all()
    assert found.logits is given.logits and found.progress == given.progress
    same(given, before)


@each
def test_nobody_but_a_trained_module_is_reached_by_gradients_of_targets(case):
    policy = made(case)
    found = policy(batch())
    # The gates of mst, and what meal tells apart, are reached by a penalty.
    assert found.probs.requires_grad == (case[0] in ("ctkd", "tgeo"))
    if found.probs.requires_grad:
        own = [p for module in policy.modules() for p in module.parameters()]
        wanted = torch.autograd.grad(found.probs[:, 0].sum(), own, retain_graph=True)
        assert all(torch.isfinite(g).all() and g.any() for g in wanted)
        reached = torch.autograd.grad(found.probs[:, 0].sum(), found.logits, allow_unused=True)
        assert reached == (None,)


@each
def test_labels_are_read_by_those_who_say_so_and_no_others(case):
    policy, other = made(case), torch.tensor([3, 2, -1, 0, 1, 4, 0, 2])
    first, second = made(case)(batch()), made(case)(batch(labels=other))
    if not policy.labels:
        same(first, second)
        return same(first, made(case)(batch(labels=None)))
    changed = (first.probs != second.probs).any() or (first.weights != second.weights).any()
    assert changed
    nobody = made(case)(batch(labels=torch.full((N,), -1)))
    same(made(case)(batch(labels=None)), nobody)


@alone
def test_what_becomes_of_an_example_depends_on_it_alone(case):
    policy, given = made(case), batch(at=HOT)
    whole = policy(given)
    policy.seen(torch.linspace(0.1, 9.0, N))
    same(policy(given), whole)
    assert not policy.arrays() and not policy.modules()
    for i in range(N):
        index = torch.tensor([i])
        same(policy(rows(given, index)), rows(whole, index), atol=1e-12)


@pytest.mark.parametrize("name", [n for n in NAMES if chosen_policy(n).dp != "per-example"])
def test_who_says_that_it_mixes_examples_does(name):
    """Either losses of the batch move it, or a parameter that all examples share."""
    policy = made((name, {}))
    assert policy.dp == "batch-coupled"
    before = policy(batch()).probs
    for value in (2.0, 1.0):
        policy.seen(torch.full((N,), value))
    assert policy.modules() or not torch.equal(policy(batch()).probs, before)


@each
def test_the_order_of_a_batch_does_not_matter(case):
    order = torch.randperm(N, generator=Rng(3).torch())
    given = batch(at=HOT)
    same(made(case)(rows(given, order)), rows(made(case)(given), order), atol=1e-12)


def run(policy, steps):
    """Teach a batch by KL and move what is trained; return everything that was taught."""
    found = []
    for step in steps:
        given = batch(seed=10 * step, progress=step / 8)
        taught = policy(given)
        values = objectives.get("kl")()(given.logits, taught.probs, taught.temperature)
        policy.seen(values.detach())
        more = policy.penalty(taught)
        values = values if more is None else values + more
        own = [p for module in policy.modules() for p in module.parameters()]
        found_by = torch.autograd.grad(values.mean(), own) if own else ()
        if "validation" in policy.needs:
            policy.learn(found_by)
        else:
            for p, g in zip(own, found_by, strict=True):
                p.data -= 0.5 * g
        found.append((taught.probs.detach(), heat(taught).detach(), taught.weights))
    return found


@each
def test_it_goes_on_from_what_it_remembers_to_the_same_bits(case):
    whole = run(made(case), range(6))
    first = made(case)
    begun = run(first, range(3))
    second = made(case, {key: value.copy() for key, value in first.arrays().items()})
    gone_on = [*begun, *run(second, range(3, 6))]
    for one, other in zip(whole, gone_on, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert {key: a.tobytes() for key, a in first.arrays().items()} != {
        key: a.tobytes() for key, a in second.arrays().items()
    } or not first.arrays()


@each
@pytest.mark.parametrize("name", ["kl", "reverse-kl", "soft-ce"])
def test_a_step_works_with_every_objective(case, name):
    policy, objective, given = made(case), objectives.get(name)(), batch(at=HOT)

    def cost(z):
        taught = policy(dataclasses.replace(given, logits=z))
        return (objective(z, taught.probs, taught.temperature) * taught.weights).mean()

    z = given.logits
    loss = cost(z)
    (g,) = torch.autograd.grad(loss, z)
    assert torch.isfinite(loss) and torch.isfinite(g).all()
    # TAID's teacher follows the student, and a temperature that is learned goes the other way.
    if case[0] not in ("taid", "ctkd"):
        assert g.any() and cost((z - 1e-3 * g).detach()) < loss


@each
@pytest.mark.parametrize("kind", ["one-hot", "nothing"])
def test_hard_targets_and_rows_without_any_stay_finite(case, kind):
    """Who has no target is masked later on: no gradient of it may be NaN before."""
    probs = torch.eye(CLASSES).repeat(2, 1)[:N] if kind == "one-hot" else torch.zeros(N, CLASSES)
    z = (100 * torch.eye(CLASSES).roll(1, 0).repeat(2, 1)[:N]).requires_grad_()
    said = probs.expand(TEACHERS, N, CLASSES)
    taught = made(case)(Taught(z, probs, 4.0, None, LABELS, 0.5, said))
    values = objectives.get("kl")()(z, taught.probs, taught.temperature)
    (g,) = torch.autograd.grad(values.sum(), z)
    assert taught.probs.dtype == torch.float32
    assert torch.isfinite(taught.probs).all() and torch.isfinite(g).all()
