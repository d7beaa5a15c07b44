"""Privacy on the command line: what is claimed stands under every table, what is wrong is told."""

import json
import re

import pytest

from fedkd.cli import main
from fedkd.report import figures

TINY = [
    *("rounds=3", "clients.count=4", "clients.training.lr=0.2", "model=mlp", "model.hidden=[12]"),
    *("data.source.limit=160", "data.source.test_limit=60", "data.partition=iid"),
    *("engine.executor=serial", "engine.device=cpu", "strategy=fedavg"),
]
UNIFORM = "strategy.weighting=uniform"
POISSON = "clients.participation={scheme='poisson', ratio=0.5}"
CLIENT = ["privacy=client-eps8", "privacy.accountant=rdp", UNIFORM, POISSON]
ALONE = "compare.local-only={strategy='local-only', privacy='none'}"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every test has a working folder of its own; none waits for figures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "write", lambda study: [])
    return tmp_path


def flat(text):
    """Text as one line, however it was wrapped."""
    return " ".join(text.split())


def test_a_run_ends_with_its_claim_and_what_is_not_covered(here, capsys):
    assert main(["run", *TINY, *CLIENT, ALONE, "-q", "--out", "run"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 120
    said = flat(out)
    rest = (
        "for each client (add-remove adjacency, Poisson sampling of clients at rate 0.5, "
        "delta = 1e-05, rdp accountant)"
    )
    assert "fedavg: epsilon = " in said and said.count(rest) == 1
    assert "local-only: no privacy mechanism was used; nothing is claimed (epsilon: inf)" in said
    assert said.count("the server: it is trusted") == 1 and "Not covered:" in said
    ledger = json.loads((here / "run" / "fedavg" / "seed-0" / "privacy.json").read_text())
    assert 7.9 < ledger["epsilon"] <= 8
    rows = {line.split()[0]: line for line in out.splitlines() if line.startswith((" fed", " loc"))}
    assert " none " in rows["local-only"] and "epsilon" in out
    saved = (here / "run" / "results.md").read_text()
    assert "## Privacy" in saved and rest in saved and "| epsilon |" in saved
    table = json.loads((here / "run" / "summary.json").read_text())
    by_label = {row["label"]: row for row in table["rows"]}
    assert by_label["fedavg"]["epsilon"]["value"] == ledger["epsilon"]
    assert "epsilon" not in by_label["local-only"]
    assert main(["report", "run"]) == 0
    again = flat(capsys.readouterr().out)
    assert rest in again and "Not covered:" in again


def test_without_a_mechanism_there_is_no_column_and_one_sentence(here, capsys):
    assert main(["run", *TINY, "-q", "--out", "run", "rounds=1"]) == 0
    out = capsys.readouterr().out
    assert out.count("epsilon") == 1 and "nothing is claimed (epsilon: inf)" in out
    assert "Not covered" not in out
    assert "| epsilon |" not in (here / "run" / "results.md").read_text()


def test_no_noise_is_an_epsilon_of_infinity_in_the_table_and_in_the_files(here, capsys):
    nothing = ["privacy.unit=client", "privacy.noise_multiplier=0", "privacy.delta=1e-5", UNIFORM]
    assert main(["run", *TINY, *nothing, ALONE, "-q", "--out", "run", "rounds=1"]) == 0
    assert "epsilon = inf for each client" in flat(capsys.readouterr().out)
    table = json.loads((here / "run" / "summary.json").read_text())
    assert table["rows"][0]["epsilon"]["value"] == "inf"


def test_of_several_seeds_the_largest_epsilon_is_told(here, capsys):
    own = ["privacy.unit=client", "privacy.trust=local", "privacy.adjacency=zero-out"]
    noise = ["privacy.noise_multiplier=2", "privacy.delta=1e-5"]
    rare = "clients.participation={scheme='poisson', ratio=0.3}"
    assert main(["run", *TINY, *own, *noise, rare, "seeds=0,1", "-q", "--out", "run"]) == 0
    said = flat(capsys.readouterr().out)
    files = sorted((here / "run").rglob("privacy.json"))
    first, second = (json.loads(f.read_text())["epsilon"] for f in files)
    assert first != second
    table = json.loads((here / "run" / "summary.json").read_text())
    told = table["rows"][0]["epsilon"]
    assert told["value"] == max(first, second) and told["n"] == 2 and told["low"] is None
    assert said.count("epsilon = ") == 1 and "with noise added by the client itself" in said
    assert "rdp accountant); the largest over seeds" in said


def test_a_run_that_its_budget_stops_says_so_and_doctor_said_so_before(here, capsys):
    words = [*TINY, *CLIENT, "privacy.max_epsilon=7"]
    assert main(["doctor", *words]) == 0
    told = flat(capsys.readouterr().out)
    planned = int(told.split("stops the run before round ")[1].split()[0])
    assert main(["run", *words, "-q", "--out", "run"]) == 0
    said = flat(capsys.readouterr().out)
    assert f"fedavg: stopped after round {planned - 1}: round {planned} would exceed" in said
    ledger = json.loads((here / "run" / "privacy.json").read_text())
    assert 0 < ledger["epsilon"] <= 7
    assert f"stopped after round {planned - 1}" in (here / "run" / "results.md").read_text()


def test_doctor_knows_the_round_in_which_examples_have_spent_their_budget(here, capsys):
    noise = ["privacy.unit=example", "privacy.noise_multiplier=1.5", "privacy.delta=1e-5"]
    words = [*TINY, *noise, POISSON, "rounds=6", "privacy.max_epsilon=5"]
    assert main(["doctor", *words]) == 0
    told = flat(capsys.readouterr().out)
    planned = int(told.split("stops the run before round ")[1].split()[0])
    assert main(["run", *words, "-q", "--out", "run"]) == 0
    assert f"stopped after round {planned - 1}: " in flat(capsys.readouterr().out)


def test_doctor_tells_noise_cost_and_what_was_checked(capsys):
    assert main(["doctor", *TINY, *CLIENT, ALONE]) == 0
    out = capsys.readouterr().out
    said = flat(out)
    assert "privacy of fedavg" in out and "privacy of local-only" not in out
    spent = re.search(r"at most epsilon = ([\d.]+) for each client \(add-remove adjacency", said)
    assert spent is not None and 7.9 <= float(spent[1]) <= 8
    assert "is below 1 / 4 (clients)" in said and "its floor for these releases is " in said
    assert "expected clients" in said and "all rounds are played" in said
    assert said.count("the server: it is trusted") == 1
    wrong = ["strategy=fedavgg", "model=mpl", "privacy=client-eps9"]
    assert main(["doctor", *TINY, *wrong]) == 2
    out = capsys.readouterr().out
    assert out.count("problem: ") == 3 and "did you mean 'client-eps8'?" in out


BAD = {
    "weighting": (["privacy=client-eps8", POISSON],
                  ["strategy.weighting = 'examples'", "set strategy.weighting = 'uniform'"]),
    "fixed cohorts": (["privacy=client-eps8", UNIFORM, "clients.participation.ratio=0.5"],
                      ["clients.participation.scheme", "'poisson'", "not amplified"]),
    "large delta": ([*CLIENT, "privacy.delta=0.3"],
                    ["privacy.delta = 0.3 is not below 1 / 4", "lower delta"]),
    "floor": ([*CLIENT, "privacy.epsilon=0.001"], ["cannot be reached", "prv", "floor"]),
    "secure mode": ([*CLIENT, "privacy.secure_mode=true"], ["torchcsprng", "set it to false"]),
    "three of two": ([*CLIENT, "privacy.noise_multiplier=1", "privacy.delta=1e-5",
                      "privacy.epsilon=8"], ["leave one out"]),
    "one of two": (["privacy.unit=client", "privacy.epsilon=8", UNIFORM],
                   ["only privacy.epsilon is set", "privacy.delta = 1e-5"]),
    "budget for nothing": (["privacy.max_epsilon=3"], ["max_epsilon", "privacy.unit"]),
    "budget too small": ([*CLIENT, "privacy.max_epsilon=0.1"],
                         ["privacy.max_epsilon = 0.1 does not pay for one round"]),
    "no clipping": ([*CLIENT, "privacy.clipping.norm=inf"],
                    ["privacy.clipping.norm = inf", "give a finite norm"]),
    "typo": (["privacy.epsilom=8"], ["privacy.epsilom"]),
    "negative": (["privacy.unit=client", "privacy.epsilon=-1"], ["privacy.epsilon = -1"]),
    "local presence": ([*CLIENT, "privacy.trust=local"], ["'zero-out' or 'replace-one'"]),
    "no teacher": (["privacy=swing"], ["no teacher", "privacy.swing.map = 'off'"]),
    "no pool": (["privacy=swing", "strategy=ds-fl"], ["public pool", "data.public.size = 500"]),
    "class means": (["privacy=example-eps8", "strategy=fedproto"],
                    ["privacy.release.mode = 'dpsgd+release'"]),
    "batch": (["privacy=example-eps8", "strategy=fedkd-wu2022"], ["no mechanism covers"]),
}  # fmt: skip


@pytest.mark.parametrize("arguments, words", BAD.values(), ids=BAD)
def test_what_cannot_be_justified_is_refused_with_the_fix(arguments, words, here, capsys):
    assert main(["run", *TINY, *arguments, "-q", "--out", "run"]) == 2
    out, err = capsys.readouterr()
    assert all(word in err for word in words), err
    assert out == "" and "Traceback" not in err
    assert not (here / "run" / "summary.json").exists()


def test_show_and_list_know_presets_scorers_and_the_table(capsys):
    assert main(["list", "scorers"]) == 0
    out = capsys.readouterr().out
    assert {"knn", "mask", "reference-loss"} <= {line.split()[0] for line in out.splitlines()[2:-1]
                                                 if line}  # fmt: skip
    assert main(["show", "knn"]) == 0
    assert "privacy.swing.scorer=knn" in capsys.readouterr().out
    assert main(["show", "privacy"]) == 0
    out = capsys.readouterr().out
    assert "privacy.clipping.norm" in out and "votes-gnmax" in out
    assert main(["show", "client-eps8"]) == 0
    out = capsys.readouterr().out
    assert "epsilon = 8.0" in out and "Threat model" in out
