"""Laws over every registered strategy; one that is exempt is named here, with the reason.

Each law is about the method switched *on*, with its defaults, made small where that costs time.
"""

import numpy as np
import pytest

from fedkd.clients.client import Client
from fedkd.engine.simulate import in_process
from fedkd.rng import stream
from fedkd.strategies.base import strategies

SMALL = {
    "server_steps": 4,
    "generator_steps": 2,
    "generator_width": 2,
    "synthesis_epochs": 2,
    "server_epochs": 1,
    "server_optimizer": "sgd",
    "head_hidden": 8,
}
"""Fewer steps on the server, where there are such options; and by plain SGD, since Adam divides
a gradient of mere rounding (one teacher, already reached) by itself and so makes a step of it."""

NOT_AS_ONE = {
    "centralized": "three clients pool three copies of the examples: an epoch has more steps",
    "fd": "the lesson is what *others* say: one client alone is taught nothing",
    "fedd2s": "the lesson is leave-one-out: one client alone is taught nothing",
    "fedcache": "neighbours are other clients' examples: one client alone has none",
    "fedgkt": "the server trains on what all upload: three times as many steps for three clients",
}
"""Why N identical clients are not as one of them."""

IN_ORDER = {
    "centralized": "the pool is the clients' examples in their order: other batches are drawn",
    "fedgkt": "the server draws batches over the uploads in their order",
}
"""Why other numbers for the same clients change more than rounding."""


NO_STEPS = {"server_steps": 0}
OFF = {
    "centralized": {},
    "co-boosting": NO_STEPS,
    "dense": NO_STEPS,
    "dfrd": NO_STEPS,
    "ds-fl": {"digest_epochs": 0, "server_epochs": 0},
    "fd": {},
    "fedavg": {},
    "fedavg-ft": {},
    "fedcache": {},
    "fedd2s": {"kd_weight": 0},
    "feddf": NO_STEPS,
    "fedftg": NO_STEPS,
    "fedgen": {"alpha": 0, "beta": 0},
    "fedgkd": {"coefficient": 0},
    "fedhkd": {"lam": 0, "gamma": 0},
    "fedkd-wu2022": {"kd_weight": 0, "hidden_weight": 0},
    "fedmd": {"digest_epochs": 0},
    "fedntd": {"beta": 0},
    "fedper": {},
    "fedprox": {"mu": 0},
    "fedproto": {"lam": 0},
    "fml": {"alpha": 1},
    "lg-fedavg": {},
    "local-only": {},
}
"""With which options one client that always takes part trains as if all data were in one place; fd
and fedcache need none, since nobody else is there to learn from."""

NEVER_CENTRALIZED = {
    "dho": "labels are learned by a head beside the network, which is drawn by itself",
    "ditto": "the personal network draws batches of its own, so that the global one is FedAvg's",
    "fedgkt": "the network is split: the server trains the deep part on its own schedule",
}


def small(name):
    """Return the strategy with fewer server-side steps."""
    known = strategies.get(name).__dataclass_fields__
    return {"name": name, **{k: v for k, v in SMALL.items() if k in known}}


def groups(folder, owners, skewed):
    """Write 3 groups of 20 examples, equal or each with classes of its own, and a pool."""
    generator = stream(0, "groups").numpy()
    centres = generator.normal(size=(4, 6)) * 2
    x, y = [], []
    for g in range(3):
        labels = np.arange(20) % 4 if not skewed else (np.arange(20) % 2 + g) % 4
        noise = stream(0, "noise", g if skewed else 0).numpy().normal(size=(20, 6))
        x.append(centres[labels] + noise)
        y.append(labels)
    arrays = {f"{part}_x": np.concatenate(x).astype(np.float32) for part in ("train", "test")}
    arrays |= {f"{part}_y": np.concatenate(y) for part in ("train", "test")}
    arrays |= {f"{part}_ids": np.repeat(np.asarray(owners), 20) for part in ("train", "test")}
    np.savez(folder / "groups.npz", **arrays)
    pool = generator.normal(size=(24, 6)).astype(np.float32) * 2
    flat = {
        "train_x": pool,
        "train_y": np.arange(24) % 4,
        "test_x": pool,
        "test_y": np.arange(24) % 4,
    }
    np.savez(folder / "pool.npz", **flat)
    return {
        "data": {
            "source": {"name": "npz", "path": str(folder / "groups.npz"), "standardise": False},
            "partition": "natural",
            "validation": 0.0,
        },
        "clients.count": len(set(owners)),
        "clients.training.batch_size": 8,
    }


def with_pool(name, folder, changes):
    """Add the public pool to an experiment whose strategy needs one."""
    options = {k: v for k, v in small(name).items() if k != "name"}
    needed = strategies.get(name)(**options).needs_public()
    source = {"name": "npz", "path": str(folder / "pool.npz"), "standardise": False}
    pool = {"data.public.size": 16, "data.public.source": source} if needed else {}
    return {**changes, **pool}


def judged(run, client):
    """Return accuracy and loss of one client by round, as judged after aggregation."""
    return np.stack(
        [run.log.table(m, "test", "composite", "personal")[:, client] for m in ("accuracy", "loss")]
    )


@pytest.mark.parametrize("name", [n for n in strategies.names() if n not in NOT_AS_ONE])
def test_identical_clients_are_as_one(name, tiny, play, tmp_path, monkeypatch):
    monkeypatch.setattr(Client, "rng", lambda self, *p: stream(self.seed, *p, self.round))
    runs = []
    for owners in ([0, 1, 2], [0]):
        folder = tmp_path / str(len(owners))
        folder.mkdir()
        changes = groups(folder, owners if len(owners) > 1 else [0, 0, 0], skewed=False)
        if len(owners) == 1:
            one_group(folder)
        runs.append(play(tiny(small(name), with_pool(name, folder, changes))))
    together, alone = runs
    for k in range(3):
        assert np.allclose(judged(together, k), judged(alone, 0), rtol=2e-3, atol=2e-3)


def one_group(folder):
    """Keep the first group's examples only."""
    with np.load(folder / "groups.npz") as found:
        kept = {key: found[key][:20] for key in found.files}
    np.savez(folder / "groups.npz", **kept)


def test_exempt_strategies_exist_and_really_differ(tiny, play, tmp_path, monkeypatch):
    assert set(NOT_AS_ONE) <= set(strategies.names())
    monkeypatch.setattr(Client, "rng", lambda self, *p: stream(self.seed, *p, self.round))
    for name in NOT_AS_ONE:
        runs = []
        for count in (3, 1):
            folder = tmp_path / f"{name}-{count}"
            folder.mkdir()
            changes = groups(folder, [0, 1, 2] if count == 3 else [0, 0, 0], skewed=False)
            if count == 1:
                one_group(folder)
            runs.append(play(tiny(small(name), with_pool(name, folder, changes))))
        assert not np.allclose(judged(runs[0], 0), judged(runs[1], 0), rtol=1e-6), name


@pytest.mark.parametrize("name", [n for n in strategies.names() if n not in NEVER_CENTRALIZED])
def test_one_client_is_centralized_training_once_the_method_is_off(name, tiny, play):
    one = {"clients.count": 1, "data.partition": "iid"}
    run, central = (
        play(tiny(s, one)) for s in ({"name": name, **OFF[name]}, {"name": "centralized"})
    )
    for metric in ("accuracy", "loss"):
        tables = [r.log.table(metric, "test", "own", "personal") for r in (run, central)]
        assert np.isfinite(tables[0]).all()
        assert tables[0].tobytes() == tables[1].tobytes()


def test_every_strategy_has_its_place_in_the_law_of_one_client():
    assert OFF.keys() | NEVER_CENTRALIZED.keys() >= set(strategies.names())
    assert not OFF.keys() & NEVER_CENTRALIZED.keys()


@pytest.mark.parametrize("name", [n for n in strategies.names() if n not in IN_ORDER])
def test_relabelling_clients_changes_nothing(name, tiny, play, tmp_path, monkeypatch):
    """Which number a client has decides nothing: its randomness is made to follow its data."""

    def follow(self, *purpose):
        whose = round(1000 * float(self.data.train.x.double().sum()))
        return stream(self.seed, *purpose, self.round, whose)

    monkeypatch.setattr(Client, "rng", follow)
    orders = ([0, 1, 2], [2, 0, 1])
    runs = []
    for i, owners in enumerate(orders):
        folder = tmp_path / str(i)
        folder.mkdir()
        changes = groups(folder, owners, skewed=True)
        runs.append(play(tiny(small(name), with_pool(name, folder, changes))))
    for group in range(3):
        mine, other = (judged(r, o[group]) for r, o in zip(runs, orders, strict=True))
        assert np.allclose(mine, other, rtol=2e-3, atol=2e-3), group


@pytest.mark.parametrize("name", strategies.names())
def test_what_a_client_receives_is_not_changed_by_it(name, tiny, play):
    """A teacher is a constant: local work leaves every received array as it was."""
    run = play(tiny(small(name), {"rounds": 2}), rounds=1)
    strategy, setting = run.prepared.strategy, run.prepared.setting
    for info in setting.clients[:2]:
        client = run.runtime.side.client(run.grid.contexts[1000 + info.id], 2)
        received = strategy.broadcast(run.state, info, 2, setting)
        before = {key: value.tobytes() for key, value in received.items()}
        strategy.local_update(client, received)
        assert {key: value.tobytes() for key, value in received.items()} == before


@pytest.mark.parametrize("name", strategies.names())
def test_memory_stays_bounded_over_60_rounds(name, tiny, play):
    few = {
        "clients.count": 2,
        "data.source.limit": 80,
        "clients.training.steps": 1,
        "rounds": 60,
        "evaluate.every": 60,
        "engine.checkpoint_every": 1000,
    }
    quick = {"server_steps": 1, "generator_steps": 1, "iterations": 1}
    known = strategies.get(name).__dataclass_fields__
    options = {**small(name), **{k: v for k, v in quick.items() if k in known}}
    run = play(tiny(options, few), rounds=20)
    early = sizes(run)
    with in_process():
        for round_ in range(21, 61):
            run.play(round_)
    assert sizes(run) == early


def sizes(run):
    states = [run.state, *(run.client_state(k) for k in range(2))]
    return [sum(a.nbytes for a in state.values()) for state in states]
