"""Laws of the methods that exchange scores of a public pool: what is off changes no bit."""

import numpy as np
import pytest
import torch

from fedkd.clients.participation import Participation
from fedkd.data.federated import Split
from fedkd.data.public import take_public
from fedkd.engine.setup import prepare
from fedkd.engine.simulate import in_process
from fedkd.errors import ConfigError
from fedkd.strategies.public_exchange import part

FULL = {"rounds": 3, "data.public.size": 40}
SHORT = {"rounds": 2, "data.public.size": 40, "evaluate.every": 2}
HALF = {"rounds": 4, "data.public.size": 40, "clients.participation.ratio": 0.5}
BOTH = ["fedmd", "ds-fl"]
DEAF = {
    "fedmd": {"name": "fedmd", "digest_epochs": 0},
    "ds-fl": {"name": "ds-fl", "digest_epochs": 0},
    "ds-fl, silent": {"name": "ds-fl", "digest_epochs": 0, "server_epochs": 0},
}


def clients(run, bits):
    return {key: value for key, value in bits(run).items() if key != "server"}


def composite(run):
    return [
        run.log.table(metric, split, "composite", "personal").tobytes()
        for metric in ("accuracy", "loss")
        for split in ("test", "validation")
    ]


def digested(run, round_):
    """Return which clients learned from a consensus in a round."""
    return np.flatnonzero(~np.isnan(run.log.by_client("loss/digest", "train", round_))).tolist()


def cohorts(monkeypatch, plan):
    monkeypatch.setattr(Participation, "cohort", lambda self, seed, round_, clients: plan[round_])


@pytest.mark.parametrize("participation", [FULL, HALF], ids=["full", "half"])
@pytest.mark.parametrize("case", list(DEAF))
def test_without_digest_clients_are_local_only(case, participation, tiny, play, bits):
    run, alone = (play(tiny(s, participation)) for s in (DEAF[case], "local-only"))
    assert clients(run, bits) == clients(alone, bits)
    assert composite(run) == composite(alone)
    silent = not run.ledger.totals().tensors and not run.state
    assert silent is (case != "ds-fl")


@pytest.mark.parametrize("participation", [FULL, HALF], ids=["full", "half"])
def test_the_global_network_is_no_business_of_the_clients(participation, tiny, play, bits):
    with_, without = (
        play(tiny({"name": "ds-fl", "server_epochs": n}, participation)) for n in (1, 0)
    )
    assert clients(with_, bits) == clients(without, bits)
    assert with_.log.predictors("composite") == ["personal", "global"]
    assert without.log.predictors("composite") == ["personal"]


@pytest.mark.parametrize("name", BOTH)
def test_the_options_matter(name, tiny, play, bits):
    plain = play(tiny(name, SHORT))
    others = [{"digest_epochs": 0}, {"digest_epochs": 2}, {"digest_lr": 0.01}, {"subset": 16}]
    others += [{"digest_batch_size": 8}, {"fusion": "median", "digest_loss": "kl"}]
    others += [{"aggregation": "sa"}, {"era_temperature": 0.5}, {"objective": "reverse-kl"}]
    others += [{"digest_loss": "mse"}, {"pretrain_epochs": 1}]
    known = plain.prepared.strategy
    tried = 0
    for options in others:
        kept = {k: v for k, v in options.items() if k in known.__dataclass_fields__}
        if kept:
            other = play(tiny({"name": name, **kept}, SHORT))
            assert clients(other, bits)["client 0"] != clients(plain, bits)["client 0"], kept
            tried += 1
    assert tried == {"fedmd": 8, "ds-fl": 9}[name]


@pytest.mark.parametrize("options", [{"name": "fedmd"}, {"name": "ds-fl", "subset": 16}])
def test_the_labels_of_the_pool_are_not_read(options, tiny, play, bits, monkeypatch):
    labelled = play(tiny(options, FULL))
    assert "consensus/accuracy" in {r.metric for r in labelled.log.records}

    def unlabelled(dataset, size, rng):
        rest, pool = take_public(dataset, size, rng)
        return rest, Split(pool.x, pool.y.fill_(-1))

    monkeypatch.setattr("fedkd.engine.setup.take_public", unlabelled)
    blind = play(tiny(options, FULL))
    assert bits(blind) == bits(labelled)
    assert "consensus/accuracy" not in {r.metric for r in blind.log.records}


@pytest.mark.parametrize("name", BOTH)
def test_whoever_comes_hears_the_consensus_of_the_round_before(name, tiny, play, monkeypatch):
    cohorts(monkeypatch, {1: [0, 1], 2: [2], 3: [0, 3], 4: [1]})
    run = play(tiny(name, {"rounds": 4}))
    assert [digested(run, r) for r in (1, 2, 3, 4)] == [[], [2], [0, 3], [1]]


@pytest.mark.parametrize("name", BOTH)
def test_where_nobody_scored_nobody_digests(name, tiny, play, monkeypatch):
    cohorts(monkeypatch, {1: [0, 1], 2: [], 3: [0, 3], 4: [0]})
    run = play(tiny(name, {"rounds": 4}))
    assert [digested(run, r) for r in (1, 2, 3, 4)] == [[], [], [], [0]]


@pytest.mark.parametrize("name", BOTH)
def test_the_consensus_does_not_depend_on_the_order_of_replies(name, tiny, play):
    run = play(tiny({"name": name, "subset": 16}, {"rounds": 3}), rounds=1)
    with in_process():
        replies = run.grid.send_and_receive(run.strategy.train_messages(2, run.state, run.grid))
    one, other = (run.strategy.fold_train(2, run.state, r).state for r in (replies, replies[::-1]))
    assert one["consensus/scores"].shape == (16, 10)
    assert one["consensus/round"].tolist() == [3] != run.state["consensus/round"].tolist()
    assert {k: v.tobytes() for k, v in one.items()} == {k: v.tobytes() for k, v in other.items()}


@pytest.mark.parametrize("name", BOTH)
def test_the_pool_is_neither_kept_nor_grown(name, tiny, play):
    """Public examples that are appended round by round would show here."""
    run = play(tiny({"name": name, "subset": 16}, {"rounds": 6, "evaluate.every": 6}), rounds=1)
    pool = run.prepared.setting.public
    before, sizes = pool.x.clone(), [{k: v.shape for k, v in run.state.items()}]
    with in_process():
        for round_ in range(2, 6):
            run.play(round_)
            sizes.append({k: v.shape for k, v in run.state.items()})
    assert all(size == sizes[0] for size in sizes)
    assert run.prepared.setting.public is pool and pool.x.equal(before)
    assert all(k.startswith("model/") for k in run.client_state(0))


@pytest.mark.parametrize(
    ("strategy", "changes", "said"),
    [
        ({"name": "fedmd"}, {"data.public.size": 0}, "'fedmd' needs a public pool.*size = 500"),
        ({"name": "ds-fl"}, {"data.public.size": 0}, "'ds-fl' needs a public pool"),
        ({"name": "fedmd", "fusion": "median"}, {}, "'mae' compares logits.*digest_loss = 'kl'"),
        ({"name": "fedmd", "digest_loss": "ma"}, {}, "strategy.digest_loss: .*mae or mse"),
        ({"name": "fedmd", "fusion": "mean"}, {}, r"^strategy.fusion: unknown [^\n]*$"),
        ({"name": "ds-fl", "fusion": "medium"}, {}, "did you mean 'median'"),
        ({"name": "ds-fl", "objective": "k"}, {}, "strategy.objective: unknown objective 'k'"),
        ({"name": "ds-fl", "era_temperature": 0}, {}, "era_temperature = 0"),
    ],
)
def test_what_cannot_work_is_refused_before_round_one(strategy, changes, said, tiny):
    with pytest.raises(ConfigError, match=said):
        prepare(tiny(strategy, changes))


def test_pretraining_needs_labels(tiny, play, tmp_path):
    generator = np.random.Generator(np.random.Philox(key=1))
    x, y = generator.random((30, 8, 8), dtype=np.float32), np.arange(30) % 3
    np.savez(tmp_path / "other.npz", train_x=x, train_y=y, test_x=x, test_y=y)
    other = {"name": "npz", "path": str(tmp_path / "other.npz")}
    changes = {"data.public.size": 20, "data.public.source": other, "rounds": 2}
    with pytest.raises(ConfigError, match=r"pretrain_epochs needs labels.*set it to 0"):
        prepare(tiny({"name": "fedmd", "pretrain_epochs": 1}, changes))
    run = play(tiny("fedmd", changes))
    assert digested(run, 2) == [0, 1, 2, 3]
    assert "consensus/entropy" in {r.metric for r in run.log.records}


def test_pretraining_is_done_once_by_each_client_when_it_first_comes(tiny, play, monkeypatch):
    cohorts(monkeypatch, {1: [0, 1], 2: [1, 2], 3: [0, 2, 3]})
    run = play(tiny({"name": "fedmd", "pretrain_epochs": 2}, {"rounds": 3}))
    done = [run.log.by_client("loss/pretrain", "train", r) for r in (1, 2, 3)]
    assert [np.flatnonzero(~np.isnan(d)).tolist() for d in done] == [[0, 1], [2], [3]]


def test_one_participant_hears_itself(tiny, play):
    alone = {"clients.count": 1, "data.partition": "iid", "rounds": 3}
    run = play(tiny({"name": "fedmd", "digest_loss": "mse"}, alone))
    for round_ in (2, 3):
        assert run.log.by_client("loss/digest", "train", round_)[0] < 1e-10


def test_a_part_of_the_pool_is_made_once_for_all(tiny):
    setting = prepare(tiny("fedmd", {"data.public.size": 40})).setting
    first = part(setting.public, 16, 0, 1)
    assert part(setting.public, 16, 0, 1) is first
    assert not torch.equal(part(setting.public, 16, 0, 2).x, first.x)
    other = prepare(tiny("fedmd", {"data.public.size": 40, "seed": 1})).setting.public
    assert not torch.equal(part(other, 16, 0, 1).x, first.x)
