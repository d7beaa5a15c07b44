import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from fedkd.config import Experiment
from fedkd.engine.folder import read_records
from fedkd.engine.setup import load_workspace, prepare
from fedkd.engine.simulation import run
from fedkd.engine.sinks.base import Sink, Start, flat, sinks, values
from fedkd.engine.sinks.wandb import _wanted
from fedkd.errors import ConfigError
from fedkd.types import Metrics, Record

Tiny = Callable[..., Experiment]
ACCURACY = "composite/personal/test/accuracy"


class Recorder(Sink):
    """Keeps what it is told."""

    told: ClassVar[list[Any]] = []

    def start(self, start: Start) -> str:
        self.told.append(start)
        start.memory.setdefault("id", f"run-{len(self.told)}")
        return "memory"

    def write(self, round_: int, values: Metrics) -> None:
        self.told.append((round_, values))

    def finish(self, final: Metrics | None) -> None:
        self.told.append(final)


class Interrupt:
    """Stops a run after a round, as Ctrl-C does."""

    def __init__(self, after: int) -> None:
        self.after = after

    def started(self, experiment: Any, first_round: int) -> None:
        pass

    def finished_round(self, round_: int, log: Any, failures: Any) -> None:
        if round_ == self.after:
            raise KeyboardInterrupt


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    told: list[Any] = []
    monkeypatch.setattr(Recorder, "told", told)
    use(monkeypatch, "recorder", Recorder)
    return told


def use(monkeypatch: pytest.MonkeyPatch, name: str, cls: type[Sink]) -> None:
    sinks.names()
    monkeypatch.setitem(sinks._items, name, cls)


def with_sinks(tiny: Tiny, *names: str, rounds: int = 4) -> Experiment:
    changes = {"engine.sinks": list(names), "engine.checkpoint_every": 2, "rounds": rounds}
    return tiny("fedavg", {**changes, "name": "sunk"})


def interrupted_and_resumed(experiment: Experiment, folder: Path) -> dict[str, Any]:
    """Stop after round 3, of which round 2 is in the checkpoint, and go on."""
    with pytest.raises(KeyboardInterrupt):
        run(experiment, folder, watcher=Interrupt(3))
    return run(experiment, folder, resume=True)


def results(folder: Path) -> list[Record]:
    records = read_records(folder / "metrics.jsonl")
    return [r for r in records if r.metric != "seconds"]


def events(folder: Path) -> list[str]:
    return (folder / "events.log").read_text(encoding="utf-8").splitlines()


def test_values_are_the_federations_or_means_over_clients() -> None:
    def accuracy(client: int, value: float, **more: Any) -> Record:
        where = {"readout": "composite", "predict": "personal", "split": "test", **more}
        return Record(round=2, metric="accuracy", client=client, value=value, **where)

    records = [
        accuracy(0, 0.5),
        accuracy(3, 1.0),
        accuracy(0, 0.25, split="global"),
        Record(round=2, metric="bytes_up", split="train", value=7),
        Record(round=1, metric="epsilon", split="privacy", value=2),
    ]
    assert values(records) == {
        1: {"privacy/epsilon": 2},
        2: {ACCURACY: 0.75, "composite/personal/global/accuracy": 0.25, "train/bytes_up": 7},
    }


def test_settings_are_plain_values(tiny: Tiny) -> None:
    settings = flat(tiny().table())
    assert settings["strategy.name"] == "fedavg"
    assert settings["model.hidden"] == "16,12"
    assert settings["clients.training.lr"] == 0.2
    assert all(isinstance(v, str | int | float | bool) for v in settings.values())


def test_a_sink_is_told_of_the_whole_run(tiny: Tiny, tmp_path: Path, recorder: list[Any]) -> None:
    experiment = with_sinks(tiny, "recorder")
    summary = run(experiment, tmp_path / "run")
    start, *rounds, final = recorder
    assert (start.first_round, start.title, start.home) == (0, "fedavg, seed 0", tmp_path / "run")
    assert start.settings["rounds"] == 4
    assert start.digest == summary["digest"]
    assert [round_ for round_, _ in rounds] == [0, 1, 2, 3, 4]
    written = dict(rounds)
    for t, expected in values(read_records(tmp_path / "run" / "metrics.jsonl")).items():
        assert written[t] == expected
    assert start.headline in written[4]
    entry = summary["readouts"]["composite"]["personal"]["mean_last_k"]
    assert final["final/user_accuracy"] == entry["user_accuracy"]
    assert any("sink recorder: values go to memory" in line for line in events(tmp_path / "run"))


def test_after_a_resume_a_sink_has_its_memory(
    tiny: Tiny, tmp_path: Path, recorder: list[Any]
) -> None:
    interrupted_and_resumed(with_sinks(tiny, "recorder"), tmp_path / "run")
    starts = [told for told in recorder if isinstance(told, Start)]
    assert [s.first_round for s in starts] == [0, 3]
    assert [s.memory["id"] for s in starts] == ["run-1", "run-1"]
    assert recorder.count(None) == 1, "the interrupted run was not closed as broken off"
    rounds = [told[0] for told in recorder if isinstance(told, tuple)]
    assert rounds == [0, 1, 2, 3, 3, 4]
    kept = json.loads((tmp_path / "run" / "sinks.json").read_text(encoding="utf-8"))
    assert kept == {"recorder": {"id": "run-1"}}


@pytest.mark.parametrize("where", ["start", "write", "finish"])
def test_a_failing_sink_costs_one_line_and_no_bit(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorder: list[Any], where: str
) -> None:
    def fail(self: Sink, *given: Any) -> Any:
        raise ConnectionError("no route\nto host")

    failing = type("Failing", (Recorder,), {where: fail})
    use(monkeypatch, "failing", failing)
    plain = run(with_sinks(tiny), tmp_path / "plain")
    sunk = run(with_sinks(tiny, "failing", "recorder"), tmp_path / "sunk")
    assert results(tmp_path / "sunk") == results(tmp_path / "plain")
    assert sunk["digest"] == plain["digest"]
    warnings = [line for line in events(tmp_path / "sunk") if "warning" in line]
    assert len(warnings) == 1
    assert "failing" in warnings[0]
    assert "ConnectionError: no route to host" in warnings[0]
    assert (4, pytest.approx(values(results(tmp_path / "plain"))[4])) in [
        (told[0], {k: v for k, v in told[1].items() if not k.endswith("/seconds")})
        for told in recorder
        if isinstance(told, tuple)
    ]


def test_a_damaged_memory_is_no_reason_to_stop(
    tiny: Tiny, tmp_path: Path, recorder: list[Any]
) -> None:
    experiment = with_sinks(tiny, "recorder", rounds=2)
    with pytest.raises(KeyboardInterrupt):
        run(experiment, tmp_path / "run", watcher=Interrupt(1))
    (tmp_path / "run" / "sinks.json").write_text('["half', encoding="utf-8")
    run(experiment, tmp_path / "run", resume=True)
    assert any("sinks.json is damaged" in line for line in events(tmp_path / "run"))


def test_impossible_sinks_are_refused_before_the_first_round(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="unknown sink 'tensorbord'; did you mean 'tensorboard'"):
        prepare(with_sinks(tiny, "tensorbord"))

    class Lacking(Recorder):
        extra = "wandb"

        @classmethod
        def modules(cls) -> tuple[str, ...]:
            return ("json", "no_such_package")

    use(monkeypatch, "lacking", Lacking)
    reason = r"needs no_such_package, which is not installed: pip install 'fedkd\[wandb\]'"
    with pytest.raises(ConfigError, match=reason):
        run(with_sinks(tiny, "lacking"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_drop_in_is_found(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "kept-names", Recorder)  # so that the registry is as before afterwards
    monkeypatch.setattr(sinks, "_items", dict(sinks._items))
    (tmp_path / "sinks").mkdir()
    (tmp_path / "sinks" / "text_file.py").write_text(
        '''
from fedkd.engine.sinks.base import Sink, sinks

@sinks.register("text-file")
class TextFile(Sink):
    """One line for each round."""

    def start(self, start):
        self.file = start.folder / "rounds.txt"
        return str(self.file)

    def write(self, round_, values):
        with self.file.open("a") as file:
            print(round_, len(values), file=file)

    def finish(self, final):
        pass
''',
        encoding="utf-8",
    )
    load_workspace(tmp_path)
    assert sinks.summary("text-file") == "One line for each round."
    run(with_sinks(tiny, "text-file", rounds=2), tmp_path / "run")
    lines = (tmp_path / "run" / "rounds.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split()[0] for line in lines] == ["0", "1", "2"]


def test_tensorboard_files_hold_each_round_once(tiny: Tiny, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    interrupted_and_resumed(with_sinks(tiny, "tensorboard"), tmp_path / "run")
    assert not [line for line in events(tmp_path / "run") if "warning" in line]
    found = EventAccumulator(str(tmp_path / "run" / "sinks" / "tensorboard"))
    found.Reload()
    written = values(read_records(tmp_path / "run" / "metrics.jsonl"))
    scalars = found.Scalars(ACCURACY)
    assert [s.step for s in scalars] == [1, 2, 3, 4]
    for scalar in scalars:
        assert scalar.value == pytest.approx(written[scalar.step][ACCURACY], rel=1e-6)
    assert "final/user_accuracy" in found.Tags()["scalars"]
    assert "_hparams_/session_start_info" in found.summary_metadata
    assert "experiment/text_summary" in found.Tags()["tensors"]


def test_mlflow_goes_on_with_the_same_run(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("mlflow", "sqlalchemy", "alembic"):
        pytest.importorskip(name, reason="the extra mlflow is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    (tmp_path / "sweep.toml").touch()
    folder = tmp_path / "runs" / "0123"
    interrupted_and_resumed(with_sinks(tiny, "mlflow"), folder)
    assert not [line for line in events(folder) if "warning" in line]
    kept = json.loads((folder / "sinks.json").read_text(encoding="utf-8"))["mlflow"]
    assert (tmp_path / "sinks" / "mlflow.db").is_file(), "not beside the runs of the sweep"
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=kept["place"])
    (only,) = client.search_runs([client.get_experiment_by_name("sunk").experiment_id])
    assert (only.info.run_id, only.info.status) == (kept["run_id"], "FINISHED")
    assert only.data.params["strategy.name"] == "fedavg"
    written = values(read_records(folder / "metrics.jsonl"))
    history = client.get_metric_history(only.info.run_id, ACCURACY)
    assert {m.step: m.value for m in history} == {t: written[t][ACCURACY] for t in (1, 2, 3, 4)}
    assert len(history) == 4
    assert "final/user_accuracy" in only.data.metrics


def test_wandb_is_offline_and_keeps_its_id(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    interrupted_and_resumed(with_sinks(tiny, "wandb"), tmp_path / "run")
    assert not [line for line in events(tmp_path / "run") if "warning" in line]
    kept = json.loads((tmp_path / "run" / "sinks.json").read_text(encoding="utf-8"))["wandb"]
    files = list((tmp_path / "run" / "sinks" / "wandb").glob("offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-{kept['id']}.wandb"] * 2
    assert any(ACCURACY.encode() in file.read_bytes() for file in files)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("WANDB_MODE", "online", True),
        ("WANDB_API_KEY", "0" * 40, True),
        ("NETRC", "machine api.wandb.ai login user password x\n", True),
        ("NETRC", "machine example.org login user password x\n", False),
        ("NETRC", "machine", False),
    ],
)
def test_values_leave_the_machine_only_if_the_user_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, wanted: bool
) -> None:
    for other in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not _wanted()
    if name == "NETRC":
        (tmp_path / "netrc").write_text(value, encoding="utf-8")
        (tmp_path / "netrc").chmod(0o600)
    else:
        monkeypatch.setenv(name, value)
    assert _wanted() == wanted
