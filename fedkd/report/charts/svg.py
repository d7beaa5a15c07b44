"""SVG that belongs to its page: its colours are the page's variables, its font is the page's.

What matplotlib wrote is only shortened and renamed here, never drawn again; colours are replaced
where they are one of the sentinels of :mod:`fedkd.report.style`.
"""

from __future__ import annotations

import re

from fedkd.report.style import BLACK, COLOURS, GRID, INK

PATH = re.compile(r' d="([^"]*)"')
STEP = re.compile(r"([MLz])([^MLz]*)")
PLACE = re.compile(r'\b(x|y|x1|x2|y1|y2)="(-?[0-9.]+(?:e-?[0-9]+)?)"')
MOVED = re.compile(r'transform="(translate|rotate)\(([^")]*)\)((?:[^"]*))"')


def themed(text: str) -> str:
    """Return an SVG with the page's colours and font, and without what a browser does not need.

    >>> themed('<path d="M 1.0001 2 L 3 4.26 " style="stroke: #dddddd"/>')
    '<path d="M1 2l2 2.3" style="stroke: var(--grid, #dddddd)"/>'
    """
    text = re.sub(r"<\?xml.*?\?>|<!DOCTYPE.*?>|<!--.*?-->", "", text, flags=re.S)
    # matplotlib's style sheet would reach out of the figure into the page.
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text, flags=re.S)
    text = text.replace("<svg ", '<svg stroke-linejoin="round" ', 1)
    names, meant = _names(), set(re.findall(r"#([\w.-]+)", text))
    # Only tags are touched: what is written in a figure stays as it was given.
    text = re.sub(r"<[^>]*>", lambda m: _tag(m[0], names, meant), text)
    text = re.sub(r">\s+<", "><", text).strip()
    return re.sub(r"<g>(<use[^>]*/>)</g>", r"\1", text)


def _tag(tag: str, names: dict[str, str], meant: set[str]) -> str:
    # Ids are kept where something refers to them, or where they name a series.
    tag = re.sub(
        r' id="([^"]*)"',
        lambda m: m[0] if m[1] in meant or m[1].startswith(("series-", "curve-")) else "",
        tag,
    )
    tag = re.sub(r"font-family: [^;\"]*", "font-family: var(--font, sans-serif)", tag)
    tag = re.sub(r' transform="rotate\(-?0 [^)]*\)"', "", tag)
    tag = re.sub(r"font: ([^;\"]*?[\d.]+px) [^;\"]*", r"font: \1 var(--font, sans-serif)", tag)
    for colour, name in names.items():
        tag = tag.replace(colour, f"var(--{name}, {colour})")
    tag = PATH.sub(lambda m: f' d="{_path(m[1])}"', tag)
    tag = PLACE.sub(lambda m: f'{m[1]}="{_short(float(m[2]), 2)}"', tag)
    return MOVED.sub(lambda m: f'transform="{m[1]}({_numbers(m[2])}){m[3]}"', tag)


def _names() -> dict[str, str]:
    """Return the variable that stands for each sentinel colour, as matplotlib writes it."""
    palette = [BLACK if c == "#000000" else c for c in COLOURS]
    return {
        INK: "ink",
        GRID: "grid",
        **{c.lower(): f"c{i}" for i, c in enumerate(palette)},
    }


def _path(data: str) -> str:
    """Return a path of straight lines in relative steps of a tenth; others with two decimals."""
    if re.search(r"[^MLz0-9eE.\s-]", data):
        return _numbers(data)
    made, x, y, start = [], 0, 0, (0, 0)
    for command, rest in STEP.findall(data):
        if command == "z":
            made.append("z")
            x, y = start
            continue
        # Places are rounded, then subtracted: errors do not add up along a line.
        u, v = (round(10 * float(part)) for part in rest.split())
        if command == "M":
            made.append(f"M{_short(u / 10, 1)} {_short(v / 10, 1)}")
            start = u, v
        else:
            made.append(f"l{_short((u - x) / 10, 1)} {_short((v - y) / 10, 1)}")
        x, y = u, v
    return "".join(made)


def _numbers(text: str) -> str:
    return re.sub(r"-?\d+\.\d+(?:e-?\d+)?", lambda m: _short(float(m[0]), 2), text).strip()


def _short(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}".rstrip("0").rstrip(".") if digits else f"{value:.0f}"
    return "0" if text in ("-0", "") else text
