"""Tables of synthetic sweeps: run folders as the engine writes them, with made-up accuracies."""

import csv
import io
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from fedkd.config import experiment
from fedkd.engine.folder import RunFolder
from fedkd.metrics.log import Log
from fedkd.metrics.summary import summarise
from fedkd.report import latex, measures, sheet_files, sweep_tables
from fedkd.report.collection import RATIO, Collection, collect
from fedkd.report.sheets import Cell, Heading, Sheet, plain_cell
from fedkd.rng import stream
from fedkd.sweep.failed import keep_reason
from fedkd.sweep.plan import plan, write_index
from fedkd.types import Record

EVIL = "a|b <script>_x_</script> & 5 % #1 ${y}~^\\ *z*"
STRENGTH = {"fedavg": 0.4, "alone": 0.5, EVIL: 0.7}
BASE = {
    "name": "small",
    "rounds": 4,
    "seeds": [0, 1, 2],
    "strategy": "fedavg",
    "model": "mlp",
    "data": {"source": "digits", "partition": "dirichlet"},
    "clients": {"count": 5},
    "evaluate": {"every": 2, "last_k": 1},
    "compare": {"alone": {"strategy": "local-only"}, EVIL: {"strategy": "fedavg-ft"}},
}


def records(run):
    """Two judged rounds of five clients; labels, ratios and seeds differ as STRENGTH says."""
    ratio = run.point.get(RATIO, 1.0)
    rng = stream(run.seed, "hard", run.label, str(ratio)).numpy()
    level = STRENGTH[run.label] + 0.1 * ratio + 0.02 * run.seed
    found = []
    for played in range(1, 5):
        # Times that differ between folders, on purpose: no table of results may hold them.
        seconds = len(str(run.folder)) + played / 7
        found.append(Record(round=played, metric="seconds", value=seconds, split="train"))
        sent = 0.0 if run.label == "alone" else 1e6 * ratio
        found.append(Record(round=played, metric="bytes_up", value=sent, split="train"))
        found.append(Record(round=played, metric="bytes_down", value=sent, split="train"))
        if played % 2:
            continue
        for client in range(5):
            value = level * played / 4 + 0.04 * client + 0.01 * rng.normal()
            found += [
                Record(round=played, metric="accuracy", value=float(np.clip(value, 0, 1)),
                       client=client, split=split, readout="composite", predict="personal")
                for split in ("test", "validation")
            ]  # fmt: skip
    return found


def finish(run):
    folder = RunFolder(run.folder)
    folder.begin(run.experiment.toml())
    folder.append(records(run))
    folder.write_summary({
        "name": run.experiment.name,
        "strategy": run.experiment.strategy.name,
        "seed": run.seed,
        "rounds": 4,
        "digest": run.digest,
        "headline": {"readout": "composite", "predict": "personal"},
        **summarise(Log(5, records(run)), 1),
        "privacy": "no privacy mechanism was used",
    })  # fmt: skip


def sweep(out, ratios, fails=(), **changes):
    table = {**BASE, **changes, "sweep": {"grid": {RATIO: list(ratios)}}}
    config = experiment(table)
    runs = plan(config, out)
    write_index(config, runs, out)
    for run in runs:
        if (run.label, run.seed) in fails:
            keep_reason(run.folder, f"no memory in {run.folder}")
        else:
            finish(run)
    return out


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return collect([sweep(tmp_path_factory.mktemp("whole"), [0.2, 0.5, 1.0])])


@pytest.fixture(scope="module")
def sheets(whole):
    return {sheet.name: sheet for sheet in sweep_tables.tables(whole)}


def column(sheet, key):
    return [heading.key for heading in sheet.columns].index(key)


def texts(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir() if not f.name.startswith("costs")}


def test_the_headline_has_a_block_for_each_ratio(whole, sheets):
    shown = sheets["headline"]
    assert len(shown.rows) == 9
    assert [shown.block_of(i) for i in (0, 3, 8)] == [("0.2",), ("0.5",), ("1",)]
    group = whole.group("alone", {RATIO: 0.5})
    row = next(r for r in shown.rows if r[0].value == 0.5 and r[1].text == "alone")
    assert row[column(shown, "user_accuracy")].estimate == measures.user_accuracy(group)
    against = row[column(shown, "vs_fedavg_ft_t")].estimate
    assert against == measures.difference_t(group, whole.group(EVIL, {RATIO: 0.5}))
    assert row[column(shown, "vs_local_only")].text == "–"
    assert against.high < 0


def test_bold_is_the_best_and_what_cannot_be_told_from_it(whole, sheets):
    shown = sheets["by_axis"]
    best = {r[0].text: [cell.best for cell in r[1:]] for r in shown.rows}
    assert best == {"fedavg": [False] * 3, "alone": [False] * 3, EVIL: [True] * 3}
    one = replace(whole, labels=("fedavg",), groups=[g for g in whole.groups if g.label[0] == "f"])
    assert not sweep_tables.leaders(one)


def test_the_table_along_an_axis_is_that_of_a_paper(whole, sheets):
    shown = sheets["by_axis"]
    assert [h.title for h in shown.columns] == ["label", "0.2", "0.5", "1"]
    found = measures.user_accuracy(whole.group("fedavg", {RATIO: 0.2}))
    half = 100 * (found.high - found.value)
    assert shown.rows[0][1].text == f"{100 * found.value:.1f} ± {half:.1f}"


def test_differences_are_against_baselines_and_the_largest_ratio(whole, sheets):
    shown = sheets["paired"]
    pairs = {(r[0].value, r[1].text, r[2].text): r for r in shown.rows}
    # Two others at each of three points, the baselines against each other, two ratios a label.
    assert len(pairs) == 3 * (2 + 1 + 1) + 2 * 3
    row = pairs[0.2, "fedavg", "participation ratio 1"]
    ours, largest = (whole.group("fedavg", {RATIO: r}) for r in (0.2, 1.0))
    assert row[3].estimate == measures.difference(ours, largest)
    assert row[4].estimate == measures.difference_t(ours, largest)
    assert -0.12 < row[3].estimate.value < -0.04
    assert any("too narrow" in note for note in shown.notes)


def test_the_target_is_stated_and_counted_by_judged_rounds(sheets, whole):
    shown = sheets["headline"]
    note = next(n for n in shown.notes if n.startswith("To "))
    assert "local-only" in note and "judged every 2" in note
    target = measures.default_target(whole)
    assert f"rounds to {target}" in [h.title for h in shown.columns]
    given = measures.Target(0.999, "given")
    none = sweep_tables.headline(whole, given, set())
    assert "rounds_to" not in [h.key for h in none.columns]
    assert none.rows[0][column(none, "reached")].text == "0 of 3"


def test_a_mean_over_some_seeds_never_stands_alone(whole):
    group = whole.group("fedavg", {RATIO: 1.0})
    finals = sorted(float(c.mean()[-1]) for c in group.curves)
    between = measures.Target((finals[0] + finals[1]) / 2, "given")
    shown = sweep_tables.headline(whole, between, set())
    row = next(r for r in shown.rows if r[0].value == 1.0 and r[1].text == "fedavg")
    assert row[column(shown, "rounds_to")].text.endswith("(2 of 3)")
    assert row[column(shown, "reached")].text == "2 of 3"


def test_two_sweeps_of_disjoint_ratios_are_one(whole, tmp_path):
    parts = [sweep(tmp_path / "a", [0.5]), sweep(tmp_path / "b", [0.2, 1.0])]
    merged = collect(parts)
    for found, folder in ((whole, "one"), (merged, "two")):
        sweep_tables.write(found, sweep_tables.tables(found), tmp_path / folder)
    one, two = texts(tmp_path / "one"), texts(tmp_path / "two")
    assert one.keys() == two.keys() and "results.json" in one
    assert one == two


def test_results_hold_no_times_dates_or_paths(whole, sheets, tmp_path):
    written = sweep_tables.write(whole, list(sheets.values()), tmp_path)
    assert tmp_path / "costs.csv" in written
    for name, content in texts(tmp_path).items():
        text = content.decode()
        assert str(whole.folders[0]) not in text, name
        assert not re.search(r"20\d\d-\d\d|s/round|seconds", text), name
    assert "seconds_per_round" in (tmp_path / "costs.json").read_text()


def test_csv_has_value_bounds_n_and_method(sheets):
    shown = sheets["headline"]
    rows = list(csv.DictReader(io.StringIO(sheet_files.csv_text(shown))))
    assert len(rows) == 9
    found = shown.rows[2][column(shown, "user_accuracy")].estimate
    assert float(rows[2]["user_accuracy"]) == found.value
    assert float(rows[2]["user_accuracy_low"]) == found.low
    assert (rows[2]["user_accuracy_n"], rows[2]["user_accuracy_method"]) == ("3", found.method)
    assert rows[2]["label"] == EVIL and float(rows[2][RATIO]) == 0.2


def test_json_has_no_nan_and_every_row(sheets, whole, tmp_path):
    sweep_tables.write(whole, list(sheets.values()), tmp_path)

    def refuse(constant):
        raise AssertionError(constant)

    found = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert found["axes"] == {RATIO: [0.2, 0.5, 1.0]}
    assert found["labels"] == list(STRENGTH)
    named = {sheet["name"]: sheet for sheet in found["sheets"]}
    assert "costs" not in named and len(named["headline"]["rows"]) == 9
    assert named["headline"]["rows"][2]["user_accuracy"]["best"] is True


def test_markdown_keeps_labels_in_their_cells(sheets):
    table = sheet_files.markdown(sheets["headline"]).split("\n\n")[1].split("\n")
    bars = {len(re.findall(r"(?<!\\)\|", line)) for line in table}
    assert bars == {len(sheets["headline"].columns) + 1}
    assert not any("<" in line or re.search(r"(?<!\\)_", line) for line in table)
    assert any("**" in line and "&lt;script&gt;" in line for line in table)


def test_newlines_stay_inside_a_cell():
    cells = (plain_cell("a\nb\r\n| c"), Cell("-1.0", -1.0))
    shown = Sheet("s", "t\nu", (Heading("l", "l"), Heading("n", "n", "number")), (cells,))
    assert sheet_files.markdown(shown).split("\n")[4] == r"| a b \| c | -1.0 |"
    rows = list(csv.reader(io.StringIO(sheet_files.csv_text(shown), newline="")))
    assert rows[1] == ["a\nb\r\n| c", "-1.0"]
    assert r"a b \textbar{} c & $-$1.0 \\" in latex.table(shown)


def test_latex_escapes_and_sets_rules(sheets):
    text = latex.table(sheets["headline"])
    body = text[text.index(r"\toprule") :]
    assert body.count(r"\midrule") == 3 and r"\bottomrule" in body
    label = next(line for line in body.split("\n") if "script" in line)
    assert r"a\textbar{}b \textless{}script\textgreater{}\_x\_" in label
    assert r"\& 5 \% \#1 \$\{y\}\textasciitilde{}\textasciicircum{}\textbackslash{}" in label
    assert r"\textbf{" in label
    columns = sum(c.paper for c in sheets["headline"].columns)
    rows = [line for line in body.split("\n") if line.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in rows} == {columns - 1}
    caption = text[text.index(r"\caption") : text.index(r"\label")]
    assert "Student's t over 3 seeds" in caption and not re.search(r"(?<!\\)%", caption)


def test_one_seed_is_over_clients_and_says_so(tmp_path):
    found = collect([sweep(tmp_path, [0.5, 1.0], seeds=[3])])
    made = {sheet.name: sheet for sheet in sweep_tables.tables(found)}
    keys = [h.key for h in made["headline"].columns]
    assert "vs_local_only" in keys and "vs_local_only_t" not in keys
    assert any("clients of one seed" in note for note in made["headline"].notes)
    assert any("not covered" in note for note in made["paired"].notes)
    assert "[" in made["by_axis"].rows[0][1].text


def test_runs_without_a_result_are_listed_without_paths(tmp_path):
    every = {("fedavg", s) for s in range(3)}
    found = collect([sweep(tmp_path, [0.5, 1.0], fails=every | {("alone", 1)})])
    made = {sheet.name: sheet for sheet in sweep_tables.tables(found)}
    assert len(made["missing"].rows) == 8
    reasons = {row[-1].text for row in made["missing"].rows}
    assert all("no memory in" in r and str(tmp_path) not in r for r in reasons)
    assert made["by_axis"].rows[0][1].text == "failed"
    assert any("8 runs have no result yet" in note for note in made["headline"].notes)
    sweep_tables.write(found, list(made.values()), tmp_path / "tables")
    assert (tmp_path / "tables" / "missing.csv").exists()
    sweep_tables.write(found, [made["headline"]], tmp_path / "tables")
    assert not (tmp_path / "tables" / "missing.csv").exists()


def test_what_a_comparison_lacks_is_said(tmp_path):
    config = {"compare": {}, "name": "bare"}
    found = collect([sweep(tmp_path, [0.5], **config)])
    made = {sheet.name: sheet for sheet in sweep_tables.tables(found)}
    assert any("lacks local-only and fedavg-ft" in note for note in made["headline"].notes)
    assert "paired" not in made


def test_a_sweep_that_has_only_begun_has_tables(tmp_path):
    assert sweep_tables.tables(Collection("none", (), {}, ("a",), [])) == []
    every = {(label, seed) for label in STRENGTH for seed in range(3)}
    made = sweep_tables.tables(collect([sweep(tmp_path, [0.5], fails=every)]))
    assert [sheet.name for sheet in made] == ["headline", "by_axis", "missing"]
    assert any("No run has finished" in note for note in made[0].notes)
    sweep_tables.show(made, Console(file=io.StringIO(), width=80))


def test_tuning_shows_trials_and_choices(whole):
    trials = [{"options": {"lr": 0.1}, "validation": 0.5, "digest": "x"},
              {"options": {"lr": 9.0}, "validation": None, "digest": "y"}]  # fmt: skip
    label = {"chosen": {"clients.training.lr": 0.1}, "validation": 0.5, "trials": trials}
    tuned = {"method": "tpe", "seed": 1000, "trials": 2, "space": {"lr": [0.1, 9.0]},
             "labels": {"fedavg": label}}  # fmt: skip
    shown = {s.name: s for s in sweep_tables.tables(replace(whole, tuning=tuned))}["tuning"]
    row = [cell.text for cell in shown.rows[0]]
    assert row == ["fedavg", "2", "1", "clients.training.lr=0.1", "50.0"]
    assert any("2 trials for every label" in n and "seed 1000" in n for n in shown.notes)


def test_privacy_says_once_what_all_claim(sheets):
    rows = [[cell.text for cell in row] for row in sheets["privacy"].rows]
    assert rows[0][0] == "all" and rows[0][-1] == "no privacy mechanism was used"
    assert len(rows) == 1


def protect(out, ratios, label):
    """Give a label's runs a ledger whose epsilon follows the ratio and the seed."""
    table = {**BASE, "sweep": {"grid": {RATIO: list(ratios)}}}
    claim = {"unit": "client", "trust": "central", "adjacency": "add-remove", "delta": 1e-5,
             "sampling": "Poisson sampling", "accountant": "rdp",
             "not_covered": ["metrics", "who takes part"]}  # fmt: skip
    for run in plan(experiment(table), out):
        if run.label == label:
            epsilon = 10 * run.point[RATIO] + run.seed / 10
            ledger = {"claim": claim, "clients": {}, "epsilon": epsilon,
                      "not_covered": claim["not_covered"]}  # fmt: skip
            RunFolder(run.folder).write_privacy(ledger)
    return out


def test_each_epsilon_stands_with_its_claim_and_what_it_leaves_open(tmp_path):
    found = collect([protect(sweep(tmp_path, [0.2, 1.0]), [0.2, 1.0], "fedavg")])
    made = {sheet.name: sheet for sheet in sweep_tables.tables(found)}
    rows = [[cell.text for cell in row] for row in made["privacy"].rows]
    assert [row[:3] for row in rows] == [
        ["fedavg", "participation ratio 0.2", "2.2"],
        ["fedavg", "participation ratio 1", "10.2"],
        [f"alone, {EVIL}", "", "none"],
    ]
    assert "delta = 1e-05" in rows[0][3] and "the largest over seeds" in rows[0][3]
    assert made["privacy"].notes == ("Not covered: metrics", "Not covered: who takes part")
    shown = made["headline"]
    epsilons = [row[column(shown, "epsilon")].text for row in shown.rows]
    assert epsilons == ["2.2", "none", "none", "10.2", "none", "none"]
    assert r"p{0.5\linewidth}" in latex.table(made["privacy"])


def test_what_does_not_fit_a_terminal_is_said(sheets):
    stream_ = io.StringIO()
    sweep_tables.show([sheets["headline"]], Console(file=stream_, width=100, color_system=None))
    text = stream_.getvalue()
    assert max(map(len, text.split("\n"))) <= 100
    assert "Not shown for want of width" in text and "headline.md" in text
    wide = io.StringIO()
    sweep_tables.show([sheets["headline"]], Console(file=wide, width=400, color_system=None))
    assert "Not shown" not in wide.getvalue() and EVIL in wide.getvalue()


def test_no_cell_shows_nan(sheets):
    for sheet in sheets.values():
        for row in sheet.rows:
            for cell in row:
                assert "nan" not in cell.text.split()
                assert cell.estimate is None or not math.isnan(cell.estimate.value)
