"""From folders on disk to the live page: the report's own pipeline, with runs that are under way.

Figures are drawn aside: nothing in the folders that are watched is written.
"""

from __future__ import annotations

import html
import re
import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fedkd.report.page.parts import Live, PageContent, Section, Status
from fedkd.report.watch.state import Rendered, fingerprint

POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">')
MINUTE = 60.0
BEGIN = "The page is being made; it comes by itself as soon as it is ready."
STALE = "The page could not be brought up to date and shows what was there before: "
NOTHING = "There is nothing to show yet: "


class Build:
    """Makes the live page of some folders.

    Args:
        folders: each of a sweep, a comparison or a run.
        aside: an empty folder for what is drawn; whoever gave it removes it.
        workspace: where presets are looked for.
    """

    def __init__(self, folders: Sequence[Path], aside: Path, workspace: Path | None) -> None:
        self.folders, self.aside, self.workspace = list(folders), aside, workspace
        self._last: PageContent | None = None

    def opening(self) -> Rendered:
        """Return the page until there is one."""
        return rendered(self._bare(BEGIN))

    def changed(self) -> str:
        """Return a text that is another one when the page has to be made anew."""
        status = self._last.status if self._last else None
        # A process that is killed changes no file: while runs are under way look every minute.
        minute = int(time.monotonic() // MINUTE) if status and status.running else 0
        return f"{fingerprint(self.folders)} {minute}"

    def __call__(self) -> Rendered:
        """Return the page of what is on disk now; if that cannot be read, the last with a note."""
        try:
            self._last = self._content()
            return rendered(self._last)
        except Exception as error:
            return rendered(self._troubled(" ".join(f"{error}".split()) or repr(error)))

    def _content(self) -> PageContent:
        from fedkd.report import measures, page, sweep_figures, sweep_tables
        from fedkd.report.collection import collect

        collection = collect(self.folders, workspace=self.workspace, partial=True)
        target = measures.default_target(collection)
        sheets = sweep_tables.tables(collection, target)
        drawn = sweep_figures.draw(collection, target, self.aside)
        again = shlex.join(["fedkd", "report", *map(str, self.folders)])
        try:
            return page.content(collection, sheets, drawn, [again], target, live=Live())
        finally:
            # What is shown is in the page by now; figures that are no more must not stay.
            shutil.rmtree(self.aside / sweep_figures.PLOTS, ignore_errors=True)

    def _troubled(self, reason: str) -> PageContent:
        if self._last is None or self._last.status is None:
            return self._bare(NOTHING + reason)
        status = self._last.status
        return replace(
            self._last, status=replace(status, under_way=(STALE + reason, *status.under_way))
        )

    def _bare(self, text: str) -> PageContent:
        names = ", ".join(map(str, self.folders))
        section = Section("setting", "Question and setting", (f"Runs in {names}.",))
        status = Status(0, 0, 0, 0, under_way=(text,))
        name = self.folders[0].resolve().name
        return PageContent(name=name, subtitle="", sections=(section,), status=status, live=Live())


def rendered(content: PageContent) -> Rendered:
    """Return a page as the server gives it, with the policy that it states itself."""
    from fedkd.report.page import render, render_main

    status, whole = content.status or Status(0, 0, 0, 0), render(content)
    states = ("finished", "running", "waiting", "failed")
    # The first one: it stands above everything that runs have names in.
    stated = POLICY.search(whole)
    return Rendered(
        html=whole,
        main=render_main(content),
        counts={state: getattr(status, state) for state in states},
        policy=html.unescape(stated.group(1)) if stated else "",
    )
