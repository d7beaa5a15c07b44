"""Laws of audits over every registered strategy: what can be attacked is what was given away."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest

from fedkd.audit.finished import Finished
from fedkd.audit.run import audit_run
from fedkd.engine.simulation import run
from fedkd.privacy.auditing.options import Audit
from fedkd.strategies.base import strategies

QUICK = {"generator_steps": 2, "server_steps": 2, "generator_width": 2, "generator_batch_size": 8}
OPTIONS = {
    "dense": {"synthesis_epochs": 2, "noise": 8, **QUICK},
    "co-boosting": {"synthesis_epochs": 2, "noise": 8, **QUICK},
    "fedftg": {"server_steps": 10, "generator_width": 2},
    "dfrd": {"server_steps": 10, "generator_width": 2},
    "feddf": {"server_steps": 4},
    "fedgen": {"generator_steps": 4},
    "fedmd": {"digest_loss": "kl", "fusion": "mean-probs", "temperature": 2.0},
}
CANARIES = {
    "canaries.kind": "random-image",
    "canaries.count": 8,
    "canaries.repetitions": [3],
    "canaries.references": 30,
}
PARTIAL = {"fd", "fedcache", "fedd2s", "fedgkt", "fedmd", "fedper", "fedproto", "lg-fedavg"}
"""Strategies of which no whole network is anybody's but a client's."""
RELEASES = {
    *("dho", "ds-fl", "fd", "fedcache", "fedd2s"),
    *("fedgen", "fedgkt", "fedhkd", "fedmd", "fedproto"),
}
"""Strategies whose server gives out knowledge beside weights."""
EVERY = strategies.names()


@pytest.fixture(scope="module")
def begun(tiny, tmp_path_factory):
    """Return ``begun(name, seed)``: the folder of a finished run, played once."""
    made = {}

    def begin(name: str, seed: int = 0):
        if (name, seed) not in made:
            path = tmp_path_factory.mktemp("audit") / "run"
            chosen = {"name": name, **OPTIONS.get(name, {})}
            # Clients of FedMD and DHO read the scores of round 1 in round 2.
            rounds = 2 if name in ("fedmd", "dho") else 1
            run(tiny(chosen, {**CANARIES, "rounds": rounds, "seed": seed}), path)
            made[name, seed] = path
        return made[name, seed]

    return begin


@pytest.fixture(scope="module")
def loaded(begun):
    """Return ``loaded(name, seed)``: that run, read back once."""
    return cache(lambda name, seed=0: Finished.load(begun(name, seed)))


def test_the_groups_name_strategies_that_there_are():
    assert set(EVERY) >= PARTIAL | RELEASES | set(OPTIONS)


@pytest.mark.parametrize("name", EVERY)
def test_every_strategy_is_audited(name, begun, loaded):
    path = begun(name)
    found = audit_run(path, Audit(estimator="interpolation"))
    assert json.loads((path / "audit.json").read_text()) == found
    whole = name not in PARTIAL | {"local-only"}
    assert set(found["subjects"]) == {"personal", *(["teacher"] if whole else [])}
    inside = int(loaded(name).canaries.inside.sum())
    for subject in found["subjects"].values():
        assert subject["exposure"]["all"]["n"] == inside
        assert subject["exposure"]["null"]["n"] == 8 - inside
        assert subject["attacks"]["loss"]["judged"] == 8
        assert subject["quality"]["accuracy"] is not None


@pytest.mark.parametrize("name", EVERY)
def test_what_is_released_is_known(name, loaded):
    vector = loaded(name).released()
    if name not in RELEASES:
        assert vector is None
        return
    assert vector.ndim == 1
    assert vector.size >= 10
    assert np.isfinite(vector).all()
    assert vector.std() > 0


@pytest.mark.parametrize("name", ["fd", "fedd2s", "fedgen", "fedhkd", "fedmd", "fedproto"])
def test_what_is_released_has_one_shape_for_all_seeds(name, loaded):
    one, two = (loaded(name, seed).released() for seed in (0, 1))
    assert one.shape == two.shape
    assert not np.array_equal(one, two)


@pytest.mark.parametrize("name", ["fd", "fedmd"])
def test_released_knowledge_is_attacked_with_three_references(name, begun, loaded):
    path = begun(name)
    audit = Audit(on=("released",), reference_models=3)
    known = {loaded(name, 1).prepared.experiment.digest(): begun(name, 1)}
    subject = audit_run(path, audit, known=known)["subjects"]["released"]
    assert set(subject["attacks"]) == {"released"}
    assert subject["exposure"] is None
    assert subject["attacks"]["released"]["judged"] >= 4
    assert len(list((path / "audit").iterdir())) == 2
    fewer = audit_run(path, Audit(on=("released",), reference_models=2), known=known)
    assert fewer["subjects"] == {}


def test_what_is_sent_by_class_has_its_place(loaded, monkeypatch):
    """Runs of other seeds may send other classes: like is compared with like all the same."""
    finished = loaded("fd")
    sent = {
        "soft_labels/labels": np.array([2, 5], dtype=np.int32),
        "soft_labels/output": np.array([[1.0] * 10, [3.0] * 10], dtype=np.float32),
    }
    monkeypatch.setattr(type(finished.prepared.strategy), "broadcast", lambda self, *given: sent)
    table = finished.released().reshape(10, 10)
    assert table[:, 0].tolist() == [0, 0, 1, 0, 0, 3, 0, 0, 0, 0]
    assert (table == table[:, :1]).all()
