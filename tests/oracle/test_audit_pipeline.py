"""The pipeline against what is known: all remembered, nothing remembered, no more than epsilon."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedkd.audit.finished import Finished
from fedkd.audit.run import audit_run
from fedkd.audit.subjects import subjects
from fedkd.engine.simulation import run
from fedkd.models.book import to_arrays
from fedkd.privacy.auditing.options import Audit
from fedkd.privacy.exposure import NULL_BITS

TEACHER = ("teacher",)
CENTRAL = {
    "rounds": 1,
    "model.hidden": [64],
    "data.source.limit": 100,
    "clients.count": 2,
    "clients.training": {"lr": 0.005, "optimizer": "adam", "batch_size": 64},
    "canaries.kind": "random-image",
    "canaries.count": 60,
    "canaries.repetitions": [2],
    "canaries.references": 64,
}
TEXT = {
    "rounds": 1,
    "data.source": {"name": "pydoc-topics", "topics": 2, "rows_per_topic": 6, "length": 16},
    "data.partition": "natural",
    "data.validation": 0.0,
    "model": {"name": "lstm", "width": 16, "hidden": 64, "depth": 1},
    "clients.count": 2,
    "clients.training": {"lr": 0.01, "optimizer": "adam", "batch_size": 32},
    "canaries.kind": "text",
    "canaries.pattern": "pin {}{}{}",
    "canaries.count": 6,
    "canaries.repetitions": [8],
    "canaries.references": 100,
}
DP = {
    "privacy.unit": "example",
    "privacy.delta": 1e-3,
    "privacy.clipping.norm": 1.0,
    "privacy.noise_multiplier": 4.0,
}


def audited(tiny, folder, changes, audit):
    run(tiny("centralized", changes), folder)
    return audit_run(folder, audit)


@pytest.fixture(scope="module")
def overfitted(tiny, tmp_path_factory):
    """Central training until every image that was planted is known by heart."""
    changes = {**CENTRAL, "clients.training.epochs": 60}
    audit = Audit(on=TEACHER, estimator="interpolation")
    return audited(tiny, tmp_path_factory.mktemp("memory") / "run", changes, audit)


def test_what_is_known_by_heart_is_at_the_ceiling(overfitted):
    exposure = overfitted["subjects"]["teacher"]["exposure"]
    level = exposure["levels"]["2"]
    assert exposure["ceiling"] == math.log2(64)
    assert level["saturated"] == 1.0
    assert set(level["bits"]) == {6.0}
    # Those of tails were never seen by this very network.
    assert exposure["null"]["low"] < NULL_BITS < exposure["null"]["high"]


def test_what_is_known_by_heart_is_told_from_what_was_never_seen(overfitted):
    loss = overfitted["subjects"]["teacher"]["attacks"]["loss"]
    assert loss["auc"]["value"] > 0.99
    assert loss["tpr"]["0.01"]["value"] > 0.9
    bounds = {b["method"]: b for b in overfitted["subjects"]["teacher"]["bounds"]}
    assert set(bounds) == {"one-run", "one-run-fdp", "clopper-pearson", "gdp"}
    for found in bounds.values():
        assert 1 < found["epsilon"] <= found["ceiling"]


def test_secrets_that_are_known_by_heart_have_all_bits_of_their_space(tiny, tmp_path):
    audit = Audit(on=TEACHER, estimator="exact")
    changes = {**TEXT, "clients.training.epochs": 80}
    found = audited(tiny, tmp_path / "run", changes, audit)["subjects"]["teacher"]["exposure"]
    # All 1000 but the 6 canaries, which do not compete with each other.
    assert found["ceiling"] == pytest.approx(math.log2(995))
    level = found["levels"]["8"]
    assert level["saturated"] == 1.0
    assert level["inside"]["value"] == pytest.approx(math.log2(995))
    assert found["null"]["value"] < 4


@pytest.mark.parametrize(
    ("model", "seed"), [({"name": "mlp", "hidden": [16, 12]}, 0), ({"name": "cnn"}, 1)]
)
def test_an_untrained_network_remembers_nothing(tiny, tmp_path, model, seed):
    changes = {
        **CENTRAL,
        "model": model,
        "canaries.seed": seed,
        "canaries.count": 150,
        "canaries.references": 300,
        "clients.training": {"lr": 1e-12, "batch_size": 64, "epochs": 1},
    }
    found = audited(tiny, tmp_path / "run", changes, Audit(on=TEACHER))["subjects"]["teacher"]
    loaded = Finished.load(tmp_path / "run")
    initial = loaded.prepared.setting.book.initial(model["name"])
    weights = to_arrays(loaded.teacher())
    assert all(np.allclose(weights[key], initial[key], atol=1e-6) for key in initial)
    for part in ("all", "null"):
        assert found["exposure"][part]["low"] < NULL_BITS < found["exposure"][part]["high"]
    auc = found["attacks"]["loss"]["auc"]
    assert auc["low"] < 0.5 < auc["high"]
    assert max(b["epsilon"] for b in found["bounds"]) == 0


def test_secrets_have_null_exposure_before_training(tiny, tmp_path):
    changes = {
        **TEXT,
        "canaries.count": 200,
        "canaries.repetitions": [1],
        "canaries.references": 300,
        "clients.training.lr": 1e-12,
    }
    run(tiny("centralized", changes), tmp_path / "run")
    for estimator in ("exact", "interpolation", "extrapolation"):
        audit = Audit(on=TEACHER, estimator=estimator)
        found = audit_run(tmp_path / "run", audit)["subjects"]["teacher"]["exposure"]
        for part in ("all", "null"):
            assert found[part]["low"] < NULL_BITS < found[part]["high"], (estimator, part)


def test_certified_bounds_stay_below_a_claimed_epsilon(tiny, tmp_path):
    """Eight DP runs at 95 %: more than three false claims of one method have probability 4e-4."""
    wrong = dict.fromkeys(("one-run", "one-run-fdp", "clopper-pearson", "gdp"), 0)
    for seed in range(8):
        changes = {
            **CENTRAL,
            **DP,
            "seed": seed,
            "canaries.repetitions": [1],
            "clients.training": {"lr": 0.1, "batch_size": 64, "epochs": 2},
        }
        audit = Audit(on=TEACHER, estimator="interpolation", delta=1e-3)
        found = audited(tiny, tmp_path / str(seed), changes, audit)
        claimed = found["theory"]["epsilon"]
        assert 0 < claimed < 3
        assert found["theory"]["delta"] == 1e-3
        subject = found["subjects"]["teacher"]
        assert subject["covered"]
        for bound in subject["bounds"]:
            assert bound["delta"] == 1e-3
            wrong[bound["method"]] += bound["epsilon"] > claimed
    assert max(wrong.values()) <= 3


def test_the_same_canaries_without_noise_exceed_that_claim(overfitted):
    """So the test above is one that a run could fail."""
    epsilons = {b["method"]: b["epsilon"] for b in overfitted["subjects"]["teacher"]["bounds"]}
    assert epsilons["gdp"] > 3
    assert epsilons["one-run"] > 1


def test_a_student_of_public_data_forgets_what_its_teacher_knows(tiny, tmp_path):
    changes = {
        **CENTRAL,
        "data.public.size": 60,
        "clients.training.epochs": 60,
        "audit.on": ["teacher", "student"],
        "audit.estimator": "interpolation",
        "audit.students.plain": {"epochs": 60, "lr": 0.01},
        "audit.students.public": {"epochs": 60, "lr": 0.01, "transfer": "public"},
    }
    found = audited(tiny, tmp_path / "run", changes, None)
    auc = {k: v["attacks"]["loss"]["auc"]["value"] for k, v in found["subjects"].items()}
    assert auc["teacher"] > 0.99
    assert auc["student:plain"] > 0.95
    assert auc["student:public"] < 0.8
    excess = {k: v["excess"]["value"] for k, v in found["reductions"].items()}
    assert excess["plain"] < 0.3
    assert excess["public"] > 0.6
    loaded = Finished.load(tmp_path / "run")
    audit = loaded.prepared.experiment.audit
    names = [s.name for s in subjects(loaded, audit, tmp_path / "run" / "audit")]
    assert names == ["teacher", "student:plain", "student:public"]
