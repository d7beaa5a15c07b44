"""A consensus that travels as its likeliest classes, and is kept: bytes, contents, memory."""

import numpy as np
import pytest
import torch

from fedkd.clients.participation import Participation
from fedkd.engine.setup import prepare
from fedkd.engine.simulate import in_process
from fedkd.errors import ConfigError
from fedkd.rng import Rng
from fedkd.strategies.public_exchange import positions
from fedkd.strategies.reinforcement import Kept, Packing, kept, unpacked
from fedkd.types import select

BRIEF = {
    "rounds": 3,
    "evaluate.every": 9,
    "clients.count": 2,
    "clients.training.steps": 2,
    "data.source.limit": 100,
}
FEDMD = {"name": "fedmd", "digest_loss": "kl", "subset": 16}
BOTH = [FEDMD, {"name": "ds-fl", "subset": 16, "server_epochs": 0}]
both = pytest.mark.parametrize("strategy", BOTH, ids=["fedmd", "ds-fl"])


def soft(*shape, seed=0):
    return torch.randn(*shape, generator=Rng(seed).torch()).softmax(-1).numpy()


@pytest.fixture(scope="module")
def played(tiny, play):
    """Return what plays a strategy, each case once."""
    runs = {}

    def go(strategy, changes=None, **options):
        made = tiny({**strategy, **options}, BRIEF | (changes or {}))
        if repr(made) not in runs:
            runs[repr(made)] = play(made)
        return runs[repr(made)]

    return go


def clients(run, bits):
    return {key: value for key, value in bits(run).items() if key != "server"}


@both
@pytest.mark.parametrize(
    ("options", "row"),
    [
        ({"top_k": 3}, 3 * (2 + 1)),
        ({"top_k": 4, "top_type": "float32"}, 4 * (4 + 1)),
        ({"top_k": 2, "top_type": "uint8"}, 2 * (1 + 1) + 2),
    ],
    ids=["float16", "float32", "uint8"],
)
def test_what_travels_down_is_the_list_and_nothing_else(strategy, options, row, played):
    """Two clients hear it in rounds 2 and 3: rows of 10 float32, or of k classes."""
    runs = [played(strategy, **more) for more in ({}, options)]
    down, up = ([r.ledger.totals(direction=d) for r in runs] for d in ("down", "up"))
    assert [d.tensors for d in down] == [{"soft_labels": 2 * 2 * 16 * n} for n in (40, row)]
    # The names of the arrays and of their types cost something too, for each message.
    assert down[1].wire < down[0].wire - 2 * 2 * (16 * (40 - row) - 400)
    assert up[0].tensors == up[1].tensors


@both
def test_a_client_is_taught_what_the_list_says(strategy, played):
    options = {"top_k": 3, "top_rest": "renormalise"}
    run = played(strategy, **options)
    arrays, full = select(run.state, "consensus/top"), run.state["consensus/scores"]
    assert arrays["ids"].dtype == np.uint8 and arrays["values"].dtype == np.float16
    strategy, setting = run.prepared.strategy, run.prepared.setting
    client = run.runtime.side.client(run.grid.contexts[1000], 3)
    sent = strategy.broadcast(run.state, client.info, int(run.state["consensus/round"][0]), setting)
    consensus, index, data = strategy.heard(client, sent)
    assert torch.equal(index, positions(40, 16, 0, 3)) and len(data) == 16
    likeliest = np.argsort(-full, axis=1, kind="stable")[:, :3]
    wanted = np.zeros_like(full)
    np.put_along_axis(wanted, likeliest, np.take_along_axis(full, likeliest, 1), 1)
    wanted /= wanted.sum(1, keepdims=True)
    assert np.allclose(consensus.numpy(), wanted, rtol=0, atol=2e-3)


@both
def test_all_classes_in_float32_teach_what_the_consensus_does(strategy, played, bits):
    whole = {"top_k": 10, "top_type": "float32"}
    assert clients(played(strategy, **whole), bits) == clients(played(strategy), bits)
    fewer = played(strategy, top_k=3)
    assert clients(fewer, bits) != clients(played(strategy), bits)
    other = played(strategy, top_k=3, top_rest="renormalise")
    assert clients(other, bits) != clients(fewer, bits)


@both
def test_what_was_sent_is_kept_and_costs_nothing_more(strategy, played):
    run, plain = played(strategy, cached_rounds=5), played(strategy)
    assert run.ledger.totals().tensors == plain.ledger.totals().tensors
    own = {r: positions(40, 16, 0, r).tolist() for r in (2, 3)}
    assert set(own[2]) - set(own[3])
    found = kept(run.client_state(0), 10, 0)
    assert found.at.tolist() == sorted({*own[2], *own[3]})
    assert found.round.tolist() == [3 if at in own[3] else 2 for at in found.at]
    last = found.some(found.round == 3)
    assert np.array_equal(Packing().dense(last.store), run.state["consensus/scores"])


@both
def test_after_its_rounds_a_target_is_dropped(strategy, played):
    """Of round 2 nothing is left in round 4 where targets last for one round."""
    four = {"rounds": 4}
    one, two = (
        kept(played(strategy, four, cached_rounds=n).client_state(0), 10, 0) for n in (1, 2)
    )
    assert set(one.round.tolist()) == {3, 4} and set(two.round.tolist()) == {2, 3, 4}
    assert set(one.at.tolist()) < set(two.at.tolist())


@pytest.mark.parametrize("more", [{}, {"top_k": 2, "top_type": "uint8"}], ids=["whole", "list"])
def test_a_client_learns_again_from_what_it_keeps_also_where_nobody_scored(
    more, tiny, play, monkeypatch
):
    """Client 0 hears in round 2, nobody scores in round 3, and what 1 missed it does not have."""
    plan = {1: [0, 1], 2: [0], 3: [], 4: [0, 1], 5: [0, 1]}
    monkeypatch.setattr(Participation, "cohort", lambda self, seed, r, clients: plan[r])
    changes = {**BRIEF, "rounds": 5}
    run = play(tiny({**FEDMD, **more, "cached_rounds": 3}, changes))

    def digested(r):
        found = run.log.by_client("loss/digest", "train", r)
        return np.flatnonzero(~np.isnan(found)).tolist()

    assert [digested(r) for r in (2, 4, 5)] == [[0], [0], [0, 1]]
    first, second = (kept(run.client_state(k), 10, 0) for k in (0, 1))
    assert set(first.round.tolist()) == {2, 5} and set(second.round.tolist()) == {5}
    assert len(first) > len(second) == 16


def test_memory_is_bounded_by_the_pool(played):
    run = played(FEDMD, {"rounds": 8}, top_k=3, cached_rounds=100)
    found = select(run.client_state(0), "cache")
    assert len(found["at"]) == len(set(found["at"].tolist())) <= 40
    assert len(found["at"]) > 30 and found["values"].shape == (len(found["at"]), 3)
    assert set(found) == {"at", "round", "values", "ids"}


def test_newer_targets_take_the_place_of_older_ones():
    probs, packing = soft(5, 4), Packing(k=4, precision="float32", rounds=2)
    state = {}
    packing.heard(state, packing.packed(probs[:3]), np.array([0, 2, 4]), 1, 4)
    found = packing.heard(state, packing.packed(probs[3:]), np.array([2, 3]), 2, 4)
    assert (found.at.tolist(), found.round.tolist()) == ([0, 2, 3, 4], [1, 2, 2, 1])
    assert np.array_equal(packing.dense(found.store), probs[[0, 3, 4, 2]])
    assert packing.heard(state, {}, np.array([1]), 3, 4).at.tolist() == [0, 2, 3, 4]
    assert packing.heard(state, {}, np.array([1]), 4, 4).at.tolist() == [2, 3]
    assert packing.heard(state, {}, np.array([1]), 5, 4) is None
    assert Packing(k=4).heard({}, {}, np.array([1]), 5, 4) is None


@pytest.mark.parametrize("precision", ["float32", "float16", "uint8"])
def test_text_is_packed_token_by_token(precision):
    probs, packing = soft(3, 5, 300), Packing(k=300, precision=precision, rounds=1)
    arrays = packing.packed(probs)
    assert arrays["ids"].shape == (3, 5, 300) and arrays["ids"].dtype == np.uint16
    one = Kept(np.array([1, 2, 7]), np.array([1, 1, 1]), unpacked(arrays, 300))
    both = one.some(np.array([2])).beside(one.some(np.array([0, 1])))
    assert both.at.tolist() == [1, 2, 7]
    again = packing.dense(both.store)
    assert np.array_equal(again, packing.dense(one.store)) and again.shape == (3, 5, 300)
    assert np.allclose(again, probs, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        ({**FEDMD, "top_k": 11}, r"strategy.top_k = 11: must be 1 to 10, the number of classes"),
        ({"name": "fedmd", "top_k": 3}, r"top_k = 3 is of probabilities.*digest_loss = 'kl'"),
        ({"name": "fedmd", "cached_rounds": 3}, r"cached_rounds = 3 is of probabilities"),
        ({**FEDMD, "top_rest": "smooth"}, r"top_rest = 'smooth' .*; set strategy.top_k"),
        ({"name": "ds-fl", "top_type": "uint8"}, r"top_type = 'uint8' .*; set strategy.top_k"),
        ({"name": "ds-fl", "top_k": 0}, "top_k = 0"),
    ],
)
def test_what_cannot_be_packed_is_refused(strategy, said, tiny):
    with pytest.raises(ConfigError, match=said), in_process():
        prepare(tiny(strategy))
