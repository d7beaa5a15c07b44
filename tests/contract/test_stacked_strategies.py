"""Every strategy's local work, stacked: the same weights as one client after the other."""

import copy
from collections import defaultdict

import pytest
import torch
from test_strategies import BRIEF, QUICK, SMALL

from fedkd.clients.local import FitResult, fit
from fedkd.clients.stacked.request import Request, key, reason, stacked
from fedkd.engine.client_app import ClientSide
from fedkd.strategies.base import strategies

WITHIN = 1e-5
"""Weights of a fit in single precision, after a few steps from the same start."""

ALONE = {
    "dho": {"the term 'pool_distil' (OnPool) is of one client only"},
    "fedgen": {"the term 'generated' (Generated) is of one client only"},
    "fedkd-wu2022": {"the term 'distil' compares the examples of a batch"},
}
"""Strategies of which some fits are done alone, and why."""

VARIANTS = {
    "fedd2s": [
        {"reading": "averaging", "kd_weight": 1.0, "drop_every": 2, "drops": 2},
        {"reading": "cut", "share": "own", "payload": "per_sample", **QUICK},
        {"reading": "up_to_cut", "fuse_points": True, "drops": 0, **QUICK},
    ],
    "fedhkd": [{"lam": 0.0, "gamma": 1.0}],
    "fedmd": [{"digest_loss": "kl", "temperature": 2.0, "subset": 16, "pretrain_epochs": 1}],
    "fedgkd": [
        {"objective": "mse", "coefficient": 1.0, "models": 2},
        {"objective": {"name": "ofa", "branches": ["all"]}},
    ],
    "fml": [{"alpha": 1, "beta": 0}],
    "dho": [{"supervised_head": "averaged"}],
    "fedproto": [{"block": "fc1"}],
    "fedgen": [{"share": "head", "beta": 1.0, "fidelity": "teachers", "generator_steps": 2}],
    "feddf": [{"inputs": "generator", **{k: v for k, v in BRIEF.items() if "synthesis" not in k}}],
}
"""Options under which clients train on other terms."""

CASES = [pytest.param({"name": n, **SMALL.get(n, {})}, id=n) for n in strategies.names()]
CASES += [
    pytest.param({"name": name, **options}, id=f"{name}-{i}")
    for name, several in VARIANTS.items()
    for i, options in enumerate(several)
    if name != "feddf"
]
MORE = {
    "evaluate.every": 5,
    "rounds": 3,
    "clients.training.momentum": 0.5,
}


@pytest.fixture
def fits(monkeypatch):
    """All fits of clients in a run: as they were asked for, and what became of them, alone."""
    found = []

    def recording(model, data, terms, training, lr, rng, dp=None):
        # Terms read and train modules of their own client: all are copied together.
        before = copy.deepcopy((model, list(terms)))
        result = fit(model, data, terms, training, lr, rng, dp)
        request = Request(before[0], data, before[1], training, lr, rng, dp)
        found.append((request, weights(model, terms), result))
        return result

    make = ClientSide.client

    def client(self, context, round_):
        made = make(self, context, round_)
        made.fitter = recording
        return made

    monkeypatch.setattr(ClientSide, "client", client)
    return found


def weights(model, terms):
    parts = [model, *(module for term in terms for module in term.modules())]
    return [p.detach().clone() for part in parts for p in part.parameters()]


def cohorts(fits):
    """Fits that one group of clients asks for at the same time, as the executor gathers them."""
    found = defaultdict(list)
    for one in fits:
        request = one[0]
        found[request.rng.path[:-1], key(request)].append(one)
    return found


@pytest.mark.parametrize("strategy", CASES)
def test_a_cohort_trains_as_its_clients_do(strategy, tiny, play, fits, monkeypatch):
    # Four clients are too few for the general route to pay; it has to be right all the same.
    monkeypatch.setattr("fedkd.clients.stacked.request.MANY", 2)
    play(tiny(strategy, MORE))
    largest, refused = 1, set()
    for (_, common), group in cohorts(fits).items():
        requests = [request for request, _, _ in group]
        if common is None:
            refused |= {reason(request) for request in requests if len(request.data)}
            continue
        largest = max(largest, len(group))
        for (request, trained, expected), result in zip(group, stacked(requests), strict=True):
            assert isinstance(result, FitResult), result
            assert (result.steps, result.examples) == (expected.steps, expected.examples)
            assert result.losses == pytest.approx(expected.losses, rel=1e-4, abs=1e-5)
            found = weights(request.model, request.terms)
            for mine, theirs in zip(found, trained, strict=True):
                assert torch.allclose(mine, theirs, rtol=0, atol=WITHIN)
    print(strategy["name"], "largest stack:", largest, "alone:", sorted(refused) or "nothing")
    assert refused == ALONE.get(strategy["name"], set())
    assert largest == (1 if strategy["name"] in ("centralized", "fedkd-wu2022") else 4)
