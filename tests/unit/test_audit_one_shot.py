"""The one-shot audit from run to screen: what is claimed is above what is certified."""

from __future__ import annotations

import json

import pytest

from fedkd.audit.run import audit_run
from fedkd.cli.screen import screen
from fedkd.engine.simulation import run
from fedkd.errors import ConfigError
from fedkd.report import audit_figures, audit_one_shot, audit_tables


@pytest.fixture(scope="module")
def audited(tiny, tmp_path_factory):
    changes = {
        "model": {"name": "mlp", "hidden": [16]},
        "privacy.unit": "client",
        "privacy.noise_multiplier": 0.3,
        "privacy.delta": 1e-2,
        "canaries.random_clients": 30,
        "audit.delta": 1e-2,
    }
    made = tiny({"name": "fedavg", "weighting": "uniform"}, changes)
    folder = tmp_path_factory.mktemp("shot") / "run"
    run(made, folder)
    return audit_run(folder), folder


def test_canary_clients_are_found_and_no_more_is_certified_than_claimed(audited):
    shot, claimed = audited[0]["one_shot"], audited[0]["theory"]["epsilon"]
    assert shot["clients"] == 30
    assert shot["mean"] > 2 * shot["dimension"] ** -0.5
    assert 1 < shot["lower"]["epsilon"] < claimed
    assert len(shot["rounds"]) == 3


def test_a_run_with_canary_clients_only_has_no_other_subject(audited):
    result, folder = audited
    assert result["subjects"] == {}
    assert json.loads((folder / "audit.json").read_text()) == result


def test_tables_show_it_and_there_is_nothing_to_draw(audited, tmp_path, capsys):
    result, _ = audited
    ((label, seed, claimed, *_),) = audit_one_shot.rows([result])
    assert (label, seed) == ("fedavg", "0")
    assert float(claimed) == pytest.approx(result["theory"]["epsilon"], rel=0.01)
    audit_one_shot.show([result], screen())
    assert "estimated" in capsys.readouterr().out
    assert "one-shot" in audit_tables.markdown([result])
    assert audit_figures.draw([result], tmp_path) == []


def test_too_small_a_network_is_refused(tiny, tmp_path):
    changes = {
        "model": {"name": "mlp", "hidden": [2]},
        "rounds": 1,
        "privacy.unit": "client",
        "privacy.noise_multiplier": 1.0,
        "privacy.delta": 1e-2,
        "canaries.random_clients": 5,
    }
    run(tiny({"name": "fedavg", "weighting": "uniform"}, changes), tmp_path / "run")
    with pytest.raises(ConfigError, match="1000"):
        audit_run(tmp_path / "run")
