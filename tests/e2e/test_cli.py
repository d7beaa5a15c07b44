"""The command line as a user meets it: results on disk, messages, exit codes, nothing lost."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fedkd
from fedkd.cli import main, progress
from fedkd.report import figures
from fedkd.strategies.base import strategies

DRAW = figures.write
ROOT = Path(fedkd.__file__).parent.parent
TINY = [
    *("rounds=3", "clients.count=3", "clients.training.lr=0.2", "model=mlp", "model.hidden=[12]"),
    *("data.source.limit=200", "data.source.test_limit=60", "data.partition=iid"),
    *("engine.executor=serial", "engine.device=cpu"),
]
ALONE = "compare.local-only.strategy=local-only"
DROP_IN = '''
from fedkd.errors import RunError
from fedkd.options import options
from fedkd.strategies.base import strategies
from fedkd.strategies.fedavg import FedAvg


@strategies.register("fragile")
@options
class Fragile(FedAvg):
    """FedAvg with clients that fail in round 2, or a server that does."""

    fails: str = "client"

    def local_update(self, client, received):
        if client.round == 2 and (self.fails == "all" or client.info.id == 1):
            if self.fails != "server":
                raise ValueError("spilled coffee")
        return super().local_update(client, received)

    def aggregate(self, state, uploads, round_, setting):
        if self.fails == "server" and round_ == 2:
            raise ZeroDivisionError("nothing to divide by")
        return super().aggregate(state, uploads, round_, setting)
'''


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every test has a working folder of its own; only one waits for figures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "write", lambda study: [])
    monkeypatch.delenv("FEDKD_TRACEBACK", raising=False)
    return tmp_path


@pytest.fixture
def fragile(here):
    """A drop-in strategy in the workspace, forgotten afterwards."""
    (here / "strategies").mkdir()
    (here / "strategies" / "fragile.py").write_text(DROP_IN)
    yield
    strategies._items.pop("fragile", None)


@pytest.fixture
def interrupt():
    """Return a function that makes Ctrl-C come after a round of a run, or no more."""
    patch, finished = pytest.MonkeyPatch(), progress.Tracker.finished_round

    def arm(label="", round_=0):

        def stop(self, number, log, failures):
            finished(self, number, log, failures)
            if (self.standing.label, number) == (label, round_):
                raise KeyboardInterrupt

        patch.setattr(progress.Tracker, "finished_round", stop)

    yield arm
    patch.undo()


def states(folder):
    """The bytes of every checkpointed state below a folder, and the numbers of its summaries."""
    files = {f.relative_to(folder): f.read_bytes() for f in folder.rglob("*.safetensors")}
    summaries = [json.loads(f.read_text()) for f in sorted(folder.rglob("seed-*/summary.json"))]
    return files, [(s["readouts"], s["bytes"]) for s in summaries]


def test_a_comparison_ends_in_a_table_and_a_folder_with_everything(here, capsys, monkeypatch):
    monkeypatch.setattr(figures, "write", DRAW)
    assert main(["run", *TINY, "strategy=fedavg", ALONE, "name=quick"]) == 0
    monkeypatch.setattr(figures, "write", lambda study: [])
    out, err = capsys.readouterr()
    assert "fedavg" in out and "vs local-only" in out and "lacks fedavg-ft" in out
    assert out.rstrip().endswith("Results: runs/quick")
    assert "[2/2] local-only, seed 0  round 3/3  accuracy" in err
    study = here / "runs" / "quick"
    assert {f.name for f in study.iterdir()} == {
        *("study.toml", "summary.json", "results.md", "results.csv", "readouts.md"),
        *("readouts.csv", "plots", "fedavg", "local-only"),
    }
    run = study / "fedavg" / "seed-0"
    assert {f.name for f in run.iterdir()} == {
        *("config.toml", "metrics.jsonl", "events.log", "partition.json", "summary.json"),
        *("checkpoint", "plots"),
    }
    assert main(["run", *TINY, "strategy=fedavg", ALONE, "name=quick", "--resume", "-q"]) == 0
    assert capsys.readouterr().err == ""
    assert not (here / "runs" / "quick-2").exists()
    assert main(["report", "runs/quick"]) == 0
    assert "vs local-only" in capsys.readouterr().out


def test_short_forms_reach_the_experiment(here):
    (here / "small.toml").write_text("[clients]\ncount = 3\n[clients.training]\nlr = 0.2\n")
    arguments = ["small.toml", *TINY[3:], "strategy=fedprox", "privacy=none", "rounds=1", "seed=4"]
    ratio = "clients.participation.ratio=0.5"
    assert main(["run", *arguments, ratio, "strategy.mu=0.5", "-q"]) == 0
    config = fedkd.load(here / "runs" / "small" / "config.toml")
    assert (config.strategy.name, config.strategy.options["mu"]) == ("fedprox", 0.5)
    assert (config.rounds, config.seed, config.clients.participation.ratio) == (1, 4, 0.5)
    assert main(["run", *arguments, "seeds=0,1", "-q"]) == 0
    runs = sorted(f.name for f in (here / "runs" / "small-2" / "fedprox").iterdir())
    assert runs == ["seed-0", "seed-1"]


def test_a_clients_preset_of_the_workspace_is_used(here):
    (here / "clients").mkdir()
    (here / "clients" / "trio.toml").write_text("# Three.\ncount = 3\n")
    words = [w for w in TINY if not w.startswith("clients.")]
    assert main(["run", *words, "strategy=local-only", "clients=trio", "rounds=1", "-q"]) == 0
    assert fedkd.load("runs/run/config.toml").clients.count == 3


BAD = {
    "unknown key": (["round=5"], ["unknown key 'round'", "did you mean 'rounds'?"]),
    "unknown inner key": (["clients.training.lrr=1"], ["clients.training.lrr", "lr"]),
    "wrong type": (["rounds=many"], ["rounds = 'many'", "integer"]),
    "alpha": (["data.partition=dirichlet", "data.partition.alpha=0"],
              ["data.partition.alpha = 0", "greater than 0"]),
    "ratio": (["clients.participation.ratio=1.5"],
              ["clients.participation.ratio = 1.5", "less than or equal to 1"]),
    "classes": (["data.partition={name='pathological', classes_per_client=11}"], ["11", "10"]),
    "cut": (["strategy.reading=cut", "strategy.cuts=conv9"],
            ["strategy.cuts", "'conv9'", "fc1"]),
    "strategy": (["strategy=fedavgg"], ["unknown strategy", "did you mean 'fedavg'?"]),
    "preset": (["clients=nobody"], ["unknown clients preset 'nobody'"]),
    "privacy": (["privacy=nono"], ["unknown privacy preset 'nono'", "none"]),
    "in a comparison": ([ALONE, "compare.x.strategy=fedproxx"], ["'x'", "did you mean 'fedprox'?"]),
    "missing data": (["data.source={name='npz', path='gone.npz'}"], ["gone.npz", "no such file"]),
    "missing set": (["data.source={name='fashion-mnist', folder='gone'}"], ["gone"]),
    "missing file": (["gone.toml"], ["no experiment file gone.toml"]),
    "folder": (["."], ["is a folder"]),
    "bad toml": (["bad.toml"], ["bad.toml is not valid TOML", "line 2"]),
    "two files": (["bad.toml", "five"], ["'bad.toml' and 'five'", "rounds=5"]),
    "no key": (["=5"], ["'=5' is not an override"]),
    "nothing to resume": (["--resume"], ["nothing to go on with", "leave out --resume"]),
    "resume what": (["--resume", "--out", "gone"], ["gone holds no run"]),
}  # fmt: skip


@pytest.mark.parametrize("arguments, words", BAD.values(), ids=BAD)
def test_bad_input_gives_one_clear_message_and_leaves_nothing(arguments, words, here, capsys):
    (here / "bad.toml").write_text("rounds = 1\nrounds = = 2\n")
    assert main(["run", *TINY, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    message = err[err.index("error: ") :]
    assert all(word in message for word in words), message
    assert "Traceback" not in err and message.count("\n") <= 2
    assert not (here / "runs").exists()


def test_a_word_that_is_no_command_or_option_is_bad_input_too(capsys):
    assert main(["rum"]) == 2
    assert main(["run", "--fast"]) == 2
    assert "No such option" in capsys.readouterr().err


def test_a_folder_in_use_is_never_overwritten(here, capsys):
    (here / "full").mkdir()
    (here / "full" / "thesis.txt").write_text("precious")
    assert main(["run", *TINY, "--out", "full"]) == 2
    assert "full is not empty; add --resume" in capsys.readouterr().err
    assert [f.name for f in (here / "full").iterdir()] == ["thesis.txt"]


def test_ctrl_c_loses_nothing_and_the_named_command_ends_as_an_undisturbed_run(
    here, capsys, interrupt
):
    words = [*TINY, "strategy=fedper", ALONE]
    assert main(["run", *words, "--out", "calm", "-q"]) == 0
    interrupt("local-only", 1)
    assert main(["run", *words, "--out", "torn", "-q"]) == 130
    err = capsys.readouterr().err
    assert "stopped in round 2 of local-only, seed 0; nothing finished is lost" in err
    command = err.split("Go on with: fedkd ")[1].split()
    assert command == ["run", "--resume", "--out", "torn"]
    interrupt()
    assert main(command) == 0
    err = capsys.readouterr().err
    assert "was finished: fedper, seed 0" in err
    assert "local-only, seed 0  round 2/3" in err and "round 3/3" in err
    assert states(here / "torn") == states(here / "calm")


def test_resume_without_a_folder_finds_the_experiment_or_says_what_differs(here, capsys, interrupt):
    interrupt("fedavg", 1)
    words = [*TINY, "strategy=fedavg", "name=mine"]
    assert main(["run", *words, "-q"]) == 130
    assert main(["run", *words, "seed=1", "-q"]) == 130
    interrupt()
    assert {f.name for f in (here / "runs").iterdir()} == {"mine", "mine-2"}
    capsys.readouterr()
    assert main(["run", *words, "rounds=9", "--resume", "-q"]) == 2
    err = capsys.readouterr().err
    assert "runs/mine-2 differs in rounds (3 there, 9 here); seed (1 there, 0 here)" in err
    assert main(["run", *words, "--resume", "-q"]) == 0
    assert (here / "runs" / "mine" / "summary.json").is_file()
    assert not (here / "runs" / "mine-2" / "summary.json").exists()


def test_a_corrupt_checkpoint_is_named(here, capsys, interrupt):
    interrupt("fedavg", 2)
    assert main(["run", *TINY, "strategy=fedavg", "--out", "torn", "-q"]) == 130
    interrupt()
    file = next((here / "torn" / "checkpoint").glob("server-*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    capsys.readouterr()
    assert main(["run", "--resume", "--out", "torn"]) == 2
    err = capsys.readouterr().err
    assert file.name in err and "Traceback" not in err


def test_a_full_disk_is_one_message_and_resume_loses_nothing(here, capsys, monkeypatch):
    words = [*TINY, "strategy=fedavg"]
    assert main(["run", *words, "--out", "roomy", "-q"]) == 0
    real, left = os.fsync, [12]

    def fsync(descriptor):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    assert main(["run", *words, "--out", "full", "-q"]) == 1
    err = capsys.readouterr().err
    assert "No space left on device" in err and "Traceback" not in err and "--resume" in err
    assert (here / "full" / "checkpoint" / "checkpoint.json").is_file()
    monkeypatch.setattr(os, "fsync", real)
    assert main(["run", "--resume", "--out", "full", "-q"]) == 0
    assert states(here / "full") == states(here / "roomy")


@pytest.mark.usefixtures("fragile")
def test_a_failing_client_is_reported_with_its_replay_and_harms_nobody(here, capsys):
    assert main(["run", *TINY, "strategy=fragile", "--out", "run"]) == 0
    out, err = capsys.readouterr()
    assert "fragile, seed 0: round 2: client 1: " in err and err.count("spilled coffee") == 1
    assert "Traceback" not in err
    assert "1 client failure; the runs went on without" in out
    command = err.split("replay it with: fedkd ")[1].split()[:2]
    assert command == ["replay", str(Path("run/failures/round-2-client-1"))]
    assert main(command) == 1
    err = capsys.readouterr().err
    assert "fails again" in err and "ValueError: spilled coffee" in err
    lines = (here / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    trained = {(r["round"], r["client"]) for r in records if r["metric"] == "loss/supervised"}
    assert trained == {(t, k) for t in (1, 2, 3) for k in range(3)} - {(2, 1)}


@pytest.mark.usefixtures("fragile")
def test_a_failed_run_leaves_the_others_and_a_row_that_says_so(here, capsys):
    words = [*TINY, "strategy=fragile", "strategy.fails=all", ALONE, "--out", "study", "-q"]
    assert main(["run", *words]) == 1
    out, err = capsys.readouterr()
    assert "failed" in out and "local-only" in out
    assert "run fragile, seed 0 failed: all participants of round 2 failed" in err
    assert "Go on with what failed: fedkd run --resume --out study" in out
    assert (here / "study" / "local-only" / "seed-0" / "summary.json").is_file()


@pytest.mark.usefixtures("fragile")
def test_a_defect_keeps_its_traceback_out_of_sight_but_on_disk(here, capsys, monkeypatch):
    words = [*TINY, "strategy=fragile", "strategy.fails=server", "-q"]
    assert main(["run", *words, "--out", "a"]) == 1
    err = capsys.readouterr().err
    assert "in round 2 of fragile, seed 0: ZeroDivisionError: nothing to divide by" in err
    assert "Traceback" not in err and str(Path("a/events.log")) in err
    assert "Traceback" in (here / "a" / "events.log").read_text()
    monkeypatch.setenv("FEDKD_TRACEBACK", "1")
    assert main(["run", *words, "--out", "b"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_replay_and_report_want_the_right_folder(here, capsys):
    assert main(["replay", "."]) == 2
    assert "holds no failure" in capsys.readouterr().err
    assert main(["report", "."]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_list_names_everything_with_a_line_each(here, capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    lines = {line.split()[0]: line for line in out.splitlines() if line.startswith("  ")}
    assert {"fedd2s", "digits", "dirichlet", "cnn", "kl", "thread", "none"} <= set(lines)
    assert "reconstruction" in lines["fedd2s"]
    assert all(len(line.split()) > 2 for line in lines.values())
    assert main(["list", "models"]) == 0
    assert "fedavg" not in capsys.readouterr().out
    assert main(["list", "modles"]) == 2
    assert "did you mean 'models'?" in capsys.readouterr().err


def test_show_tells_options_card_and_source(here, capsys):
    assert main(["show", "fedprox"]) == 0
    out = capsys.readouterr().out
    assert "mu" in out and "Options" in out and "Source: " in out
    (here / "privacy").mkdir()
    (here / "privacy" / "mine.toml").write_text("# My own.\n")
    assert main(["show", "mine"]) == 0
    assert "# My own." in capsys.readouterr().out
    assert main(["show", "experiment"]) == 0
    out = capsys.readouterr().out
    assert "clients.training.lr " in out and "dirichlet (alpha = 0.1)" in out
    assert main(["show", "dirichlett"]) == 2
    assert "did you mean 'dirichlet'?" in capsys.readouterr().err


def test_show_previews_a_partition_as_a_plot(here, capsys):
    words = ["show", "pathological", "--clients", "5", "--plot", "look/split.png"]
    assert main([*words, "classes_per_client=2"]) == 0
    out = capsys.readouterr().out
    assert "2 to 2 classes a client" in out
    assert (here / "look" / "split.png").is_file() and (here / "look" / "split.pdf").is_file()
    assert main([*words, "classes_per_client=0"]) == 2
    assert main(["show", "cnn", "--plot", "x.png"]) == 2
    assert "no partition" in capsys.readouterr().err


def test_doctor_finds_all_that_is_wrong_at_once(here, capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "torch" in out and "digits" in out and "at hand" in out and "GB free" in out
    assert main(["doctor", *TINY, "strategy=fedavg", ALONE]) == 0
    assert "everything works together" in capsys.readouterr().out
    wrong = ["strategy=fedavgg", "model=mpl", "data.partition.alpha=0", "privacy=nono", ALONE]
    assert main(["doctor", *wrong]) == 2
    out = capsys.readouterr().out
    assert out.count("problem: ") == 4
    assert "did you mean 'mlp'?" in out and "'fedavgg': unknown strategy" in out
    assert main(["doctor", "strategy.reading=cut", "strategy.cuts=conv9"]) == 2
    assert "which model 'cnn' does not have" in capsys.readouterr().out
    assert not (here / "runs").exists()


def test_help_does_not_wait_for_torch():
    script = (
        "import sys; from fedkd.cli import main; code = main(['run', '--help']); "
        "assert code == 0 and not {'torch', 'flwr', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--resume" in done.stdout


def test_a_reader_that_goes_away_is_no_error():
    command = [sys.executable, "-m", "fedkd", "list"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1
