"""The report as one HTML file that opens from disk, asks the network for nothing, and is complete.

>>> from fedkd.report import page
>>> page.write(page.render(content), Path("report.html"))  # doctest: +SKIP
"""

from fedkd.report.page.parts import Live, PageContent
from fedkd.report.page.render import render, render_main, write
from fedkd.report.page.sections import content

__all__ = ["Live", "PageContent", "content", "render", "render_main", "write"]
