"""``fedkd audit`` as a user meets it: tables, files, nothing done twice, clear refusals."""

from __future__ import annotations

import json
import shutil

import pytest

from fedkd.audit import references, study
from fedkd.audit.finished import Finished
from fedkd.cli import main
from fedkd.report import audit_figures, figures

FILE = """
name = "leak"
rounds = 1
strategy = "fedavg"

[model]
name = "mlp"
hidden = [12]

[data]
partition = "iid"
source = { name = "digits", limit = 160, test_limit = 60 }
public = { size = 30 }

[clients]
count = 3
training = { lr = 0.2 }

[canaries]
kind = "random-image"
count = 16
repetitions = [1, 4]
references = 40

[audit]
estimator = "interpolation"
on = ["teacher", "student"]

[audit.students.plain]
epochs = 1

[engine]
executor = "serial"
device = "cpu"
"""
ALONE = "compare.alone.strategy=fedprox"
DRAW = audit_figures.draw


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every test has a folder of its own with one experiment file; only one waits for figures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "write", lambda study: [])
    monkeypatch.setattr(audit_figures, "draw", lambda results, folder: [])
    (tmp_path / "leak.toml").write_text(FILE)
    return tmp_path


@pytest.fixture
def runs(monkeypatch):
    """Count the runs that are played, of experiments and of reference models."""
    seen = []
    for module in (study, references):

        def counted(experiment, folder, *, _plain=module.run, **more):
            fresh = not (folder / "summary.json").exists()
            if fresh:
                seen.append((experiment.strategy.name, experiment.seed))
            return _plain(experiment, folder, **more)

        monkeypatch.setattr(module, "run", counted)
    return seen


def refused(capsys, arguments, code, *words):
    """Run a command that fails: one message with these words, and no traceback."""
    assert main(["audit", *arguments, "-q"]) == code
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert "defect" not in err
    assert err.count("error: ") == 1, err
    for word in words:
        assert word in err, err


def test_a_file_is_run_audited_and_drawn(here, capsys, monkeypatch, runs):
    monkeypatch.setattr(audit_figures, "draw", DRAW)
    words = ["audit.reference_models=1", "audit.on=teacher"]
    assert main(["audit", "leak.toml", *words]) == 0
    out, err = capsys.readouterr()
    assert runs == [("fedavg", 0), ("fedavg", 1)]
    assert "teacher" in out and "exposure" in out
    assert out.rstrip().endswith("Results: runs/leak-audit")
    assert "audit of fedavg, seed 0" in err
    place = here / "runs" / "leak-audit"
    (found,) = json.loads((place / "audits.json").read_text())["results"]
    assert set(found["subjects"]) == {"teacher"}
    assert found["canaries"]["reference_models"] == 1
    assert len(list((place / "runs").iterdir())) == 2
    pictures = {f.suffix for f in place.rglob("*") if f.suffix in (".png", ".pdf")}
    assert pictures == {".png", ".pdf"}
    assert list(place.rglob("*.md"))
    assert not (here / "leak-audit").exists()


def test_the_same_command_again_does_nothing_twice(here, capsys, runs):
    assert main(["audit", "leak.toml", "--out", "kept", "-q"]) == 0
    assert runs == [("fedavg", 0)]
    first = (here / "kept" / "audits.json").read_text()
    students = {f: f.stat().st_mtime_ns for f in (here / "kept" / "students").iterdir()}
    assert main(["audit", "leak.toml", "--out", "kept", "-q"]) == 0
    assert (here / "kept" / "audits.json").read_text() == first
    assert main(["audit", "leak.toml", ALONE, "--out", "kept", "-q"]) == 0
    assert runs == [("fedavg", 0), ("fedprox", 0)]
    now = {f: f.stat().st_mtime_ns for f in (here / "kept" / "students").iterdir()}
    assert len(now) == 2
    assert students.items() <= now.items()
    results = json.loads((here / "kept" / "audits.json").read_text())["results"]
    assert [r["run"]["label"] for r in results] == ["fedavg", "alone"]
    assert capsys.readouterr().err == ""


def test_a_stopped_audit_goes_on(here, capsys, monkeypatch, runs):
    def stop(*args, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(study, "audit_run", stop)
        assert main(["audit", "leak.toml", "--out", "torn", "-q"]) == 130
    assert "Go on with the same command" in capsys.readouterr().err
    assert main(["audit", "leak.toml", "--out", "torn", "-q"]) == 0
    assert runs == [("fedavg", 0)]


def test_a_run_folder_is_audited_in_place(here, capsys, runs):
    assert main(["run", "leak.toml", "--out", "run", "-q"]) == 0
    before = {f for f in (here / "run").rglob("*") if f.is_file()}
    assert main(["audit", "run", "-q"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("Results: run")
    found = json.loads((here / "run" / "audit.json").read_text())
    assert set(found["subjects"]) == {"teacher", "student:plain"}
    assert {f for f in (here / "run").rglob("*") if f.is_file()} > before
    words = ["audit.on=teacher", "audit.reference_models=1", "--out", "other"]
    assert main(["audit", "run", *words, "-q"]) == 0
    assert runs == [("fedavg", 1)]
    found = json.loads((here / "run" / "audit.json").read_text())
    assert set(found["subjects"]) == {"teacher"}
    assert "rmia-offline" in found["subjects"]["teacher"]["attacks"]
    assert list((here / "other").iterdir())
    refused(capsys, ["run", "rounds=2"], 2, "'rounds=2'", "audit.key=value")
    refused(capsys, ["run", "audit.on=teecher"], 2, "did you mean 'teacher'?")
    refused(capsys, ["run", "audit.estimator=exact"], 2, "audit.estimator = 'exact'", "'auto'")


def test_a_comparison_is_audited_and_its_seeds_serve_each_other(here, runs):
    words = ["leak.toml", ALONE, "seeds=0,1", "--out", "study", "-q"]
    assert main(["run", *words]) == 0
    assert main(["audit", "study", "audit.reference_models=1", "audit.students={}", "-q"]) == 0
    assert runs == []
    found = sorted((here / "study").glob("*/seed-*/audit.json"))
    assert len(found) == 4
    labels = {json.loads(f.read_text())["run"]["label"] for f in found}
    assert labels == {"fedavg", "alone"}
    for file in found:
        assert json.loads(file.read_text())["canaries"]["reference_models"] == 1


def test_text_is_audited_by_the_same_command(here, capsys):
    text = FILE.replace("hidden = [12]\n", "").replace('"mlp"', '"gpt-tiny"')
    text = text.replace('partition = "iid"', 'partition = "natural"').replace(
        'source = { name = "digits", limit = 160, test_limit = 60 }',
        'source = { name = "pydoc-topics", topics = 3, rows_per_topic = 8, length = 16 }',
    )
    text = text.replace("size = 30", "size = 4").replace("random-image", "text")
    text = text.replace("[audit]", 'pattern = "pin {}{}"\n\n[audit]')
    (here / "text.toml").write_text(text)
    words = ["text.toml", "canaries.count=6", "audit.estimator=exact", "--out", "text"]
    assert main(["audit", *words, "-q"]) == 0
    assert "teacher" in capsys.readouterr().out
    (found,) = json.loads((here / "text" / "audits.json").read_text())["results"]
    assert found["subjects"]["teacher"]["exposure"]["method"] == "exact"
    assert found["subjects"]["teacher"]["quality"]["bits_per_character"] > 1
    shutil.rmtree(here / "text")
    refused(
        capsys, [*words, "canaries.pattern=pin {}{} é"], 2,
        "canary that the tokenizer cannot write", "no 'é'", "canaries.pattern",
    )  # fmt: skip
    refused(capsys, [*words, "canaries.references=99"], 2, "distinct secrets", "at most 88")
    refused(capsys, [*words, "strategy=fd"], 2, "exchanges knowledge by class")
    assert not (here / "text").exists()


BAD = {
    "no file": (["gone.toml"], ["no experiment file gone.toml"]),
    "nothing planted": (["leak.toml", "canaries.kind=none"],
                        ["no canary is planted", "canaries.kind = 'text'"]),
    "all tails": (["leak.toml", "canaries.count=1", "canaries.repetitions=[1]",
                   "canaries.seed=TAILS"], ["fell on tails", "canaries.coin = false"]),
    "kind": (["leak.toml", "canaries.kind=text"], ["digits holds inputs", '"random-image"']),
    "unknown": (["leak.toml", "audit.reference_model=2"],
                ["'audit.reference_model'; did you mean 'reference_models'?"]),
    "too many": (["leak.toml", "audit.reference_models=17"], ["audit.reference_models = 17"]),
    "student": (["leak.toml", "audit.students.plain.transfer=secret"], ["plain", "transfer"]),
    "few references": (["leak.toml", "canaries.references=19"],
                       ["canaries.references = 19", "too few", "20"]),
    "no teacher": (["leak.toml", "strategy=fd"], ["'fd' has no global network"]),
    "exact": (["leak.toml", "audit.estimator=exact"], ["audit.estimator = 'exact'", "'auto'"]),
    "objective": (["leak.toml", "audit.students.plain.objective=kll"], ["'kll'", "'kl'"]),
    "network": (["leak.toml", "audit.students.plain.model=mpl"], ["did you mean 'mlp'?"]),
    "no pool": (["leak.toml", "audit.students.plain.transfer=public", "data.public.size=0"],
                ["audit.students.plain.transfer", "data.public.size"]),
    "empty folder": (["empty"], ["holds no run to audit", "experiment file"]),
    "two folders": (["empty", "empty2"], ["give one folder"]),
}  # fmt: skip


def tails() -> str:
    """The seed of a canary whose coin falls on tails."""
    from fedkd.rng import stream

    coins = (stream(0, "canaries", "coins", s).child("coin", 0).uniform() for s in range(99))
    return str(next(s for s, coin in enumerate(coins) if coin >= 0.5))


@pytest.mark.parametrize(("arguments", "words"), BAD.values(), ids=BAD)
def test_bad_input_gives_one_clear_message_and_leaves_nothing(arguments, words, here, capsys):
    for name in ("empty", "empty2"):
        (here / name).mkdir()
    refused(capsys, [a.replace("TAILS", tails()) for a in arguments], 2, *words)
    assert not (here / "runs").exists()


def test_a_run_without_canaries_or_end_is_refused(here, capsys):
    assert main(["run", "leak.toml", "canaries.kind=none", "--out", "clean", "-q"]) == 0
    refused(capsys, ["clean"], 2, "no canary was planted in the run in clean")
    assert main(["run", "leak.toml", "--out", "half", "-q"]) == 0
    summary = here / "half" / "summary.json"
    whole = summary.read_text()
    summary.unlink()
    refused(capsys, ["half"], 2, "not finished", "--resume")
    summary.write_text("{}")
    refused(capsys, ["half"], 2, "summary.json cannot be read")
    summary.write_text(whole)
    (here / "half" / "canaries.json").unlink()
    refused(capsys, ["half"], 2, "canaries.json cannot be read")


def test_losses_that_are_not_finite_fail_that_audit_alone(here, capsys, monkeypatch):
    plain = Finished.load

    def broken(path):
        found = plain(path)
        if found.prepared.experiment.strategy.name == "fedprox":
            for value in found.state.values():
                if value.dtype.kind == "f":
                    value[...] = float("nan")
        return found

    monkeypatch.setattr(Finished, "load", broken)
    words = ["leak.toml", ALONE, "audit.students={}", "--out", "torn"]
    refused(capsys, words, 1, "audit of alone, seed 0 failed", "losses are not finite", "lower")
    table = json.loads((here / "torn" / "audits.json").read_text())
    assert [r["run"]["label"] for r in table["results"]] == ["fedavg"]
    assert [f["label"] for f in table["failed"]] == ["alone"]


def test_a_run_that_diverges_fails_with_its_reason(here, capsys):
    words = ["leak.toml", "clients.training.lr=1e30", "rounds=2", "--out", "wild"]
    refused(capsys, words, 1, "audit of fedavg, seed 0 failed", "training diverged")
