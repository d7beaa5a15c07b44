"""Text and audits on the command line: what there is, what it is set by, what will not work."""

import pytest

from fedkd.cli import main
from fedkd.report import figures

TINY = [
    *("rounds=2", "clients.count=3", "strategy=fedavg", "data.partition=natural"),
    *("model=lstm", "model.width=4", "model.hidden=8", "model.depth=1"),
    *("data.source=pydoc-topics", "data.source.topics=3", "data.source.rows_per_topic=10"),
    *("data.source.length=20", "engine.executor=serial", "engine.device=cpu"),
]
CANARIES = ["canaries.kind=text", "canaries.pattern=pin {}{}{}", "canaries.count=4"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every test has a working folder of its own; none waits for figures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "write", lambda study: [])
    return tmp_path


def flat(text):
    """Text as one line, however it was wrapped."""
    return " ".join(text.split())


def test_a_run_on_text_shows_bits_while_it_runs_and_in_its_table(here, capsys):
    assert main(["run", *TINY, "--out", "run"]) == 0
    captured = capsys.readouterr()
    assert "bits/character" in captured.err + captured.out
    assert "bits per character" in (here / "run" / "results.md").read_text()
    assert "next-token accuracy" in flat(captured.out)


def test_tokenizers_are_listed_and_shown_with_where_they_are_set(capsys):
    assert main(["list", "tokenizers"]) == 0
    out = capsys.readouterr().out
    assert "char " in out and "wordpiece " in out
    for name in ("char", "wordpiece"):
        assert main(["show", name]) == 0
        assert f"data.source.tokenizer={name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, words",
    [
        ("shakespeare", "data.source=shakespeare data.source.path=... data.partition=natural"),
        ("pydoc-topics", "data.source=pydoc-topics data.partition=natural"),
        ("gpt-tiny", "data.source=pydoc-topics model=gpt-tiny"),
        ("lstm", "data.source=pydoc-topics model=lstm"),
        ("cnn", "FILE.toml model=cnn"),
        ("pattern", "privacy.swing.scorer=pattern"),
        ("natural", "data.partition=natural"),
    ],
)
def test_what_is_shown_says_how_it_is_used(name, words, capsys):
    assert main(["show", name]) == 0
    assert words in flat(capsys.readouterr().out)


def test_the_tables_of_canaries_and_audits_are_explained_with_their_students(capsys):
    for name in ("canaries", "audit", "experiment"):
        assert main(["show", name]) == 0
    out = capsys.readouterr().out
    assert out.count("canaries.repetitions ") == 2
    assert out.count("audit.students.NAME.swing.t_max ") == 2
    assert "compare.LABEL " in out and "fedkd show privacy | canaries | audit" in out


def test_partitions_of_text_are_previewed_as_rows(here, capsys):
    words = ["--clients", "3", "--plot", "look.png"]
    source = ["source.topics=3", "source.rows_per_topic=10"]
    assert main(["show", "natural", *source, "--source", "pydoc-topics", *words]) == 0
    out = capsys.readouterr().out
    assert "7 to 7 training rows of 64 tokens (median 7)" in out and "classes" not in out
    assert (here / "look.png").is_file()
    assert main(["show", "dirichlet", "source=pydoc-topics", *words]) == 0
    assert "Rows of text have no class" in flat(capsys.readouterr().out)
    assert main(["show", "natural", "source=shakespeare", "source.path=no", *words]) == 2
    assert "there is no such file" in flat(capsys.readouterr().err)
    assert main(["show", "natural", "source.topix=3", "source.name=pydoc-topics"]) == 2
    assert "did you mean 'topics'" in capsys.readouterr().err


def test_doctor_says_what_an_audit_can_see(capsys):
    changes = ["canaries.references=50", "canaries.repetitions=[1,2]", "seeds=[0,1]"]
    assert main(["doctor", *TINY, *CANARIES, *changes, "audit.reference_models=1"]) == 0
    out = flat(capsys.readouterr().out)
    assert "everything works together" in out and "canaries and audit of fedavg" in out
    assert "50 references are few" in out and "no extra run, 2 runs serve each other" in out
    assert main(["doctor", *TINY]) == 0
    assert "canaries" not in capsys.readouterr().out
    assert main(["doctor", *TINY, "canaries.kind=random-image"]) == 2
    assert "holds texts" in flat(capsys.readouterr().out)
