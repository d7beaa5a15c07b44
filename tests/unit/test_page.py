"""The page as text: everything escaped, ids unique, JSON that cannot end its element, small."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from fedkd.errors import DataError
from fedkd.report.curves import Curves
from fedkd.report.drawn import Drawn
from fedkd.report.page import drawing, drill, parts, render, render_main, sections, setting, write
from fedkd.report.page.parts import Bullets, Code, Fact, Live, PageContent, Section, Status, table
from fedkd.report.sheets import Cell, Heading, Sheet
from fedkd.types import Estimate

EVIL = "</script><script>alert(1)</script>\"'&<img src=x onerror=alert(1)>"
DRAWING = """<?xml version="1.0"?>
<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "http://www.w3.org/Graphics/SVG/1.1/DTD/svg11.dtd">
<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"
 width="302pt" height="200pt" viewBox="0 0 302 200" onload="alert(1)">
<metadata><a xmlns="http://example.org/">made</a></metadata>
<style>* {color: red}</style><script>alert(2)</script>
<defs><clipPath id="p1"><rect x="1.23456" y="2" width="3" height="4"/></clipPath>
<path id="m1" d="M 0 0 L 1.23456 2.34567"/></defs>
<g id="series-0" clip-path="url(#p1)"><use xlink:href="#m1"/></g>
<g id="series-0" style="clip-path: url('#p1'); stroke: var(--c0)"/><g id="series-12-legend"/>
<text>a &lt;b&gt; c</text></svg>"""


class Reader(HTMLParser):
    """Elements with their attributes, as a browser would take them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def made(live: Live | None = None, island: str = "") -> PageContent:
    rows = table("t", EVIL, ("name", EVIL), [(EVIL, "1.5 [1, 2]")], (EVIL,))
    figure = parts.Figure("f", EVIL, EVIL, image="data:image/png;base64,AA==")
    first = Section(
        "setting", EVIL, (EVIL,), (Fact(EVIL, (EVIL,)),), (Code("c", "", EVIL),), (rows,),
        (figure,), (Bullets(EVIL, (EVIL,)),), (Code("d", EVIL, EVIL),), drill=bool(island),
    )  # fmt: skip
    status = Status(1, 2, 3, 4, (EVIL,), (EVIL,)) if live else None
    return PageContent(
        name=EVIL, subtitle=EVIL, sections=(first,), island=island, live=live, status=status
    )


@pytest.mark.parametrize("live", [None, Live(token=EVIL)])
def test_nothing_that_a_run_is_called_becomes_markup(live):
    html = render(made(live, setting.safe_json({"labels": [EVIL]})))
    assert "<script>alert" not in html and "<img src=x" not in html
    tags = Reader(html).tags
    assert [t for t, a in tags if t == "script"] == ["script"] * (3 if live else 2)
    assert not [a for _, a in tags if any(key.startswith("on") for key in a)]
    island = re.search(r'id="drill-data">(.*?)</script>', html)
    assert island and json.loads(island.group(1)) == {"labels": [EVIL]}


def test_the_page_asks_nobody_and_a_live_one_its_own_server_only():
    alone, live = render(made()), render(made(Live()))
    for html in map(unescape, (alone, live)):
        assert not re.search(r"""(src|href|url\()\s*=?\s*["']?(https?:)?//""", html)
        assert "unsafe-eval" not in html and "script-src 'sha256-" in html
        assert "default-src 'none'" in html
    assert "connect-src" not in alone and "fetch(" not in alone
    assert "connect-src 'self'" in unescape(live)


def test_the_policy_names_the_hash_of_the_very_script():
    html = render(made())
    script = html[html.rindex("<script>") + 8 : html.rindex("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in unescape(html)


def test_main_alone_is_the_main_of_the_page():
    content = made(Live())
    main = render_main(content)
    assert main.startswith("<main>") and main.rstrip().endswith("</main>")
    assert main in render(content)


def test_a_page_is_written_whole(tmp_path):
    file = write(render(made()), tmp_path / "a" / "report.html")
    assert file.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [f.name for f in file.parent.iterdir()] == ["report.html"]


def test_ids_of_drawings_are_their_own():
    markup = drawing.embedded(ET.fromstring(DRAWING), "fig0-a", "A <title>")
    root = ET.fromstring(markup)
    ids = [e.get("id") for e in root.iter() if e.get("id")]
    assert len(set(ids)) == len(ids) and all(i.startswith("fig0-a-") for i in ids)
    pointed = re.findall(r"url\(#([^)]*)\)", markup) + re.findall(r'href="#([^"]*)"', markup)
    assert len(pointed) == 3 and set(pointed) <= set(ids)
    assert [e.get("data-series") for e in root.iter() if e.get("data-series")] == ["0", "0", "12"]
    assert root.get("viewBox") == "0 0 302 200" and root.get("width") is None
    assert root.get("role") == "img" and root.findtext("title") == "A <title>"
    for gone in ("metadata", "style>", "script", "onload", "http", "1.23456"):
        assert gone not in markup
    assert "a &lt;b&gt; c" in markup and "1.23" in markup


def test_a_figure_without_svg_is_its_png_and_a_damaged_one_is_told(tmp_path):
    png, svg = tmp_path / "a.png", tmp_path / "a.svg"
    png.write_bytes(b"png")
    svg.write_text("<svg", encoding="utf-8")
    shown = drawing.figure(Drawn("a b", "t", "c", None, png, png, "data"), 3)
    assert (shown.id, shown.image) == ("fig3-a-b", "data:image/png;base64,cG5n")
    with pytest.raises(DataError, match="no SVG"):
        drawing.figure(Drawn("a", "t", "c", svg, png, png, "data"), 0)
    svg.write_text(DRAWING, encoding="utf-8")
    assert not drawing.figure(Drawn("a", "t", "c", svg, png, png, "data"), 0).wide


def test_sheets_keep_their_best_and_sort_by_their_numbers():
    sheet = Sheet(
        "paired_by_axis", "T", (Heading("r", "ratio", "number"), Heading("label", "label"),
        Heading("a", "accuracy", "estimate")),
        ((Cell("0.1", 0.1), Cell("x"), Cell("1.0", None, Estimate(0.01, 0, 1, 3, "t"), True)),
         (Cell("0.2", 0.2), Cell("y"), Cell("–"))),
        block=1,
    )  # fmt: skip
    shown = sections._table(sheet)
    assert shown.columns == ("label", "ratio", "accuracy") and shown.left == (0,)
    assert shown.breaks == (1,)
    assert shown.rows[0][2] == parts.Cell("1.0", True, "0.01", "t, n = 3")
    assert shown.rows[1][2].key == "" and shown.rows[1][1].key == "0.2"
    assert sections._place(sheet) == "differences"


def test_accuracies_and_masks_come_back_from_their_text():
    table_ = np.array([[0.0, 1.0, np.nan], [0.1234, 0.9996, 0.5]])
    text = drill.encoded(table_)
    codes = [
        64 * drill.SIGNS.index(a) + drill.SIGNS.index(b)
        for a, b in zip(*[iter(text)] * 2, strict=True)
    ]
    assert codes == [0, 1000, drill.NOTHING, 123, 1000, 500]
    mask = np.random.default_rng(0).random((5, 7)) < 0.5
    back = np.unpackbits(np.frombuffer(base64.b64decode(drill.bits(mask)), np.uint8))[:35]
    assert np.array_equal(back.reshape(5, 7).astype(bool), mask)


def run_of(clients: int, rounds: int) -> Curves:
    shape, every = (rounds, clients), np.arange(1, rounds + 1)
    half = np.full(shape, 0.5)
    return Curves(
        clients=clients, rounds=every, accuracy=half, bits=None,
        played=every, bytes_up=np.ones(rounds), bytes_down=np.ones(rounds),
        seconds=np.ones(rounds), seconds_judging=np.ones(rounds), took_part=half > 0,
        lost=half > 1, clock=np.ones(rounds), examples=np.ones(clients),
    )  # fmt: skip


class Fake:
    """A run as far as the drill-down looks at it."""

    def __init__(self, seed: int) -> None:
        self.seed, self.data = seed, "d"
        self.experiment = type("E", (), {"table": staticmethod(dict)})()


def collection_of(seeds: int, clients: int, rounds: int):
    from fedkd.report.collection import Collection, Group

    groups = []
    for label in ("a", EVIL):
        group = Group(label, {}, [Fake(s) for s in range(seeds)])
        group.__dict__["curves"] = [run_of(clients, rounds) for _ in range(seeds)]
        groups.append(group)
    return Collection("n", (Path(),), {}, ("a", EVIL), groups)


def test_a_hundred_and_fifty_runs_fit_into_the_page_with_room_for_figures():
    text, notes = drill.island(collection_of(75, 50, 20), {})
    assert len(text) < 600_000 and notes == ()
    found = json.loads(text)
    assert len(found["runs"]) == 150 and "<" not in text
    assert found["rounds"] == [list(range(1, 21))] and found["labels"] == ["a", EVIL]


def test_what_would_be_too_much_is_thinned_and_said():
    text, notes = drill.island(collection_of(3, 20, 30), {}, budget=4000)
    assert len(json.loads(text)["runs"]) == 2 and "first seed" in notes[0]
    text, notes = drill.island(collection_of(3, 20, 30), {}, budget=1000)
    found = json.loads(text)
    assert found["rounds"][0][-1] == 30 and len(found["rounds"][0]) < 30 and len(notes) == 2
    assert len(found["runs"][0]["a"]) == 2 * 20 * len(found["rounds"][0])


def test_without_a_result_there_is_no_drill_down():
    assert drill.island(collection_of(0, 1, 1), {}) == ("", ())


def test_static_files_lie_inside_the_package():
    folder = Path(drawing.__file__).parent
    kinds = {f.suffix for f in folder.iterdir() if f.is_file()}
    assert {".html", ".css", ".js", ".py"} <= kinds
    for script in folder.glob("*.js"):
        text = script.read_text(encoding="utf-8")
        assert not re.search(
            r"\beval\(|innerHTML|insertAdjacentHTML|document\.write|Function\(", text
        )
