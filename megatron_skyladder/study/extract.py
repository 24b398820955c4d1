"""Plain text of HTML: what a reader sees of a page, without its menus."""

from __future__ import annotations

import re
from html.parser import HTMLParser

_LEFT_OUT = {"script", "style", "head", "nav", "header", "footer", "button", "svg", "template"}
_VOID = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}
_BLOCKS = {
    *("address", "article", "blockquote", "br", "dd", "div", "dl", "dt", "figure", "h1", "h2"),
    *("h3", "h4", "h5", "h6", "hr", "li", "main", "ol", "p", "pre", "section", "table", "tr", "ul"),
}
_CELLS = {"td", "th"}
_HTML = re.compile(r"\s*(?:<\?xml[^>]*>\s*)?<(?:!doctype\s+html|html)\b", re.IGNORECASE)


def plain_text(text: str) -> str:
    """Return a document as plain text: HTML without its tags, anything else as it is.

    Line ends are ``\\n``, lines have no blanks at their ends, and no more than one empty line
    stands between two others.
    """
    if _HTML.match(text):
        reader = _Reader()
        reader.feed(text)
        reader.close()
        text = "".join(reader.parts)
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").replace("\f", "").split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n") + "\n"


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._hidden: list[str] = []  # open elements, from the first that is left out
        self._preformatted = 0

    def handle_starttag(self, tag: str, _: object) -> None:
        if self._hidden or tag in _LEFT_OUT:
            if tag not in _VOID:
                self._hidden.append(tag)
            return
        self._preformatted += tag == "pre"
        if tag in _BLOCKS:
            self._end_line()
        elif tag in _CELLS and not self._at_line_start():
            self.parts.append("  ")

    def handle_startendtag(self, tag: str, attributes: object) -> None:
        if tag in _BLOCKS and not self._hidden:
            self._end_line()

    def handle_endtag(self, tag: str) -> None:
        if self._hidden:
            if tag in self._hidden:  # what was not closed inside it ends too
                while self._hidden.pop() != tag:
                    pass
            return
        self._preformatted -= tag == "pre" and self._preformatted > 0
        if tag in _BLOCKS:
            self._end_line()
            if tag in ("p", "pre", "table", "ul", "ol", "dl") or tag[0] == "h":
                self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if self._hidden:
            return
        if not self._preformatted:
            data = re.sub(r"\s+", " ", data)
            if self._at_line_start():
                data = data.lstrip()
        if data:
            self.parts.append(data)

    def _at_line_start(self) -> bool:
        return not self.parts or self.parts[-1].endswith("\n")

    def _end_line(self) -> None:
        if not self._at_line_start():
            self.parts.append("\n")
