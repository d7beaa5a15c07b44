"""Laws of the strategies that exchange class knowledge: what each is when it is switched off."""

import numpy as np
import pytest

from fedkd.clients.client import Client
from fedkd.clients.participation import Participation
from fedkd.engine.simulate import in_process
from fedkd.rng import stream
from fedkd.types import select

FULL = {"rounds": 3}
HALF = {"rounds": 4, "clients.participation.ratio": 0.5}
both = pytest.mark.parametrize("participation", [FULL, HALF], ids=["full", "half"])


def composite(run):
    """Accuracy and loss by client and round, as judged after aggregation."""
    return [
        run.log.table(metric, split, "composite", "personal").tobytes()
        for metric in ("accuracy", "loss")
        for split in ("test", "validation")
    ]


def memories(run):
    clients = range(run.prepared.federation.clients)
    return [{key: v.tobytes() for key, v in run.client_state(k).items()} for k in clients]


@both
@pytest.mark.parametrize(
    "silent",
    [{"name": "fd", "gamma": 0}, {"name": "fedproto", "lam": 0}],
    ids=["fd", "fedproto"],
)
def test_without_its_weight_it_is_local_only(silent, participation, tiny, play):
    run, alone = (play(tiny(s, participation)) for s in (silent, "local-only"))
    assert memories(run) == memories(alone)
    assert composite(run) == composite(alone)


@both
@pytest.mark.parametrize(
    "silent",
    [{"name": "fd", "gamma": 0, "share_weights": True}, {"name": "fedhkd", "lam": 0, "gamma": 0}],
    ids=["fd", "fedhkd"],
)
def test_without_its_weight_it_is_fedavg(silent, participation, tiny, play, bits):
    run, plain = (play(tiny(s, participation)) for s in (silent, "fedavg"))
    assert bits(run) == bits(plain)
    assert composite(run) == composite(plain)
    assert run.ledger.by_round() == plain.ledger.by_round()


@both
def test_fd_is_fedd2s_at_the_output(participation, tiny, play):
    """Two implementations of one method: soft labels of the output, never dropped."""
    points = {"reading": "up_to_cut", "cuts": ["output"], "kd_weight": 0.7, "head_weight": 0}
    other = {"name": "fedd2s", **points, "objective": "soft-ce", "temperature": 2.0}
    one = {"name": "fd", "gamma": 0.7, "temperature": 2.0}
    runs = [play(tiny(s, participation)) for s in (one, other)]
    assert memories(runs[0]) == memories(runs[1])
    assert composite(runs[0]) == composite(runs[1])


@pytest.mark.parametrize(
    ("options", "silent"),
    [
        ({"name": "fd"}, {"gamma": 0}),
        ({"name": "fd", "temperature": 3.0}, {"temperature": 1.0}),
        ({"name": "fd", "objective": "reverse-kl"}, {"objective": "soft-ce"}),
        ({"name": "fd", "label_weighting": "examples"}, {"label_weighting": "uniform"}),
        ({"name": "fd", "share_weights": True}, {"share_weights": False}),
        ({"name": "fedproto"}, {"lam": 0}),
        ({"name": "fedproto", "block": "fc1"}, {"block": "fc2"}),
        ({"name": "fedproto", "weighting": "examples"}, {"weighting": "uniform"}),
        ({"name": "fedproto", "weighting": "examples"}, {"weighting": "paper"}),
        ({"name": "fedhkd", "lam": 1.0}, {"lam": 0}),
        ({"name": "fedhkd", "gamma": 1.0}, {"gamma": 0}),
        ({"name": "fedhkd", "temperature": 2.0, "lam": 1.0}, {"temperature": 0.5}),
        ({"name": "fedhkd", "label_weighting": "examples"}, {"label_weighting": "uniform"}),
    ],
    ids=str,
)
def test_every_option_matters(options, silent, tiny, play):
    one, other = (play(tiny(s, {"rounds": 2})) for s in (options, {**options, **silent}))
    assert composite(one) != composite(other)


def test_soft_ce_and_kl_teach_the_same(tiny, play):
    """Their gradients are equal; only rounding may differ."""
    one, other = (
        play(tiny({"name": "fd", "objective": objective}, FULL)) for objective in ("soft-ce", "kl")
    )
    for k in range(4):
        ours, theirs = one.client_state(k), other.client_state(k)
        assert all(np.allclose(ours[key], theirs[key], atol=1e-4) for key in ours)


def npz(folder, x, y, owners):
    """A federation of given examples: the same ones to train and to test."""
    file = folder / "given.npz"
    arrays = {}
    for part in ("train", "test"):
        arrays |= {f"{part}_x": x, f"{part}_y": y, f"{part}_ids": owners}
    np.savez(file, **arrays)
    source = {"name": "npz", "path": str(file), "standardise": False}
    data = {"source": source, "partition": "natural", "validation": 0.0}
    return {"data": data, "clients.count": int(owners.max()) + 1, "rounds": 3}


def test_what_nobody_else_holds_teaches_nothing_and_saying_it_draws_no_batches(
    tiny, play, tmp_path
):
    """Each client has classes of its own: all is said, nobody is helped, no stream moves on."""
    x = stream(0, "own").numpy().normal(size=(60, 6)).astype(np.float32)
    y, owners = np.arange(60) % 6, np.arange(60) % 6 // 2
    changes = npz(tmp_path, x, y, owners)
    run, alone = (play(tiny(s, changes)) for s in ("fd", "local-only"))
    assert run.ledger.totals(phase="train", direction="up").tensors["soft_labels"] > 0
    assert run.ledger.totals(phase="train", direction="down").tensors["soft_labels"] > 0
    assert memories(run) == memories(alone)
    assert composite(run) == composite(alone)


def test_one_client_has_nobody_to_learn_from(tiny, play):
    one = {**FULL, "clients.count": 1, "data.partition": "iid"}
    runs = [play(tiny(s, one)) for s in ("fd", "local-only")]
    assert memories(runs[0]) == memories(runs[1])
    plus = play(tiny({"name": "fd", "share_weights": True}, one))
    assert composite(plus) == composite(play(tiny("centralized", one)))


@pytest.mark.parametrize(
    ("strategy", "few"),
    [("fd", 2), ({"name": "fd", "share_weights": True}, 2), ("fedproto", 1), ("fedhkd", 1)],
    ids=["fd", "fd-plus", "fedproto", "fedhkd"],
)
def test_equal_clients_equal_few(strategy, few, tiny, play, tmp_path, monkeypatch):
    """Four clients with the same examples and batches are as one; for leave-one-out as two."""
    x = stream(0, "equal").numpy().normal(size=(20, 6)).astype(np.float32)
    y = np.arange(20) % 3
    monkeypatch.setattr(Client, "rng", lambda self, *p: stream(self.seed, *p, self.round))
    runs = []
    for clients in (4, few):
        owners = np.repeat(np.arange(clients), 20)
        folder = tmp_path / str(clients)
        folder.mkdir()
        given = npz(folder, np.tile(x, (clients, 1)), np.tile(y, clients), owners)
        runs.append(play(tiny(strategy, given)))
    many, one = runs
    first = memories(many)[0]
    assert all(memory == first for memory in memories(many))
    assert first == memories(one)[0]
    for kind in ("model", "prototypes"):
        ours, theirs = (select(run.state, kind) for run in runs)
        assert {k: v.tobytes() for k, v in ours.items()} == {
            k: v.tobytes() for k, v in theirs.items()
        }


@pytest.mark.parametrize("strategy", ["fd", "fedproto", "fedhkd"])
def test_who_sits_out_is_remembered(strategy, tiny, play, monkeypatch):
    """The last table of each client that ever took part is kept, and no other."""
    plan = {1: [0, 1], 2: [2], 3: [0]}
    monkeypatch.setattr(Participation, "cohort", lambda self, seed, round_, clients: plan[round_])
    run = play(tiny(strategy), rounds=1)
    first = {k: select(run.state, f"buffer/{k}") for k in (0, 1)}
    assert all(first.values())
    with in_process():
        run.play(2)
        run.play(3)
    assert {key.split("/")[1] for key in run.state if key.startswith("buffer/")} == {"0", "1", "2"}
    for k, changed in ((0, True), (1, False)):
        now = select(run.state, f"buffer/{k}")
        assert now.keys() == first[k].keys()
        same = all(now[key].tobytes() == first[k][key].tobytes() for key in now)
        assert same is not changed
