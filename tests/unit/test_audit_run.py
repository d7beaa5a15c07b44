"""The audit of a finished run: what it writes, what it does not do twice, what it refuses."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from fedkd.audit import references
from fedkd.audit.finished import Finished
from fedkd.audit.references import reference_seeds
from fedkd.audit.results import attack_table, bound_table, exposure_table, exposures
from fedkd.audit.run import audit_run
from fedkd.audit.subjects import Group, Subject, subjects
from fedkd.engine.folder import RunFolder
from fedkd.engine.setup import prepare
from fedkd.engine.simulation import Run, run
from fedkd.errors import ConfigError, DataError, RunError
from fedkd.privacy.auditing.options import Audit, Student
from fedkd.rng import Rng

IMAGES = {
    "rounds": 1,
    "canaries.kind": "random-image",
    "canaries.count": 20,
    "canaries.repetitions": [1, 4],
    "canaries.references": 40,
}
TEXT = {
    "rounds": 1,
    "data.source": {"name": "pydoc-topics", "topics": 4, "rows_per_topic": 8, "length": 16},
    "data.partition": "natural",
    "model": {"name": "gpt-tiny"},
    "clients.training.lr": 0.01,
    "canaries.kind": "text",
    "canaries.pattern": "pin {}{}",
    "canaries.count": 8,
    "canaries.repetitions": [2],
    "canaries.references": 30,
    "audit.estimator": "exact",
}
PLAIN = {"estimator": "interpolation", "on": ("teacher",)}


@pytest.fixture(scope="module")
def made(tiny):
    return tiny("fedavg", {**IMAGES, "audit.reference_models": 2})


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory):
    """A finished run and its audit with two reference runs."""
    path = tmp_path_factory.mktemp("audited") / "run"
    run(made, path)
    audit_run(path)
    return path


@pytest.fixture(scope="module")
def text(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "run"
    run(tiny("fedavg", TEXT), path)
    return path


@pytest.fixture
def runs(monkeypatch):
    """Count the reference runs that are played."""
    seen, plain = [], references.run

    def counted(experiment, path, **more):
        seen.append(experiment.seed)
        return plain(experiment, path, **more)

    monkeypatch.setattr(references, "run", counted)
    return seen


def strictly(path):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def test_the_result_says_everything(folder, made):
    found = strictly(folder / "audit.json")
    canaries = prepare(made).canaries
    inside = int(canaries.inside.sum())
    assert found["run"]["strategy"] == found["run"]["label"] == "fedavg"
    assert found["run"]["digest"] == RunFolder(folder).experiment().digest()
    assert found["theory"]["epsilon"] == "inf"
    expected = {
        "kind": "random-image",
        "levels": [1, 4],
        "count": 40,
        "inside": inside,
        "outside": 40 - inside,
        "references": 40,
        "reference_models": 2,
        "space_bits": "inf",
    }
    assert found["canaries"] | expected == found["canaries"]
    assert set(found["subjects"]) == {"teacher", "personal"}
    for subject in found["subjects"].values():
        levels = subject["exposure"]["levels"]
        assert sum(len(level["bits"]) for level in levels.values()) == inside
        assert sum(level["inside"]["n"] for level in levels.values()) == inside
        assert subject["exposure"]["null"]["n"] == 40 - inside
        assert 0 <= subject["quality"]["accuracy"] <= 1
        assert subject["quality"]["bits_per_character"] is None
        assert not subject["covered"]
        assert {"loss", "rmia-offline", "rmia-online"} <= set(subject["attacks"])
        for attack in subject["attacks"].values():
            assert set(attack["tpr"]) == {"0.01", "0.001"}
            assert attack["roc"]["fpr"][0] == attack["roc"]["tpr"][0] == 0
            assert attack["roc"]["fpr"][-1] == attack["roc"]["tpr"][-1] == 1
        assert {b["level"] for b in subject["bounds"]} == {"all", "1", "4"}
        assert len({b["attack"] for b in subject["bounds"]}) == 1
        assert all(0 <= b["epsilon"] <= b["ceiling"] for b in subject["bounds"])
    assert found["one_shot"] is None
    assert found["reductions"] == {}


def test_a_shared_network_is_everybodys_personal_one(folder):
    """FedAvg's clients are judged by the global network, so both subjects remember the same."""
    found = strictly(folder / "audit.json")["subjects"]
    one, two = (found[s]["attacks"]["loss"]["auc"] for s in ("teacher", "personal"))
    assert one["value"] == pytest.approx(two["value"])
    loaded = Finished.load(folder)
    teacher, personal = subjects(loaded, Audit(on=("teacher", "personal")), folder)
    assert np.allclose(teacher.scores.bits, personal.scores.bits, rtol=1e-5)
    assert len(teacher.groups) == 1 < len(personal.groups)
    holders = [h[0] for h in loaded.canaries.holders]
    for group in personal.groups:
        assert len({holders[i] for i in group.canaries}) == 1


def test_reference_runs_are_played_once(folder, made, runs, tmp_path):
    before = strictly(folder / "audit.json")
    assert audit_run(folder) == before
    assert runs == []
    known = {RunFolder(f).experiment().digest(): f for f in (folder / "audit").iterdir()}
    assert audit_run(folder, cache=tmp_path / "other", known=known) == before
    assert runs == []
    assert not (tmp_path / "other").exists()
    one_more = replace(RunFolder(folder).experiment().audit, reference_models=3, **PLAIN)
    audit_run(folder, one_more, cache=folder / "audit")
    assert runs == [3]


def test_a_torn_reference_run_is_gone_on_with(folder, runs, tmp_path):
    audit = Audit(reference_models=1, **PLAIN)
    whole = audit_run(folder, audit)
    experiment = RunFolder(folder).experiment()
    other = replace(experiment, seed=1)
    torn = Run(prepare(other), RunFolder(tmp_path / other.digest()))
    torn.restore()
    assert RunFolder(torn.folder.path).summary() is None
    assert audit_run(folder, audit, cache=tmp_path) == whole
    assert runs == [1]


def test_reference_seeds_serve_each_other():
    assert reference_seeds(0, 2) == [1, 2]
    assert reference_seeds(2, 2) == [0, 1]
    assert reference_seeds(7, 3) == [0, 1, 2]
    assert reference_seeds(0, 0) == []


def test_the_run_itself_is_not_changed(folder):
    files = {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    audit_run(folder, Audit(**PLAIN))
    changed = {f.name for f, data in files.items() if f.read_bytes() != data}
    assert changed == {"audit.json"}
    assert {f for f in folder.rglob("*") if f.is_file()} == set(files)
    audit_run(folder)


def turned(subject: Subject, canaries, order: np.ndarray):
    """The same canaries, numbered in another order."""
    place = np.argsort(order)
    groups = tuple(replace(g, canaries=place[g.canaries]) for g in subject.groups)
    moved = {name: getattr(canaries, name)[order] for name in ("x", "y", "repetitions", "inside")}
    holders = tuple(canaries.holders[i] for i in order)
    texts = tuple(canaries.texts[i] for i in order)
    return replace(subject, groups=groups), replace(canaries, **moved, holders=holders, texts=texts)


@pytest.mark.parametrize("estimator", ["interpolation", "auto"])
def test_the_order_of_canaries_does_not_matter(folder, estimator):
    loaded, audit = Finished.load(folder), Audit(estimator=estimator)
    order = np.random.default_rng(3).permutation(40)
    for subject in subjects(loaded, audit, folder):
        found = []
        for given, canaries in (
            (subject, loaded.canaries),
            turned(subject, loaded.canaries, order),
        ):
            bits, saturated, how = exposures(given, canaries, audit)
            scores = {"loss": -given.scores.bits}
            table = exposure_table(bits, saturated, how, canaries, audit, Rng(0))
            for level in table["levels"].values():
                level["bits"] = sorted(level["bits"])
            found.append(
                (
                    table,
                    attack_table(scores, canaries.inside, 0.95),
                    bound_table(scores, canaries, audit, "example"),
                )
            )
        assert found[0] == found[1]


def test_levels_in_another_order_are_the_same_audit(tiny, tmp_path):
    results = []
    for levels in ([1, 4], [4, 1]):
        path = tmp_path / str(levels[0])
        run(tiny("fedavg", {**IMAGES, "canaries.repetitions": levels}), path)
        found = audit_run(path, Audit(**PLAIN))
        results.append({k: v for k, v in found.items() if k != "run"})
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("unit", "adjacency", "sizes"),
    [
        ("example", "add-remove", (1, 4, 4)),
        ("client", "add-remove", (2, 2, 2)),
        ("client", "replace-one", (1, 1, 1)),
    ],
)
def test_bounds_are_divided_by_what_a_coin_changes(folder, unit, adjacency, sizes):
    canaries = Finished.load(folder).canaries
    scores = {"loss": np.where(canaries.inside, 1.0, 0.0)}

    def table(*about):
        rows = bound_table(scores, canaries, Audit(), *about)
        return {(row["level"], row["method"]): row for row in rows}

    whole = table("none")
    found = table(unit, adjacency)
    assert max(row["epsilon"] for row in whole.values()) > 2
    for (level, method), row in found.items():
        size = dict(zip(("1", "4", "all"), sizes, strict=True))[level]
        assert row["group"] == size
        assert row["epsilon"] == pytest.approx(whole[level, method]["epsilon"] / size)
        assert row["ceiling"] == pytest.approx(whole[level, method]["ceiling"] / size)


def test_exact_exposure_ranks_among_all_secrets(text):
    """By hand: all 100 secrets but the canaries, which do not compete, under each network."""
    loaded = Finished.load(text)
    audit = Audit(estimator="exact")
    assert loaded.prepared.experiment.audit.estimator == "exact"
    canaries = loaded.canaries
    assert canaries.space == len(loaded.space) == 100
    rows = [tuple(row) for row in loaded.space.x.tolist()]
    planted = {tuple(row) for row in loaded.examples.x.tolist()}
    free = np.array([row not in planted for row in rows])
    assert free.sum() == 92
    for subject in subjects(loaded, audit, text):
        bits, _, how = exposures(subject, canaries, audit)
        assert {h.method for h in how} == {"exact"}
        for group in subject.groups:
            others = group.space[free]
            for own, i in zip(group.scores.bits, group.canaries, strict=True):
                rank = 1 + int((others <= own).sum())
                assert bits[i] == pytest.approx(math.log2(93 / rank))
    found = audit_run(text)["subjects"]["personal"]["exposure"]
    assert found["method"] == "exact"
    assert found["ceiling"] == pytest.approx(math.log2(93))
    assert strictly(text / "audit.json")["canaries"]["space_bits"] == pytest.approx(math.log2(100))


def test_text_has_bits_per_character(text):
    quality = audit_run(text, Audit(**PLAIN))["subjects"]["teacher"]["quality"]
    assert 2 < quality["bits_per_character"] < 8


def test_students_are_compared_with_the_teacher(folder, tmp_path):
    students = {"plain": Student(epochs=1), "hot": Student(epochs=1, temperature=4.0)}
    audit = Audit(on=("student",), students=students, estimator="interpolation")
    found = audit_run(folder, audit, cache=tmp_path)
    assert set(found["subjects"]) == {"student:plain", "student:hot"}
    assert set(found["reductions"]) == {"hot against plain"}
    found = audit_run(folder, replace(audit, on=("teacher", "student")), cache=tmp_path)
    assert set(found["reductions"]) == {"plain", "hot", "hot against plain"}
    strictly(folder / "audit.json")
    audit_run(folder)


def test_what_is_not_there_is_refused(tiny, tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        audit_run(tmp_path)
    run(tiny("fedavg", {"rounds": 1}), tmp_path / "clean")
    with pytest.raises(ConfigError, match=r"no canary was planted.*canaries\.kind"):
        audit_run(tmp_path / "clean")
    begun = Run(prepare(tiny("fedavg", IMAGES)), RunFolder(tmp_path / "begun"))
    begun.restore()
    with pytest.raises(ConfigError, match=r"is not finished; go on with it: fedkd run .*--resume"):
        audit_run(tmp_path / "begun")


@pytest.mark.parametrize("damage", ["cut", "gone", "other"])
def test_damaged_canaries_are_refused(folder, damage):
    file = folder / "canaries.json"
    kept = file.read_bytes()
    try:
        if damage == "gone":
            file.unlink()
        elif damage == "cut":
            file.write_bytes(kept[: len(kept) // 2])
        else:
            file.write_text(json.dumps({**json.loads(kept), "digest": "0" * 16}))
        with pytest.raises(DataError, match=r"canaries\.json.*run the experiment again"):
            audit_run(folder)
    finally:
        file.write_bytes(kept)


def test_a_run_that_diverged_is_refused(folder, monkeypatch):
    loaded = Finished.load(folder)
    state = {k: np.full_like(v, np.nan) if "fc" in k else v for k, v in loaded.state.items()}
    monkeypatch.setattr(Finished, "load", lambda path: replace(loaded, state=state))
    before = (folder / "audit.json").read_bytes()
    with pytest.raises(RunError, match=r"teacher: 40 of 40 losses are not finite.*diverged"):
        audit_run(folder)
    with pytest.raises(RunError, match=r"client 0: .* losses are not finite"):
        audit_run(folder, Audit(on=("personal",)))
    assert (folder / "audit.json").read_bytes() == before


def test_too_few_references_are_refused(tiny, tmp_path):
    run(tiny("fedavg", {**IMAGES, "canaries.references": 19}), tmp_path / "run")
    with pytest.raises(DataError, match=r"19 references are too few.*canaries\.references"):
        audit_run(tmp_path / "run")


def test_students_without_a_teacher_and_images_without_a_space_are_refused(tiny, folder, tmp_path):
    with pytest.raises(ConfigError, match=r"audit\.estimator = 'exact'.*use 'auto'"):
        audit_run(folder, Audit(estimator="exact"))
    changes = {**IMAGES, "audit.students.plain.epochs": 1}
    run(tiny("local-only", changes), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"'local-only' has no global network to learn from"):
        audit_run(tmp_path / "run")


def test_canaries_that_are_all_planted_have_exposure_and_no_attack(tiny, tmp_path):
    run(tiny("fedavg", {**IMAGES, "canaries.coin": False}), tmp_path / "run")
    found = audit_run(tmp_path / "run", Audit(**PLAIN))["subjects"]["teacher"]
    assert found["exposure"]["all"]["n"] == 40
    assert found["exposure"]["null"] is None
    assert found["attacks"] == {}
    assert found["bounds"] == []
    strictly(tmp_path / "run" / "audit.json")


SHOT = {
    "rounds": 2,
    "canaries.random_clients": 12,
    "privacy.unit": "client",
    "privacy.noise_multiplier": 0.05,
    "privacy.delta": 1e-3,
    "privacy.clipping.norm": 1.0,
    "clients.participation.scheme": "poisson",
    "clients.participation.ratio": 0.8,
}


def test_canary_clients_alone_are_audited_in_one_shot(tiny, tmp_path):
    run(tiny({"name": "fedavg", "weighting": "uniform"}, SHOT), tmp_path / "run")
    found = audit_run(tmp_path / "run")
    assert strictly(tmp_path / "run" / "audit.json") == found
    assert found["canaries"] is None
    assert found["subjects"] == {}
    shot = found["one_shot"]
    assert shot["clients"] == 12
    assert len(shot["rounds"]) == 2
    assert shot["dimension"] > 1000
    assert shot["mean"] > 0.05
    assert 0 < found["theory"]["epsilon"] < math.inf
    assert "epsilon" in found["theory"]["sentence"]


def test_a_group_without_a_space_is_ranked_among_references(folder):
    loaded = Finished.load(folder)
    subject = subjects(loaded, Audit(**PLAIN), folder)[0]
    (group,) = subject.groups
    assert isinstance(group, Group)
    assert group.space is None
    bits, saturated, _ = exposures(subject, loaded.canaries, Audit(**PLAIN))
    ranks = 1 + (group.references.bits[None] <= group.scores.bits[:, None]).sum(1)
    assert np.allclose(bits, np.log2(40 / ranks))
    assert np.array_equal(saturated, ranks == 1)
