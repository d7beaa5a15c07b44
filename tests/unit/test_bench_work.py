"""The bench's work: the same every time, with its hash, and what our engine does by itself."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fedkd
from fedkd.bench.backends.base import spec
from fedkd.bench.making import extract, make, setting
from fedkd.bench.work import ARRAYS, FACTS, Plan, Work, load
from fedkd.engine.setup import prepare
from fedkd.errors import ConfigError, DataError

PLAN = Plan("mlp", source="digits", clients=4, k=2, block=1)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return make(PLAN, tmp_path_factory.mktemp("work"))


def changed(work: Work, **changes) -> str:
    return dataclasses.replace(work, **changes).hash


def test_the_same_plan_gives_the_same_work_and_a_file_gives_it_back(work, tmp_path):
    assert make(PLAN, tmp_path).hash == work.hash
    work.save(tmp_path)
    loaded = load(tmp_path)
    assert loaded.hash == work.hash == json.loads((tmp_path / FACTS).read_text())["hash"]
    assert loaded.cohort(2) == work.cohort(2) and len(loaded.cohort(2)) == 2
    first = work.cohort(1)[0]
    np.testing.assert_array_equal(loaded.order(1, first), work.order(1, first))
    assert sorted(work.order(1, first)) == list(range(work.size(first)))


def test_the_hash_changes_with_anything_that_is_trained_on(work):
    x, y = work.x.copy(), work.y.copy()
    x[5, 0, 3, 3] += 1e-3
    y[5] = (y[5] + 1) % 10
    weights = {k: w.copy() for k, w in work.initial.items()}
    weights["head.bias"][0] += 1e-6
    first = work.cohort(1)[0]
    orders = [dict(o) for o in work.orders]
    orders[0][first] = orders[0][first][::-1].copy()
    cohorts = [list(c) for c in work.cohorts]
    cohorts[0] = cohorts[0][::-1]
    owners = list(work.owners)
    owners[0], owners[1] = owners[1], owners[0]
    found = {
        work.hash,
        changed(work, x=x),
        changed(work, y=y),
        changed(work, initial=weights),
        changed(work, orders=orders),
        changed(work, cohorts=cohorts),
        changed(work, owners=owners),
        changed(work, plan=dataclasses.replace(PLAN, lr=0.051)),
    }
    assert len(found) == 8


def test_it_is_what_an_experiment_of_ours_does(work, tmp_path):
    again = extract(prepare(setting(PLAN, tmp_path, engine={"executor": "thread"})), PLAN)
    other = extract(prepare(setting(PLAN, tmp_path, seed=1)), PLAN)
    assert again.hash == work.hash != other.hash


def test_tiny_clients_have_one_batch_of_small_images_and_all_take_part(tmp_path):
    work = make(Plan("tiny", source="digits", clients=5, k=5, block=1), tmp_path)
    assert work.x.shape == (160, 1, 4, 4) and work.initial["fc1.1.weight"].shape == (16, 16)
    assert [work.size(k) for k in range(5)] == [32] * 5 and work.cohort(3) == [0, 1, 2, 3, 4]
    assert work.samples(1) == 160


def test_a_pass_has_its_own_rounds_and_all_of_them_are_laid_down(work):
    plan = Plan("cnn", block=3)
    played = [list(plan.rounds_of(p)) for p in range(6)]
    assert played[0] == [2, 3, 4] and played[4] == [14, 15, 16] and played[5] == played[0]
    assert max(max(p) for p in played) == plan.rounds
    assert len(work.cohorts) == PLAN.rounds == len(work.facts()["samples"])


@pytest.mark.parametrize(
    ("what", "match"),
    [
        ({"kind": "cn"}, "did you mean 'cnn'"),
        ({"kind": "mlp", "k": 11, "clients": 10}, "no more can take part"),
        ({"kind": "mlp", "block": 0}, "block = 0"),
    ],
)
def test_impossible_plans_are_refused(what, match):
    with pytest.raises(ConfigError, match=match):
        Plan(**what)


def test_too_many_tiny_clients_are_refused_with_the_most_there_can_be(tmp_path):
    with pytest.raises(DataError, match="at most 44 clients"):
        make(Plan("tiny", source="digits", clients=1000, k=1000), tmp_path)


def test_a_damaged_work_is_no_work(work, tmp_path):
    work.save(tmp_path)
    (tmp_path / ARRAYS).write_bytes((tmp_path / ARRAYS).read_bytes()[:100])
    with pytest.raises(DataError, match="begin again"):
        load(tmp_path)


@pytest.mark.parametrize("text", ["", "bare:", "bare:0", "bare:2x", "bare:x2", "bare:two"])
def test_contenders_are_written_in_one_way(text):
    with pytest.raises(ConfigError, match="is no contender"):
        spec(text)


def test_whoever_looks_on_stays_without_torch():
    # Its share of the libraries' memory would be missing where it is measured.
    script = (
        "import sys, fedkd.cli.bench, fedkd.bench.run as run; run.works(); run.everybody()\n"
        "from fedkd.bench.work import load\n"
        "assert not {'torch', 'flwr'} & set(sys.modules), 'torch is loaded'\n"
    )
    root = Path(fedkd.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=root
    )
    assert done.returncode == 0, done.stderr
