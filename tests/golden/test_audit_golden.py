"""Frozen results of two small audits: text with two students, and mislabelled images.

Exposure and AUC may differ a little as other processors round differently. Regenerate after a
change of results that is meant (and say so in the changelog):

    python -m tests.golden.test_audit_golden
"""

import json
import tempfile
from pathlib import Path

import pytest

from fedkd.audit.run import audit_run
from fedkd.config import experiment
from fedkd.engine.simulation import run

FILE = Path(__file__).with_name("audit.json")
COMMON = {
    "seed": 3,
    "engine": {"executor": "serial", "device": "cpu", "checkpoint_every": 100},
    "evaluate": {"every": 100},
}
TOPICS = {"name": "pydoc-topics", "topics": 3, "rows_per_topic": 12, "length": 24}
TEXT = {
    **COMMON,
    "rounds": 8,
    "strategy": {"name": "fedavg", "weighting": "uniform"},
    "model": {"name": "gpt-tiny", "width": 32, "depth": 1, "heads": 2, "hidden": 64},
    "data": {
        "source": TOPICS,
        "partition": "natural",
        "validation": 0.0,
        "public": {"size": 10},
    },
    "clients": {"count": 3, "training": {"optimizer": "adam", "lr": 0.01, "epochs": 4}},
    "canaries": {
        "kind": "text",
        "pattern": "key {}{}{}{}",
        "repetitions": [1, 8],
        "count": 12,
        "references": 100,
    },
    "audit": {
        "on": ["teacher", "student"],
        "students": {
            "plain": {"temperature": 2.0, "epochs": 6, "lr": 0.01},
            "swing": {"swing": {"map": "adaptive", "scorer": "rarity"}, "epochs": 6, "lr": 0.01},
        },
    },
}
IMAGES = {
    **COMMON,
    "rounds": 6,
    "strategy": "fd",
    "model": {"name": "mlp", "hidden": [32]},
    "data": {
        "source": {"name": "digits", "limit": 400, "test_limit": 100},
        "partition": {"name": "dirichlet", "alpha": 0.5},
        "validation": 0.0,
    },
    "clients": {"count": 4, "training": {"lr": 0.2, "epochs": 5}},
    "canaries": {
        "kind": "mislabelled",
        "repetitions": [1, 4],
        "count": 10,
        "references": 60,
    },
    "audit": {"on": ["personal", "released"], "reference_models": 3},
}
AUDITS = {"text": TEXT, "images": IMAGES}


def measure(name, folder):
    """Return exposure by level and AUC by attack of every subject."""
    run(experiment(AUDITS[name]), folder)
    found = {}
    for subject, table in audit_run(folder)["subjects"].items():
        levels = (table["exposure"] or {"levels": {}})["levels"]
        found[subject] = {
            "exposure": {r: round(level["inside"]["value"], 2) for r, level in levels.items()},
            "auc": {a: round(v["auc"]["value"], 3) for a, v in table["attacks"].items()},
        }
    return found


@pytest.mark.parametrize("name", AUDITS)
def test_audits_find_what_they_found(name, tmp_path):
    expected = json.loads(FILE.read_text(encoding="utf-8"))[name]
    found = measure(name, tmp_path / "run")
    assert found.keys() == expected.keys()
    for subject, entry in expected.items():
        assert found[subject]["exposure"] == pytest.approx(entry["exposure"], abs=0.8), subject
        assert found[subject]["auc"] == pytest.approx(entry["auc"], abs=0.06), subject


def test_what_was_frozen_makes_sense():
    frozen = json.loads(FILE.read_text(encoding="utf-8"))
    text, images = frozen["text"], frozen["images"]
    for subject in text.values():
        assert subject["exposure"]["8"] > subject["exposure"]["1"]
    assert text["teacher"]["exposure"]["8"] > text["student:plain"]["exposure"]["8"] > 1.44
    assert images["personal"]["auc"]["loss"] > 0.8
    assert images["released"]["auc"].keys() == {"released"}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as root:
        made = {name: measure(name, Path(root) / name) for name in AUDITS}
    FILE.write_text(json.dumps(made, indent=1, sort_keys=True) + "\n", encoding="utf-8")
