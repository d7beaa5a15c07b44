"""Ways in which an audit's numbers were wrong, or could have been read wrongly."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from fedkd.audit.finished import Finished
from fedkd.audit.results import bound_table
from fedkd.audit.run import audit_run, covered
from fedkd.audit.study import audit_study
from fedkd.engine.simulation import run
from fedkd.errors import ConfigError, DataError
from fedkd.privacy.accounting import gaussian_epsilon
from fedkd.privacy.auditing.options import Audit
from fedkd.report import audit_tables

AUDIT = Audit(estimator="interpolation", on=("personal",))
CANARIES = {
    "rounds": 1,
    "canaries.kind": "random-image",
    "canaries.count": 20,
    "canaries.repetitions": [1],
    "canaries.references": 40,
}
CENTRAL = {
    "rounds": 2,
    "privacy.unit": "client",
    "privacy.noise_multiplier": 0.2,
    "privacy.delta": 1e-3,
    "clients.participation.scheme": "poisson",
    "clients.participation.ratio": 0.8,
    "strategy": {"name": "fedavg", "weighting": "uniform"},
}


def canaries(inside, level=1, clients=1, share=0.0):
    rows = np.full(len(inside), level * clients * (2 if share else 1))
    options = SimpleNamespace(clients=clients, share=share)
    at = np.full(len(inside), level)
    return SimpleNamespace(inside=inside, repetitions=at, changed=rows, options=options)


@pytest.mark.parametrize(("adjacency", "steps"), [("add-remove", 2), ("replace-one", 1)])
def test_no_bound_exceeds_what_clients_were_promised(adjacency, steps):
    """A holder is there with and without its canary: it sends something else, at worst -C for C."""
    sigma, draws, above = 2.0, np.random.default_rng(0), 0
    for _ in range(20):
        inside = draws.random(800) < 0.5
        sent = np.where(inside, 1.0, -1.0) + sigma * draws.standard_normal(inside.size)
        found = bound_table({"loss": sent}, canaries(inside), AUDIT, "client", adjacency)
        assert {b["group"] for b in found} == {steps}
        mu = {"add-remove": 1, "replace-one": 2}[adjacency] / sigma
        above += sum(b["epsilon"] > gaussian_epsilon(mu, b["delta"]) for b in found)
    assert above <= 4  # of 80 bounds that fail at 5 % each


@pytest.mark.parametrize(
    ("unit", "made", "group", "said"),
    [
        ("none", {"level": 32}, 1, "a whole canary, of up to 32 rows"),
        ("example", {"level": 8}, 8, "adds 8 copies at most, and clients' sizes are public"),
        ("example", {"level": 3, "share": 0.1}, 6, "replaces 3 examples"),
        ("client", {"level": 8, "clients": 3}, 6, "changes what 3 holders send"),
    ],
)
def test_bounds_say_of_what_they_are(unit, made, group, said):
    inside = np.arange(40) % 2 == 0
    for b in bound_table({"loss": inside * 1.0}, canaries(inside, **made), AUDIT, unit):
        assert b["group"] == group
        assert said in b["assumes"]


def test_bounds_are_not_taken_by_an_attack_that_judges_half_of_the_canaries():
    inside = np.arange(80) % 2 == 0
    half = np.where(np.arange(80) < 40, inside * 1.0, np.nan)
    scores = {"loss": inside * 1.0, "lira-online": half}
    found = bound_table(scores, canaries(inside), AUDIT, "none")
    assert {(b["attack"], b["n"]) for b in found} == {("loss", 80)}
    most = {"loss": inside * 1.0, "lira-online": np.where(np.arange(80) < 70, inside, np.nan)}
    assert {b["attack"] for b in bound_table(most, canaries(inside), AUDIT, "none")} == {
        "lira-online"
    }


def test_a_run_on_other_data_is_refused_although_its_canaries_are_the_same(tiny, tmp_path):
    run(tiny("fedavg", CANARIES), tmp_path)
    file = tmp_path / "partition.json"
    content = json.loads(file.read_text())
    content["dataset"]["fingerprint"] = "0" * 16
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match="made for other data"):
        audit_run(tmp_path, AUDIT)


def test_what_is_fine_tuned_without_noise_has_no_epsilon(tiny, tmp_path):
    private = {
        **CANARIES,
        "privacy.unit": "example",
        "privacy.noise_multiplier": 1.0,
        "privacy.delta": 1e-3,
        "clients.training.lr": 0.05,
    }
    subject, said = SimpleNamespace(name="personal"), {}
    for name in ("fedavg", "fedavg-ft"):
        run(tiny(name, private), tmp_path / name)
        said[name] = covered(Finished.load(tmp_path / name), subject, AUDIT)
    assert said == {"fedavg": True, "fedavg-ft": False}


def test_results_say_how_many_units_a_canary_is(tiny, tmp_path):
    run(tiny("fedavg", {**CANARIES, "canaries.clients": 2, "canaries.share": 0.08}), tmp_path)
    found = audit_run(tmp_path, AUDIT)["canaries"]
    made = Finished.load(tmp_path).canaries
    assert found["clients"] == 2
    assert found["copies"] == {"1": int(made.copies.max())}
    assert made.copies.max() > 2


def test_canary_clients_do_not_move_the_clipping_norm(tiny, tmp_path):
    """They send exactly the norm: their bits are rounding, and nobody expects them in the count."""
    adaptive = {
        **CENTRAL,
        "clients.training.lr": 1e-6,
        "privacy.clipping": {"mode": "adaptive", "norm": 1.0, "count_noise": 0.2, "rate": 0.5},
    }
    norms = []
    for count in (0, 200):
        path = tmp_path / str(count)
        run(tiny("fedavg", {**adaptive, "canaries.random_clients": count}), path)
        lines = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
        norms.append([r["value"] for r in lines if r["metric"] == "clipping_norm"])
    assert all(0.5 < b / a < 2 for a, b in zip(*norms, strict=True)), norms


def test_an_audit_of_canary_clients_alone_has_its_tables(tiny, tmp_path):
    run(tiny("fedavg", {**CENTRAL, "model": "mlp", "canaries.random_clients": 12}), tmp_path)
    found = audit_run(tmp_path, AUDIT)
    assert found["subjects"] == {}
    assert "one-shot" in audit_tables.markdown([found])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"canaries.references": 5}, "canaries.references"),
        ({"audit.estimator": "exact"}, "audit.estimator"),
        ({"audit.students.one.transfer": "public"}, "data.public.size"),
        ({"audit.students.one.model": "nope"}, "nope"),
        ({"audit.students.one.objective": "nope"}, "nope"),
        ({"strategy": "fd", "audit.students.one.epochs": 1}, "no global network"),
    ],
)
def test_an_impossible_audit_is_refused_before_anything_is_trained(tiny, tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said):
        audit_study(tiny("fedavg", {**CANARIES, **changes}), tmp_path)
    assert not (tmp_path / "runs").exists()
