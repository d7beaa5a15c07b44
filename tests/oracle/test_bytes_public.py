"""Bytes of the methods with a public pool against closed forms in examples and classes."""

import pytest

CLASSES, POOL, FLOAT = 10, 40, 4
PARAMS = (64 * 16 + 16) + (16 * 12 + 12) + (12 * CLASSES + CLASSES)


def played(tiny, play, options, changes=None):
    return play(tiny(options, {"rounds": 3, "data.public.size": POOL, **(changes or {})}))


def moved(run, round_, direction, phase="train"):
    return run.ledger.totals(round=round_, phase=phase, direction=direction).tensors


@pytest.mark.parametrize("participation", [1.0, 0.5])
@pytest.mark.parametrize(("subset", "n"), [(16, 16), (0, POOL), (5000, POOL)])
def test_fedmd_moves_logits_of_the_part_of_the_pool(subset, n, participation, tiny, play):
    options = {"name": "fedmd", "subset": subset}
    run = played(tiny, play, options, {"clients.participation.ratio": participation})
    one_way = {"logits": int(4 * participation) * n * CLASSES * FLOAT}
    assert [moved(run, r, "down") for r in (1, 2, 3)] == [{}, one_way, one_way]
    # Nobody would hear what is said in the last round.
    assert [moved(run, r, "up") for r in (1, 2, 3)] == [one_way, one_way, {}]
    assert moved(run, 3, "down", "evaluate") == {}


def test_fedmd_under_an_objective_sends_soft_labels_down(tiny, play):
    run = played(tiny, play, {"name": "fedmd", "digest_loss": "kl", "subset": 16})
    size = 4 * 16 * CLASSES * FLOAT
    assert (moved(run, 2, "up"), moved(run, 2, "down")) == ({"logits": size}, {"soft_labels": size})


def test_ds_fl_moves_soft_labels_and_the_global_network_to_be_judged(tiny, play):
    run = played(tiny, play, {"name": "ds-fl", "subset": 16})
    one_way = {"soft_labels": 4 * 16 * CLASSES * FLOAT}
    assert [moved(run, r, "down") for r in (1, 2, 3)] == [{}, one_way, one_way]
    assert [moved(run, r, "up") for r in (1, 2, 3)] == [one_way, one_way, one_way]
    assert moved(run, 3, "down", "evaluate") == {"model": 4 * PARAMS * FLOAT}


def test_ds_fl_without_global_network(tiny, play):
    run = played(tiny, play, {"name": "ds-fl", "server_epochs": 0})
    one_way = {"soft_labels": 4 * POOL * CLASSES * FLOAT}
    assert [moved(run, r, "up") for r in (1, 2, 3)] == [one_way, one_way, {}]
    assert moved(run, 3, "down", "evaluate") == {}


def test_ds_fl_with_deaf_clients_only_uploads(tiny, play):
    run = played(tiny, play, {"name": "ds-fl", "digest_epochs": 0})
    one_way = {"soft_labels": 4 * POOL * CLASSES * FLOAT}
    assert [moved(run, r, "up") for r in (1, 2, 3)] == [one_way] * 3
    assert [moved(run, r, "down") for r in (1, 2, 3)] == [{}] * 3


@pytest.mark.parametrize("name", ["fedmd", "ds-fl"])
def test_class_counts_travel_where_the_rule_needs_them(name, tiny, play):
    options = {"name": name, "fusion": "class-counts", "subset": 16}
    run = played(tiny, play, options | ({"digest_loss": "kl"} if name == "fedmd" else {}))
    kind = "logits" if name == "fedmd" else "soft_labels"
    up = {kind: 4 * 16 * CLASSES * FLOAT, "counts": 4 * CLASSES * FLOAT}
    assert moved(run, 2, "up") == up


@pytest.mark.parametrize(("name", "kind"), [("fedmd", "logits"), ("ds-fl", "soft_labels")])
def test_clients_without_examples_say_nothing(name, kind, tiny, play):
    sparse = {"name": "dirichlet", "alpha": 0.01, "allow_empty": True}
    run = played(tiny, play, name, {"clients.count": 12, "data.partition": sparse})
    voters = sum(c.examples > 0 for c in run.prepared.setting.clients)
    assert 0 < voters < 12
    assert moved(run, 1, "up") == {kind: voters * POOL * CLASSES * FLOAT}
    assert moved(run, 2, "down") == {kind: 12 * POOL * CLASSES * FLOAT}
