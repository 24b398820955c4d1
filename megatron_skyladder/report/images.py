"""Pictures as files, for slides and papers: matplotlib, loaded when one is drawn and not before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_skyladder import files

PALETTE = "petroff10"  # matplotlib's own (3.10 on), made for colour-blind readers too


def make_panels(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, np.ndarray]:
    """Return a figure and its axes, [rows, columns].

    Args:
        rows: of panels.
        columns: of panels.
        size: width and height of the figure in inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", dpi=150)
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
    return figure, panels


def colour_of(index: int) -> str:
    """Return the colour of what is drawn by its place."""
    from matplotlib import color_sequences
    from matplotlib.colors import to_hex

    colours = color_sequences[PALETTE]
    return to_hex(colours[index % len(colours)])


def label(axes: Any, title: str, x_label: str, y_label: str) -> None:
    """Say what a panel shows and in which units."""
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)


def save(figure: Any, path: str | Path) -> None:
    """Write a figure in the format of the file's ending."""
    with files.whole(path) as partial:
        figure.savefig(partial, format=Path(path).suffix[1:].lower())
