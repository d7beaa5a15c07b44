"""From parts to HTML: everything is escaped, and a policy in the page forbids every request.

Scripts run only if their hash is the one named in the policy, so nothing that a run or a label is
called can become one.
"""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from fedkd.engine.folder import write_text
from fedkd.report.page.parts import PageContent
from fedkd.report.page.setting import safe_json

if TYPE_CHECKING:
    from jinja2 import Environment


def render(content: PageContent) -> str:
    """Return the whole page as HTML."""
    from markupsafe import Markup

    style = _asset("style.css")
    scripts = [_asset("page.js"), _asset("clients.js")]
    if content.live:
        scripts.append(_asset("live.js"))
    scripts.append(_asset("start.js"))
    script = "\n" + "\n".join(scripts)
    live = content.live
    return (
        _environment()
        .get_template("template.html")
        .render(
            page=content,
            policy=policy(script, live=live is not None),
            style=Markup(style),
            script=Markup(script),
            live=Markup(safe_json(live.__dict__)) if live else "",
            **_safe(content),
        )
    )


def render_main(content: PageContent) -> str:
    """Return the element ``main`` alone, which a live page swaps for its own."""
    return _environment().get_template("main.html").render(page=content, **_safe(content))


def write(html: str, file: Path) -> Path:
    """Write a page; a reader sees the old one or the new one, never half of one.

    Raises:
        RunError: the disk is full or not writable.
    """
    write_text(file, html)
    return file


def policy(script: str, live: bool) -> str:
    """Return the Content-Security-Policy: no request but, if live, to the page's own server."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    rules = [
        "default-src 'none'",
        f"script-src 'sha256-{digest}'",
        # Figures carry their colours in style attributes, for which there are no hashes.
        "style-src 'unsafe-inline'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    return "; ".join([*rules, "connect-src 'self'"] if live else rules)


def _safe(content: PageContent) -> dict[str, object]:
    """Return what is markup already: figures (made by us from XML) and JSON without ``<``."""
    from markupsafe import Markup

    drawings = {f.id: Markup(f.markup) for s in content.sections for f in s.figures}
    return {"drawings": drawings, "island": Markup(content.island)}


def _environment() -> Environment:
    from jinja2 import DictLoader, Environment, StrictUndefined

    names = ("template.html", "main.html")
    return Environment(
        loader=DictLoader({name: _asset(name) for name in names}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _asset(name: str) -> str:
    return resources.files("fedkd.report.page").joinpath(name).read_text(encoding="utf-8")
