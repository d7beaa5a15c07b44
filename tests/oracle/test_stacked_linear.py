"""The fused route against the one loop: the same networks, losses and errors, client by client."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from fedkd.clients.dp_sgd import DpSgd
from fedkd.clients.local import Batch, FitResult, Term, fit
from fedkd.clients.stacked import linear
from fedkd.clients.stacked.request import Request, key, reason, stacked
from fedkd.clients.stacked.stack import stack
from fedkd.clients.terms import Distil, Proximal, Supervised
from fedkd.clients.training import Training
from fedkd.data.federated import Split
from fedkd.distill.objectives.kl import KullbackLeibler
from fedkd.distill.targets import ClassTargets
from fedkd.errors import RunError
from fedkd.models.base import BlockNet
from fedkd.rng import Rng

SIZES = (5, 1, 17, 12, 4, 30)
Terms = Callable[[BlockNet, Split, torch.Generator], list[Term]]


def network(g: torch.Generator, dtype: torch.dtype, activation: type[nn.Module] = nn.ReLU) -> Any:
    net = BlockNet(
        {
            "fc1": nn.Sequential(nn.Flatten(), nn.Linear(6, 7), activation()),
            "fc2": nn.Sequential(nn.Sequential(nn.Linear(7, 5, bias=False)), nn.Identity()),
            "fc3": nn.Sequential(activation(), nn.Linear(5, 4), activation()),
        },
        nn.Linear(4, 3),
    ).to(dtype)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) / 2)
    return net


def supervised(model: BlockNet, data: Split, g: torch.Generator) -> list[Term]:
    return [Supervised()]


def requests(
    training: Training,
    terms: Terms = supervised,
    sizes: Sequence[int] = SIZES,
    dtype: torch.dtype = torch.float64,
    dp: DpSgd | None = None,
    activation: type[nn.Module] = nn.ReLU,
) -> list[Request]:
    found = []
    for k, n in enumerate(sizes):
        g = Rng(7).child("client", k).torch()
        x = torch.randn(n, 2, 3, generator=g, dtype=torch.float64).to(dtype)
        data = Split(x, torch.randint(0, 3, (n,), generator=g))
        model = network(g, dtype, activation)
        own = terms(model, data, g)
        rng = Rng(3).child("local", k)
        found.append(Request(model, data, own, training, 0.3, rng, dp))
    return found


def alone(given: Request) -> FitResult:
    return fit(given.model, given.data, given.terms, given.training, given.lr, given.rng, given.dp)


def compare(make: Callable[[], list[Request]], tolerance: float = 1e-12) -> None:
    mine, theirs = make(), make()
    before = [copy.deepcopy(r.model) for r in mine]
    assert len({key(r) for r in mine}) == 1
    assert key(mine[0]) is not None
    made = stack(mine)
    assert made is not None
    found = linear.train(made)
    for request, result in zip(made.requests, found, strict=True):
        k = mine.index(request)
        expected = alone(theirs[k])
        assert isinstance(result, FitResult)
        assert (result.steps, result.examples) == (expected.steps, expected.examples)
        assert result.private == expected.private
        assert result.losses == pytest.approx(expected.losses, rel=1e-5, abs=1e-6)
        moved = 0.0
        for (name, p), q, old in zip(
            request.model.named_parameters(),
            theirs[k].model.parameters(),
            before[k].parameters(),
            strict=True,
        ):
            assert p.requires_grad
            torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance, msg=f"{k} {name}")
            moved = max(moved, float((p - old).detach().abs().max()))
        assert moved > 1e-3 or not result.examples


def with_distillation(model: BlockNet, data: Split, g: torch.Generator) -> list[Term]:
    probs = torch.rand(3, 3, generator=g, dtype=torch.float64).to(data.x.dtype)
    targets = ClassTargets(probs / probs.sum(1, keepdim=True), torch.tensor([True, True, False]))
    return [Supervised(), Distil(KullbackLeibler(), targets, 2.0, 0.5)]


def proximal(model: BlockNet, data: Split, g: torch.Generator) -> list[Term]:
    reference = {n: p.detach() + 0.1 for n, p in model.named_parameters()}
    return [Supervised(), Proximal(model, reference, 0.7)]


def smoothed(model: BlockNet, data: Split, g: torch.Generator) -> list[Term]:
    return [Supervised(1.7, 0.2)]


class Pull(Term):
    """Pulls features of a block towards 1: reads features, and not the logits."""

    name = "pull"

    def __init__(self, weight: float, block: str) -> None:
        self.weight, self.block = weight, block

    def __call__(self, batch: Batch) -> torch.Tensor:
        return (batch.features[self.block] - 1).square().mean(1)

    def at(self) -> frozenset[str]:
        return frozenset({self.block})

    @classmethod
    def merged(cls, terms: Any, data: Any) -> Term:
        return terms[0]


def on_features(model: BlockNet, data: Split, g: torch.Generator) -> list[Term]:
    return [Pull(0.5, "fc2"), Pull(0.25, "head"), Supervised(), Pull(0.1, "fc1")]


def only_features(model: BlockNet, data: Split, g: torch.Generator) -> list[Term]:
    return [Pull(1.0, "fc2")]


TERMS = [supervised, smoothed, with_distillation, proximal, on_features, only_features]
TRAININGS = {
    "plain": Training(batch_size=4),
    "epochs": Training(batch_size=4, epochs=3),
    "steps": Training(batch_size=4, steps=7),
    "one-batch": Training(batch_size=64, epochs=2),
    "decay": Training(batch_size=4, weight_decay=0.1),
    "momentum": Training(batch_size=4, epochs=2, momentum=0.9),
    "momentum-decay": Training(batch_size=4, momentum=0.8, weight_decay=0.05),
    "clipped": Training(batch_size=4, max_grad_norm=0.3),
    "adam": Training(batch_size=4, epochs=2, optimizer="adam", weight_decay=0.01),
    "frozen": Training(batch_size=4, frozen=("fc1", "fc3"), momentum=0.5),
    "head-only": Training(batch_size=4, frozen=("fc1", "fc2", "fc3"), max_grad_norm=1.0),
}
DPS = {
    "noise": DpSgd(noise_multiplier=0.7, max_grad_norm=0.4, address="a"),
    "no-noise": DpSgd(noise_multiplier=0.0, max_grad_norm=0.05),
    "unclipped": DpSgd(noise_multiplier=0.0, max_grad_norm=float("inf")),
    "by-opacus": DpSgd(noise_multiplier=0.5, max_grad_norm=0.2, mode="hooks"),
    "parts": DpSgd(noise_multiplier=0.3, max_physical_batch_size=2),
}


@pytest.mark.parametrize("training", TRAININGS.values(), ids=TRAININGS)
@pytest.mark.parametrize("terms", [supervised, with_distillation, proximal])
def test_every_option_equals_the_loop_in_double_precision(training, terms):
    compare(lambda: requests(training, terms))


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("training", [TRAININGS["plain"], TRAININGS["adam"]])
def test_every_term_equals_the_loop_in_double_precision(training, terms):
    compare(lambda: requests(training, terms))


@pytest.mark.parametrize("dp", DPS.values(), ids=DPS)
@pytest.mark.parametrize("name", ["plain", "momentum-decay", "clipped", "adam", "frozen", "steps"])
def test_private_steps_equal_those_of_opacus(name, dp):
    compare(lambda: requests(TRAININGS[name], dp=dp), 1e-9)


@pytest.mark.parametrize("terms", TERMS)
def test_private_steps_equal_those_of_opacus_for_every_term(terms):
    compare(lambda: requests(TRAININGS["plain"], terms, dp=DPS["noise"]), 1e-9)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.Sigmoid])
def test_other_activations(activation):
    compare(lambda: requests(TRAININGS["plain"], activation=activation))


@pytest.mark.parametrize("name", ["plain", "momentum", "clipped"])
def test_single_precision(name):
    compare(lambda: requests(TRAININGS[name], dtype=torch.float32), 1e-6)


def test_private_steps_in_single_precision():
    compare(lambda: requests(TRAININGS["plain"], dtype=torch.float32, dp=DPS["noise"]), 1e-5)


@pytest.mark.parametrize("sizes", [(9,), (1,), (3, 3, 3), tuple(range(1, 14))])
def test_any_sizes(sizes):
    compare(lambda: requests(TRAININGS["epochs"], sizes=sizes))


def test_noise_of_each_clients_own_strength():
    def make() -> list[Request]:
        found = requests(TRAININGS["plain"], dp=DPS["noise"])
        return [
            replace(r, dp=replace(DPS["noise"], noise_multiplier=0.2 * k, address=str(k)))
            for k, r in enumerate(found)
        ]

    compare(make, 1e-9)


def test_a_client_does_not_depend_on_its_mates():
    together = requests(TRAININGS["momentum"])
    stacked(together)
    few = requests(TRAININGS["momentum"])
    stacked([few[4], few[2]])
    for k in (2, 4):
        for p, q in zip(together[k].model.parameters(), few[k].model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dp", [None, DPS["noise"]])
def test_the_same_group_gives_the_same_bits(dp):
    runs = [requests(TRAININGS["momentum"], with_distillation, dp=dp) for _ in range(2)]
    results = [stacked(run) for run in runs]
    assert results[0] == results[1]
    for a, b in zip(*runs, strict=True):
        assert all(map(torch.equal, a.model.parameters(), b.model.parameters()))


def spoiled(training: Training, terms: Terms = supervised) -> list[Request]:
    found = requests(training, terms)
    with torch.no_grad():
        found[3].model.head.weight.fill_(1e308)
    found[2].data.x[1] = float("nan")
    return found


@pytest.mark.parametrize("terms", [supervised, with_distillation, proximal])
@pytest.mark.parametrize("name", ["plain", "clipped", "adam"])
def test_who_diverges_gets_the_very_error_of_fit_and_harms_nobody(name, terms):
    mine, theirs, sane = (
        spoiled(TRAININGS[name], terms),
        spoiled(TRAININGS[name], terms),
        requests(TRAININGS[name], terms),
    )
    made = stack(mine)
    assert made is not None
    found = linear.train(made)
    for request, result in zip(made.requests, found, strict=True):
        k = mine.index(request)
        if k in (2, 3):
            with pytest.raises(RunError) as error:
                alone(theirs[k])
            assert isinstance(result, RunError)
            assert str(result) == str(error.value)
            continue
        expected = alone(sane[k])
        assert isinstance(result, FitResult)
        assert result.losses == pytest.approx(expected.losses, rel=1e-5)
        for p, q in zip(request.model.parameters(), sane[k].model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_an_example_without_finite_gradient_is_left_out_of_private_steps():
    def make() -> list[Request]:
        found = requests(TRAININGS["epochs"], dp=DPS["noise"])
        found[2].data.x[1] = float("nan")
        found[5].data.x[:] = float("inf")
        return found

    compare(make, 1e-9)


def test_results_come_in_the_order_of_requests_also_of_those_that_are_trained_alone():
    given = requests(TRAININGS["plain"])
    given[1] = replace(given[1], data=Split(given[1].data.x[:0], given[1].data.y[:0]))
    assert "nothing to learn" in reason(given[1])
    assert key(given[1]) is None
    results = stacked(given)
    assert [r.examples for r in results if isinstance(r, FitResult)] == [5, 0, 17, 12, 4, 30]


def test_a_label_that_is_no_class_is_one_clients_error():
    given, sane = requests(TRAININGS["plain"]), requests(TRAININGS["plain"])
    given[0].data.y[2] = 3
    results = stacked(given)
    assert isinstance(results[0], IndexError)
    assert results[1:] == [alone(r) for r in sane[1:]]


def test_keys_tell_what_can_be_stacked_from_what_cannot():
    plain = requests(TRAININGS["plain"])[0]
    same = requests(TRAININGS["plain"])[2]
    assert key(plain) == key(same)
    other = [
        requests(TRAININGS["epochs"])[0],
        requests(TRAININGS["plain"], smoothed)[0],
        requests(TRAININGS["plain"], proximal)[0],
        requests(TRAININGS["plain"], dtype=torch.float32)[0],
        requests(TRAININGS["plain"], activation=nn.Tanh)[0],
        requests(TRAININGS["plain"], dp=DPS["noise"])[0],
        requests(TRAININGS["plain"], dp=DPS["no-noise"])[0],
        replace(plain, lr=0.1),
        replace(plain, terms=[Supervised(), Supervised()]),
        replace(plain, data=Split(plain.data.x[:, :, :2], plain.data.y)),
    ]
    keys = [key(request) for request in [plain, *other]]
    assert len(set(keys)) == len(keys)
    assert None not in keys
    held = requests(TRAININGS["plain"])[0]
    held.model.head.bias.requires_grad_(False)
    assert key(held) != key(plain)
    noise = [requests(TRAININGS["plain"], dp=DPS["noise"])[0] for _ in range(2)]
    noise[1] = replace(noise[1], dp=replace(DPS["noise"], address="b", noise_multiplier=2.0))
    assert key(noise[0]) == key(noise[1])


class Own(Training):
    """An optimizer of its own."""


class Coupled(Supervised):
    """A term that knows of one client only."""

    dp = "batch-coupled"


class Lonely(Term):
    """A term that says nothing of how it would be merged."""

    weight = 1.0

    def __call__(self, batch: Batch) -> torch.Tensor:
        return batch.logits.square().sum(1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"training": Own(batch_size=4)}, "Own may choose"),
        ({"terms": []}, "nothing to learn"),
        ({"terms": [Coupled()]}, "compares the examples"),
        ({"terms": [Lonely()]}, "of one client only"),
        ({"training": Training(frozen=("fc1", "fc2", "fc3", "head"))}, "nothing to train"),
        ({"training": Training(frozen=("fc9",))}, "not there"),
        ({"training": Training(precision="bf16")}, "bf16"),
    ],
)
def test_the_reason_says_why_a_fit_is_done_alone(change, said):
    request = replace(requests(TRAININGS["plain"])[0], **change)
    assert said in reason(request)
    assert key(request) is None
