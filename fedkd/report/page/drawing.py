"""SVG files of figures made fit to stand in one HTML document, many beside one another.

Ids are prefixed, so that clip paths of two figures never meet; what matplotlib says about the
whole document (its style sheet, metadata) is taken out; coordinates are rounded.
"""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

from fedkd.errors import DataError
from fedkd.report.page.parts import Figure

if TYPE_CHECKING:
    from fedkd.report.drawn import Drawn

REFERENCE = re.compile(r"url\(\s*['\"]?#([^)'\"]+)['\"]?\s*\)")
SERIES = re.compile(r"(?:^|-)series-(\d+)(?=-|$)")
LONG = re.compile(r"-?\d+\.\d{3,}")
DROPPED = {"metadata", "style", "script", "foreignObject"}
WIDE = 420.0
"""Points; figures that are wider than one column of a paper take a row of their own."""


def figure(drawn: Drawn, number: int) -> Figure:
    """Return a figure that can be embedded: its SVG, or its PNG where there is no SVG.

    Raises:
        DataError: the SVG is damaged.
    """
    name = f"fig{number}-{slug(drawn.name)}"
    if drawn.svg is None:
        data = base64.b64encode(Path(drawn.png).read_bytes()).decode("ascii")
        return Figure(name, drawn.title, drawn.caption, image=f"data:image/png;base64,{data}")
    try:
        root = ET.fromstring(Path(drawn.svg).read_text(encoding="utf-8"))
    except ET.ParseError as error:
        raise DataError(
            f"the figure {drawn.svg} is no SVG ({error}); make the report again"
        ) from None
    return Figure(
        name, drawn.title, drawn.caption, embedded(root, name, drawn.title), wide=wide(root)
    )


def wide(root: ET.Element) -> bool:
    """Return whether a drawing needs more than one column."""
    box = (root.get("viewBox") or "").replace(",", " ").split()
    return len(box) == 4 and float(box[2]) > WIDE


def embedded(root: ET.Element, name: str, title: str) -> str:
    """Return the markup of a drawing whose ids all begin with ``name``.

    Elements of a series, by the id ``series-K``, get ``data-series="K"``; a second element with
    the same id gets a number behind it, as ids are unique in a document.
    """
    _cleaned(root)
    seen: dict[str, int] = {}
    for element in root.iter():
        element.tag = _local(element.tag)
        given = {_local(key): value for key, value in element.attrib.items()}
        element.attrib.clear()
        for key, value in given.items():
            if not key.startswith("on"):
                element.set(key, _attribute(key, value, name))
        _identified(element, given.get("id", ""), name, seen)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title")
    root.set("preserveAspectRatio", "xMidYMid meet")
    heading = ET.Element("title", {"id": f"{name}-title"})
    heading.text = title
    root.insert(0, heading)
    root.tail = None
    return ET.tostring(root, encoding="unicode", short_empty_elements=True)


def _cleaned(root: ET.Element) -> None:
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in DROPPED or (parent is root and _local(child.tag) == "title"):
                parent.remove(child)


def _attribute(key: str, value: str, name: str) -> str:
    if key == "href" and value.startswith("#"):
        return f"#{name}-{value[1:]}"
    if key in ("d", "points", "transform", "x", "y", "x1", "x2", "y1", "y2", "cx", "cy"):
        value = LONG.sub(lambda found: f"{float(found.group()):.2f}", value)
    return REFERENCE.sub(lambda found: f"url(#{name}-{found.group(1)})", value)


def _identified(element: ET.Element, given: str, name: str, seen: dict[str, int]) -> None:
    if not given:
        return
    seen[given] = seen.get(given, 0) + 1
    again = f"-{seen[given]}" if seen[given] > 1 else ""
    element.set("id", f"{name}-{given}{again}")
    series = SERIES.search(given)
    if series:
        element.set("data-series", series.group(1))


def _local(name: str) -> str:
    return name.rsplit("}", 1)[-1]


def slug(text: str) -> str:
    """Return text as a part of an id.

    >>> slug("accuracy by <round>")
    'accuracy-by-round'
    """
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower() or "x"
