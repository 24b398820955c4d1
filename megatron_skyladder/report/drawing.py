"""What the report's pictures have in common: panels, colours, labels, smoothing.

One colour is one run in all of them; the colours (after Okabe and Ito) stay apart for colour-blind
readers. matplotlib is loaded when a figure is made, and not before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_skyladder.report.curves import Axis, Run

COLOURS = ("#555555", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SIGNIFICANT = 0.01  # the paper counts smaller differences in loss as noise
WIDTH, HEIGHT = 10.5, 4.2  # inches
EARLY = 0.05  # share of the run whose losses may lie above the frame
SMOOTHED = 40  # a smoothed curve has about this many independent points


def colour_of(index: int) -> str:
    """Return the colour of a run by its place."""
    return COLOURS[index % len(COLOURS)]


def make_panels(count: int, height: float = HEIGHT, rows: int = 1) -> tuple[Any, np.ndarray]:
    """Return a figure and its axes, [count] or [rows, count]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained", dpi=130)
    panels = figure.subplots(rows, count, squeeze=False)
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
    return figure, panels if rows > 1 else panels[0]


def label(axes: Any, title: str, x_label: str, y_label: str) -> None:
    """Say what a panel shows and in which units."""
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)


def along_run(axes: Any, axis: Axis, title: str, y_label: str = "") -> None:
    """Label a panel that goes along the run from its start."""
    label(axes, title, axis.label, y_label)
    axes.set_xlim(left=0)


def whole_numbers(axes: Any) -> None:
    """Write 25,000 rather than 2.5e4."""
    axes.yaxis.set_major_formatter("{x:,.0f}")


def noise_band(axes: Any) -> None:
    """Shade the differences of losses that mean nothing."""
    axes.axhspan(-SIGNIFICANT, SIGNIFICANT, color="#eeeeee", zorder=0)


def name_runs(figure: Any, runs: Sequence[Run]) -> None:
    """Write the runs' names on top, each in its colour."""
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=colour_of(i), linewidth=3) for i in range(len(runs))]
    figure.legend(
        lines,
        [run.name for run in runs],
        loc="outside upper left",
        ncols=min(4, len(runs)),
        frameon=False,
        labelcolor="linecolor",
    )


def frame(
    axes: Any, runs: Sequence[Run], columns: Sequence[np.ndarray], *, early: float = EARLY
) -> None:
    """Limit a panel to what holds everything but the first part of the runs.

    A run that diverged may leave the frame, rather than make the others a line at its bottom.

    Args:
        axes: the panel.
        runs: that it shows.
        columns: of the runs, what is drawn; NaN where there is nothing.
        early: share of a run that may lie outside.
    """
    late = [column[int(early * len(column)) :] for column in columns]
    late = [values[np.isfinite(values)] for values in late]
    calm = [
        values
        for run, values in zip(runs, late, strict=True)
        if values.size and not run.has_diverged
    ]
    shown = calm or [values for values in late if values.size]
    if shown:
        low, high = min(map(np.min, shown)), max(map(np.max, shown))
        margin = 0.05 * (high - low) or 0.05
        axes.set_ylim(float(low - margin), float(high + margin))


def smoothed(values: np.ndarray) -> np.ndarray:
    """Return running means over a window that grows to 1/40 of the run on either side."""
    reach = len(values) // (2 * SMOOTHED)
    known = np.where(np.isfinite(values), values, 0.0)
    sums = np.cumsum(np.insert(known, 0, 0.0))
    counts = np.cumsum(np.insert(np.isfinite(values), 0, 0))
    places = np.arange(len(values))
    near = np.minimum(np.minimum(places, len(values) - 1 - places), reach)
    first, end = places - near, places + near + 1
    with np.errstate(invalid="ignore"):
        return (sums[end] - sums[first]) / (counts[end] - counts[first])
