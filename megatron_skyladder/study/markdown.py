"""The study's page as text: lines of 100 characters, tables, commands of a shell."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

NONE = "-"  # a cell that has no run yet


def wrapped(text: str, indent: str = "") -> str:
    """Return a paragraph in lines, with an end of line."""
    words = " ".join(text.split())
    return textwrap.fill(words, 100, subsequent_indent=indent, break_on_hyphens=False) + "\n"


def folded(words: Sequence[str], width: int = 96) -> str:
    """Return words of a command on lines of a shell."""
    lines, line = [], ""
    for word in words:
        if line and len(line) + len(word) > width:
            lines.append(line.rstrip() + " \\")
            line = "  "
        line += word + " "
    return "\n".join([*lines, line.rstrip()])


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return cells as a Markdown table; the first line is the head."""
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]) + "\n"


def listed(names: Sequence[str]) -> str:
    """Return names as code, with commas."""
    return ", ".join(f"`{name}`" for name in names)


def date(times: Sequence[str]) -> str:
    """Return the first time as a date and a time of day."""
    return times[0][:16].replace("T", " ") if times else NONE
