"""What is asked of every HTML page that the package writes."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

_NAMESPACES = ("http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink")


class Page(HTMLParser):
    """Of a file: its plots, headings and tables; fails where it needs anything from elsewhere.

    Attributes:
        plots: the number of <svg> that draw something.
        tables: of each its rows, of cells as text.
    """

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.plots = 0
        self.tables: list[list[list[str]]] = []
        self._open: list[str] = []
        self._drawn = False
        text = file.read_text("utf-8")
        self.feed(text)
        self.close()
        assert not self._open
        assert set(re.findall(r"[a-z]+://[^\s\"'<)]*", text)) <= set(_NAMESPACES)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe", "object")
        if tag == "svg":
            self._drawn = False
        self._drawn |= tag == "path"
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag != "meta":
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        self.plots += tag == "svg" and self._drawn

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


def assert_shown(file: Path, plots: int, words: list[str]) -> None:
    """In a headless browser 1,280 pixels wide, where one is: so many plots, these words, nothing wider."""
    browsers = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, browsers)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(browsers)} is here")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    flags += ["--enable-logging=stderr", f"--user-data-dir={file.parent / 'browser'}"]
    flags += ["--window-size=1280,900"]
    measured = file.with_suffix(".measured.html")  # the page tells how wide it is, in its title
    script = "<script>document.title = document.documentElement.scrollWidth</script></body>"
    measured.write_text(file.read_text("utf-8").replace("</body>", script), "utf-8")
    shown = subprocess.run(
        [browser, *flags, "--dump-dom", measured.as_uri()], capture_output=True, text=True, timeout=60
    )
    assert shown.returncode == 0
    assert "CONSOLE" not in shown.stderr, shown.stderr
    width = re.search("<title>([0-9]+)</title>", shown.stdout)
    assert width and int(width[1]) <= 1280, shown.stdout[:500]
    assert shown.stdout.count("<svg") == plots
    assert all(word in shown.stdout for word in words)
