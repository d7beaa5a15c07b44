"""Bytes of FedGKT and FedCache, which speak of single examples, against closed forms."""

import math

import pytest

CLASSES, D1, D2 = 10, 16, 12
FLOAT = INT = 4
FC2, HEAD = D1 * D2 + D2, D2 * CLASSES + CLASSES


def moved(run, round_, direction, phase="train"):
    return run.ledger.totals(round=round_, phase=phase, direction=direction).tensors


def examples(run, cohort=range(4)):
    return sum(run.prepared.setting.clients[k].examples for k in cohort)


def cohorts(run):
    return {r: set(run.strategy.cohort(r)) for r in range(1, run.experiment.rounds + 1)}


@pytest.mark.parametrize(("cut", "d", "server"), [("", D1, FC2 + HEAD), ("fc2", D2, HEAD)])
def test_fedgkt(cut, d, server, tiny, play):
    run = play(tiny({"name": "fedgkt", "cut": cut, "server_epochs": 1}, {"rounds": 3}))
    n = examples(run)
    assert n > 100
    for round_ in (1, 2, 3):
        up = {"features": n * (d * FLOAT + INT), "logits": n * CLASSES * FLOAT}
        assert moved(run, round_, "up") == up
        assert moved(run, round_, "down", "evaluate") == {"model": 4 * server * FLOAT}
    assert moved(run, 1, "down") == {}
    for round_ in (2, 3):
        assert moved(run, round_, "down") == {"logits": n * CLASSES * FLOAT}


def test_fedgkt_sends_raw_maps(tiny, play):
    model = {"model": {"name": "cnn", "channels": [3, 4], "hidden": 5}}
    run = play(tiny({"name": "fedgkt", "server_epochs": 1}, {**model, "rounds": 1}))
    maps = 3 * 4 * 4
    assert moved(run, 1, "up")["features"] == examples(run) * (maps * FLOAT + INT)


def test_fedgkt_answers_only_who_was_there_before(tiny, play):
    half = {"clients.participation.ratio": 0.5, "rounds": 4}
    run = play(tiny({"name": "fedgkt", "server_epochs": 1}, half))
    seen = set()
    answered = []
    for round_, cohort in cohorts(run).items():
        n = examples(run, cohort & seen)
        assert moved(run, round_, "down") == ({"logits": n * CLASSES * FLOAT} if n else {})
        answered.append(n)
        seen |= cohort
    assert answered[0] == 0 < max(answered)


def test_fedgkt_without_distillation_answers_nobody(tiny, play):
    run = play(tiny({"name": "fedgkt", "alpha": 0, "server_epochs": 1}))
    assert all(moved(run, r, "down") == {} for r in (1, 2, 3))
    assert moved(run, 3, "up")["features"] > 0


@pytest.mark.parametrize("bits", [8, 12, 128])
def test_fedcache(bits, tiny, play):
    changes = {"rounds": 3, "data.partition.alpha": 0.1}
    run = play(tiny({"name": "fedcache", "bits": bits}, changes))
    counts = run.prepared.federation.counts()
    n = examples(run)
    shared = int(counts[:, (counts > 0).sum(0) > 1].sum())
    assert shared < n == counts.sum(), "some client holds a class alone"
    logits = n * CLASSES * FLOAT
    codes = n * (math.ceil(bits / 8) + INT)
    assert moved(run, 1, "up") == {"hashes": codes, "logits": logits}
    assert moved(run, 1, "down") == {}
    masks = sum(math.ceil(k / 8) for k in counts.sum(1))
    for round_ in (2, 3):
        assert moved(run, round_, "up") == {"logits": logits}
        assert moved(run, round_, "down") == {"logits": shared * CLASSES * FLOAT + masks}
    assert moved(run, 3, "down", "evaluate") == {}


def test_fedcache_takes_codes_once_from_each_client(tiny, play):
    half = {"clients.participation.ratio": 0.5, "rounds": 4}
    run = play(tiny({"name": "fedcache", "bits": 16}, half))
    seen, late = set(), 0
    for round_, cohort in cohorts(run).items():
        new = examples(run, cohort - seen)
        up = moved(run, round_, "up")
        assert up["logits"] == examples(run, cohort) * CLASSES * FLOAT
        assert up.get("hashes", 0) == new * (2 + INT)
        late += new if round_ > 1 else 0
        seen |= cohort
    assert late, "nobody joined late: choose another seed"


def test_fedcache_without_distillation_is_silent(tiny, play):
    run = play(tiny({"name": "fedcache", "beta": 0}))
    assert run.ledger.totals().tensors == {}
