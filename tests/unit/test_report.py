import csv
import json
from dataclasses import replace

import numpy as np
import pytest

from fedkd import report
from fedkd.config import experiment
from fedkd.engine.study import CellResult, run_study
from fedkd.metrics.intervals import mean_t, paired_t
from fedkd.report import figures, style, tables
from fedkd.report.comparison import comparison
from fedkd.report.runs import RunView, views

TABLE = {
    "name": "small",
    "rounds": 2,
    "seeds": [0, 1],
    "strategy": "fedavg",
    "model": {"name": "mlp", "hidden": [12]},
    "data": {
        "source": {"name": "digits", "limit": 200, "test_limit": 60},
        "partition": {"name": "dirichlet", "alpha": 1.0},
    },
    "clients": {"count": 3, "training": {"lr": 0.2}},
    "engine": {"executor": "serial", "device": "cpu", "checkpoint_every": 100},
    "compare": {"alone": {"strategy": "local-only"}},
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    made = run_study(experiment(TABLE), tmp_path_factory.mktemp("study") / "two-seeds")
    report.write(made)
    return made


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    strategy = {"name": "fedd2s", "reading": "cut", "cuts": ["fc1"], "predict": "ensemble"}
    table = {**TABLE, "strategy": strategy, "seeds": [], "name": "heads"}
    table["compare"] = {
        "smooth": {"strategy": {"name": "local-only", "label_smoothing": 0.1}},
        "alone": {"strategy": "local-only"},
        "even alone": {"strategy": "local-only", "data.partition": "iid"},
        "even": {"strategy": "fedavg", "data.partition": "iid"},
    }
    return run_study(experiment(table), tmp_path_factory.mktemp("study") / "heads")


def read_csv(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def accuracies(study, label):
    entries = [c.summary["readouts"]["composite"]["personal"] for c in study.cells]
    kept = [e for e, c in zip(entries, study.cells, strict=True) if c.label == label]
    return [e["mean_last_k"]["user_accuracy"] for e in kept]


def test_two_seeds_give_students_t_and_a_paired_difference(study):
    shown = comparison(study)
    ours, alone = accuracies(study, "fedavg"), accuracies(study, "alone")
    assert shown.row("fedavg").values["mean_last_k"] == mean_t(ours)
    assert shown.row("fedavg").values["difference"] == paired_t(ours, alone)
    assert "difference" not in shown.row("alone").values
    assert any("Student's t over 2 seeds" in note for note in shown.notes)


def test_one_seed_gives_a_bootstrap_over_clients_and_the_caption_says_so(heads):
    shown = comparison(heads)
    made = shown.row("alone").values["mean_last_k"]
    cell = next(c for c in heads.cells if c.label == "alone")
    entry = cell.summary["readouts"]["composite"]["personal"]["mean_last_k"]
    assert made.value == entry["user_accuracy"]
    assert (made.n, made.method) == (3, "BCa bootstrap 95% over clients")
    assert made.low <= made.value <= made.high
    assert any("clients of one seed" in note for note in shown.notes)


def test_each_rule_of_reporting_has_its_own_clients(study):
    run = views(study)["fedavg"][0]
    for rule in ("mean_last_k", "last", "chosen_on_validation"):
        mean = run.by_client(rule).mean()
        assert mean == pytest.approx(run.entry(rule)["user_accuracy"], rel=1e-12)
    assert run.by_client("last").tolist() == run.entry("last")["by_client"]


def test_the_difference_is_to_local_only_on_the_same_data_or_left_out(heads):
    shown = comparison(heads)
    even, alone = shown.row("even").values, shown.row("even alone").values
    gap = even["mean_last_k"].value - alone["mean_last_k"].value
    assert even["difference"].value == pytest.approx(gap)
    without = replace(heads, cells=[c for c in heads.cells if c.label != "even alone"])
    assert "difference" not in comparison(without).row("even").values
    assert "difference" in comparison(without).row("fedd2s").values
    # A variant of local-only is measured by the plain one, wherever that stands.
    assert "difference" in shown.row("smooth").values
    assert "difference" not in shown.row("alone").values


def test_every_predictor_is_in_the_long_table_and_the_chosen_one_is_the_headline(heads):
    shown = comparison(heads)
    assert shown.row("fedd2s").predict == "ensemble"
    found = {(r.readout, r.predict) for r in shown.readouts if r.label == "fedd2s"}
    assert {("composite", "ensemble"), ("composite", "global_head"), ("own", "personal")} <= found
    lead = [r for r in shown.readouts if r.label == "fedd2s" and r.headline]
    assert [(r.readout, r.predict) for r in lead] == [("composite", "ensemble")]
    shown_as = lead[0].values["mean_last_k"].value
    assert shown_as == shown.row("fedd2s").values["mean_last_k"].value
    assert "**ensemble**" in tables.readouts_markdown(shown)


def test_missing_baselines_are_named_with_what_adds_them(study, heads):
    note = next(n for n in comparison(study).notes if "lacks" in n)
    assert "lacks fedavg-ft," in note
    assert "compare.fedavg-ft.strategy=fedavg-ft" in note
    both = replace(study, cells=[*study.cells, *_as(study.cells[:1], "tuned", "fedavg-ft")])
    assert not any("lacks" in n for n in comparison(both).notes)


def _as(cells, label, strategy):
    return [replace(c, label=label, summary={**c.summary, "strategy": strategy}) for c in cells]


def test_a_failed_run_has_a_row_that_says_so_and_harms_no_other(study, tmp_path):
    lost = CellResult("broken", 0, tmp_path, None, "the disk is full | really")
    shown = comparison(replace(study, folder=tmp_path, cells=[*study.cells, lost]))
    assert shown.row("fedavg").values["mean_last_k"] == mean_t(accuracies(study, "fedavg"))
    assert "failed" in str(shown)
    assert "| broken | failed: seed 0: the disk is full \\| really |" in tables.markdown(shown)
    tables.write(shown)
    rows = read_csv(tmp_path / "results.csv")
    assert (rows[2]["label"], rows[2]["mean_last_k"]) == ("broken", "")
    assert "disk is full" in rows[2]["error"]


def test_one_failed_seed_leaves_the_others(study, tmp_path):
    lost = replace(study.cells[1], summary=None, error="stopped")
    row = comparison(replace(study, cells=[study.cells[0], lost, *study.cells[2:]])).row("fedavg")
    assert (row.seeds, row.error) == ((0,), "seed 1: stopped")


def test_nothing_finished_is_said_plainly(study, tmp_path):
    cells = [replace(c, summary=None, error="stopped") for c in study.cells]
    unfinished = replace(study, cells=cells)
    assert "No run has finished" in str(comparison(unfinished))
    assert figures.write(unfinished) == []


def test_files_hold_the_same_numbers(study):
    shown = comparison(study)
    rows = read_csv(study.folder / "results.csv")
    saved = json.loads((study.folder / "summary.json").read_text(), parse_constant=pytest.fail)
    for row, line, entry in zip(shown.rows, rows, saved["rows"], strict=True):
        made = row.values["mean_last_k"]
        assert [float(line[f"mean_last_k{p}"]) for p in ("", "_low", "_high")] == [
            made.value,
            made.low,
            made.high,
        ]
        assert entry["mean_last_k"]["value"] == made.value
        assert f"| {row.label} | {100 * made.value:.1f} [" in tables.markdown(shown)
    assert len(saved["readouts"]) == len(shown.readouts) == 6


@pytest.mark.parametrize("width", [50, 80, 100, 120, 200])
def test_the_terminal_table_fits_and_breaks_no_number(study, width):
    text = tables.text(comparison(study), width)
    assert max(map(len, text.splitlines())) <= width
    made = comparison(study).row("fedavg").values["mean_last_k"]
    assert tables.COLUMNS[0].show(made) in text
    assert ("global" in text) == (width == 200)


def test_a_report_from_disk_equals_the_one_from_memory(study):
    again = report.load(study.folder)
    assert tables.plain(comparison(again)) == tables.plain(comparison(study))
    single = report.load(study.cells[0].folder)
    assert [c.label for c in single.cells] == ["fedavg"]
    assert "one seed" in str(comparison(single))


def test_every_run_and_the_study_have_their_figures(study):
    for folder, stems in (
        (study.cells[0].folder, {"accuracy", "labels"}),
        (study.cells[3].folder, {"accuracy", "labels"}),
        (study.folder, {"accuracy", "labels", "bytes", "clients"}),
    ):
        files = {f.name: f.read_bytes() for f in (folder / "plots").iterdir()}
        assert set(files) == {f"{s}{suffix}" for s in stems for suffix in (".png", ".pdf")}
        assert all(f.startswith(b"\x89PNG" if n.endswith("png") else b"%PDF") for n, f in
                   files.items())  # fmt: skip
    first, other = (study.cells[i].folder / "plots" / "labels.png" for i in (0, 1))
    assert first.read_bytes() != other.read_bytes()


def test_figures_are_drawn_again_bit_for_bit(study, tmp_path):
    groups = views(study)
    for draw in (figures.accuracy, figures.traffic, figures.clients):
        one, two = draw(groups, tmp_path / "a"), draw(groups, tmp_path / "b")
        assert [f.read_bytes() for f in one] == [f.read_bytes() for f in two]


def test_a_run_of_one_round_with_a_failing_client_can_be_drawn(tmp_path, study, monkeypatch):
    table = np.array([[0.5, np.nan, 0.7]])
    monkeypatch.setattr(RunView, "judged", lambda self: ([1], table))
    assert figures.accuracy_of_clients(views(study)["fedavg"][0], tmp_path / "a")
    assert figures.accuracy(views(study), tmp_path / "b")
    assert figures.clients(views(study), tmp_path / "c")


def test_figures_do_without_data_that_are_gone(study, tmp_path, monkeypatch):
    from fedkd.errors import DataError

    def gone(config):
        raise DataError("gone")

    monkeypatch.setattr(figures, "gather", gone)
    assert figures.labels(views(study)["fedavg"]) == []


def test_the_first_28_lines_look_different():
    looks = {tuple(style.colour(i).values()) for i in range(28)}
    assert len(looks) == 28


SNIPPET = """
import fedkd
from fedkd import report

experiment = fedkd.load("quickstart.toml", ["rounds=2", "clients.count=3"])
study = fedkd.run_study(experiment, "results")
print(report.write(study))
"""


def test_the_main_job_takes_fewer_than_ten_lines_of_python(tmp_path, monkeypatch, capsys):
    table = {**TABLE, "seeds": []}
    (tmp_path / "quickstart.toml").write_text(experiment(table).toml())
    monkeypatch.chdir(tmp_path)
    assert len(SNIPPET.strip().splitlines()) < 10
    exec(compile(SNIPPET, "snippet", "exec"), {})
    assert "vs local-only" in capsys.readouterr().out
    assert (tmp_path / "results" / "plots" / "accuracy.png").is_file()
