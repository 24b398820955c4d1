"""What commands print: tables, labelled paragraphs and progress, through rich.

On a terminal there are colours and a progress line; elsewhere plain lines that grep and a log file
take. NO_COLOR and FORCE_COLOR are rich's to honour. rich is loaded when something is printed.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Collection, Sequence
from typing import IO, Any

WIDTH = 88  # columns of a paragraph; a table takes what it needs
LABEL = 13  # columns of a paragraph's label
UNLIMITED = 10_000  # columns, where there is no terminal: a table's line stays one line

# Styles, by what they are for.
HEAD, NAME, MARKED, REMARK, GOOD = "bold", "bold cyan", "bold yellow", "dim", "bold green"


def _console(stream: IO[str] | None = None) -> Any:
    from rich.console import Console

    console = Console(file=stream or sys.stdout, markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = UNLIMITED
    return console


def _render(what: Any, *, fold: bool = False) -> str:
    """Return what is printed; its lines are as they are, or folded to the terminal's width."""
    console = _console()
    with console.capture() as captured:
        console.print(what, soft_wrap=not fold)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def table(
    rows: Sequence[Sequence[str]],
    *,
    left: int = 0,
    head: bool = True,
    marked: Collection[int] = (),
) -> str:
    """Return rows as columns.

    Args:
        rows: cells, as many in each; the first row is the head.
        left: how many columns are aligned left; the others are aligned right.
        head: whether the first row is a head.
        marked: places of rows (the first has 0) that stand out where there are colours.
    """
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, show_header=head, header_style=HEAD, padding=(0, 2, 0, 0))
    for place in range(len(rows[0])):
        side: Any = "left" if place < left else "right"
        shown.add_column(Text(rows[0][place]) if head else "", justify=side)
    for place, row in enumerate(rows):
        if place or not head:
            style = MARKED if place in marked else ""
            shown.add_row(*(Text(cell) for cell in row), style=style)
    return _render(shown, fold=True)


def paragraph(label: str, text: str, width: int = LABEL) -> str:
    """Return a labelled paragraph of at most WIDTH columns.

    Args:
        label: in front of it, such as ``Note``; lines below are indented as far.
        text: of one paragraph.
        width: columns of the label.
    """
    from rich.text import Text

    filled = textwrap.fill(
        text,
        WIDTH,
        initial_indent=f"{label:<{width}}",
        subsequent_indent=" " * width,
        break_long_words=False,
        break_on_hyphens=False,
    )
    shown = Text(filled)
    shown.stylize(NAME, 0, len(label))
    return _render(shown)


def remark(text: str) -> str:
    """Return a paragraph that explains what is above it."""
    return styled(textwrap.fill(text, WIDTH), REMARK)


def led(line: str, style: str) -> str:
    """Return a line whose first word is in a style."""
    from rich.text import Text

    shown = Text(line)
    shown.stylize(style, 0, len(line.split(maxsplit=1)[0]))
    return _render(shown)


def styled(text: str, style: str) -> str:
    """Return text in a style of rich's, such as ``bold`` or ``green``."""
    from rich.text import Text

    return _render(Text(text, style=style))
