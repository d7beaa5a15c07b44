"""A failure leaves what is needed to see it again, bit for bit."""

import json

import pytest

from fedkd.clients.client import Client
from fedkd.engine.checkpoint import from_bytes
from fedkd.engine.failures import replay
from fedkd.engine.simulate import in_process
from fedkd.errors import ConfigError, RunError
from fedkd.strategies.averaging import ModelAveraging
from fedkd.strategies.bounds import LocalOnly


def test_a_failure_is_kept_and_replayed(tiny, play, monkeypatch):
    run = play(tiny("local-only", {"rounds": 2}), rounds=1)
    work = LocalOnly.local_update
    memory = run.client_state(2)

    def local_update(self, client, received):
        update = work(self, client, received)
        if client.info.id == 2:
            raise ZeroDivisionError("on purpose")
        return update

    monkeypatch.setattr(LocalOnly, "local_update", local_update)
    with in_process():
        run.play(2)
    folder = run.folder.path / "failures" / "round-2-client-2"
    note = json.loads((folder / "failure.json").read_text())
    assert (note["round"], note["client"]) == (2, 2)
    assert note["error"] == "ZeroDivisionError('on purpose')"
    assert str(folder) in note["replay"]
    kept = from_bytes((folder / "state.safetensors").read_bytes())
    assert {k: v.tobytes() for k, v in kept.items()} == {
        k: v.tobytes() for k, v in memory.items()
    }, "the memory as it was before the failing round"
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        replay(folder)
    monkeypatch.undo()
    assert replay(folder) == {"round": 2, "client": 2, "sent": []}
    events = (run.folder.path / "events.log").read_text()
    assert "ZeroDivisionError" in events
    assert "client 2" in events


def test_what_a_client_received_is_kept(tiny, play, monkeypatch):
    run = play(tiny("fedavg", {"rounds": 2}), rounds=1)
    sent = {k: v.tobytes() for k, v in run.state.items() if k.startswith("model/")}

    def diverge(self, model, *args, **kwargs):
        raise RunError("diverged")

    monkeypatch.setattr(Client, "fit", diverge)
    with in_process(), pytest.raises(RunError, match="all participants"):
        run.play(2)
    kept = (run.folder.path / "failures/round-2-client-0/received.safetensors").read_bytes()
    assert {k: v.tobytes() for k, v in from_bytes(kept).items()} == sent


def test_an_upload_that_is_not_finite_is_refused(tiny, play, monkeypatch):
    finish = ModelAveraging.finish

    def spoil(self, client, model):
        arrays = finish(self, client, model)
        if client.info.id == 1:
            arrays["model/head.bias"] = arrays["model/head.bias"] * float("nan")
        return arrays

    monkeypatch.setattr(ModelAveraging, "finish", spoil)
    run = play(tiny("fedavg", {"rounds": 1}), rounds=0)
    with in_process():
        failures = run.play(1)
    assert len(failures) == 1
    assert "client 1" in failures[0]
    assert "'model/head.bias' holds values that are not finite" in failures[0]


def test_a_folder_without_a_failure_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no failure"):
        replay(tmp_path)
