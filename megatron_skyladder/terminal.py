"""What commands print: tables, labelled paragraphs and progress, through rich.

On a terminal there are colours and a progress line; elsewhere plain lines that grep and a log file
take. NO_COLOR and FORCE_COLOR are rich's to honour. rich is loaded when something is printed.
"""

from __future__ import annotations

import os
import sys
import textwrap
import time
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
    rows: Sequence[Sequence[str | Share]],
    *,
    left: int | Collection[int] = 0,
    head: bool = True,
    marked: Collection[int] = (),
) -> str:
    """Return rows as columns.

    Args:
        rows: cells, as many in each: text, or a share of 1; the first row is the head.
        left: how many columns, or which, are aligned left; the others are aligned right.
        head: whether the first row is a head.
        marked: places of rows (the first has 0) that stand out where there are colours.
    """
    from rich.table import Table
    from rich.text import Text

    console = _console()
    lefts = range(left) if isinstance(left, int) else left
    shown = Table(box=None, show_header=head, header_style=HEAD, padding=(0, 2, 0, 0))
    for place in range(len(rows[0])):
        side: Any = "left" if place in lefts else "right"
        shown.add_column(Text(str(rows[0][place])) if head else "", justify=side, overflow="fold")
    for place, row in enumerate(rows):
        if place or not head:
            style = MARKED if place in marked else ""
            cells = (
                cell.render(console) if isinstance(cell, Share) else Text(cell) for cell in row
            )
            shown.add_row(*cells, style=style)
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


class Share(float):
    """A cell of a table that is a share of 1: a bar on a terminal, a percentage elsewhere."""

    WIDTH = 24  # columns of the bar

    def render(self, console: Any) -> Any:
        """Return what rich draws."""
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        if console.is_terminal:
            return ProgressBar(total=1.0, completed=float(self), width=self.WIDTH)
        return Text(f"{self:.1%}")


class Progress:
    """How far work is: a bar that changes on a terminal, a plain line now and then elsewhere.

    Nothing is drawn by a thread, so processes may be forked meanwhile.

    Args:
        name: of the work, in front of the bar.
        stream: where it goes; by default standard error.
        every: seconds between two plain lines; None: there are none.
        stays: whether the bar is left standing at the end.
    """

    _SECONDS = 0.1  # between two changes of the bar

    def __init__(
        self,
        name: str,
        stream: IO[str] | None = None,
        *,
        every: float | None = 30.0,
        stays: bool = True,
    ) -> None:
        self._name, self._stream = name, stream or sys.stderr
        self._every, self._stays = every, stays
        self.on_terminal = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._shown_at = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def show(self, share: float, text: str) -> None:
        """Say that this share, 0 to 1, is done; ``text`` is the whole of a plain line."""
        if self.on_terminal:
            self._draw(share, text)
        elif self._every is not None and time.monotonic() - self._shown_at >= self._every:
            self._shown_at = time.monotonic()
            self.line(text)

    def line(self, text: str) -> None:
        """Print a line; above the bar where there is one."""
        if self._bar is not None:
            from rich.text import Text

            self._bar.console.print(Text(text), soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)

    def end(self) -> None:
        """Leave the terminal to others."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _draw(self, share: float, text: str) -> None:
        if self._bar is None:
            from rich.progress import BarColumn, Progress, TextColumn

            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=Share.WIDTH),
                TextColumn("{task.fields[text]}", markup=False),
                console=_console(self._stream),
                auto_refresh=False,
                transient=not self._stays,
            )
            self._task = self._bar.add_task(self._name, total=1.0, text=text)
            self._bar.start()
        elif share < 1 and time.monotonic() - self._shown_at < self._SECONDS:
            return
        self._shown_at = time.monotonic()
        self._bar.update(self._task, completed=share, text=text, refresh=True)
