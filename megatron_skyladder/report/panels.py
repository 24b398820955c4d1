"""What a picture of the report shows, as plain values: panels of lines, one for each group.

Nothing here draws: `drawing` hands these values to bokeh.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_skyladder.report.curves import Axis, Run, axes_of
from megatron_skyladder.report.groups import Group

SIGNIFICANT = 0.01  # the paper counts smaller differences in loss as noise
SAME = 0.002  # runs whose tokens differ by less have come as far
EARLY = 0.05  # share of the run whose losses may lie above the frame
SMOOTHED = 40  # a smoothed curve has about this many independent points

Curve = tuple[np.ndarray, np.ndarray]  # x and y, [num_points] each; y is NaN where unknown
Range = tuple[float | None, float | None]


@dataclass(frozen=True)
class Line:
    """What a panel shows of one group.

    Args:
        group: its place, which is its colour.
        name: as in the legend.
        curve: of the run, or the mean of the seeds.
        band: the lowest and the highest of the seeds at each x of the curve.
        logged: the curve before smoothing.
    """

    group: int
    name: str
    curve: Curve
    band: Curve | None = None
    logged: Curve | None = None


@dataclass(frozen=True)
class Panel:
    """One coordinate system.

    Args:
        title: what it shows.
        x_label: with the unit.
        y_label: with the unit.
        lines: one for each group that has something to show.
        y_range: the frame; None is left to the data.
        keys: names of x = 0, 1, ..., where these are no numbers.
        marked: whether points are few and each was measured.
        steps: whether a value holds until the next one.
        noise: whether y is a difference of losses, whose noise is shaded.
        level: a height to mark.
    """

    title: str
    x_label: str
    y_label: str
    lines: list[Line]
    y_range: Range = (None, None)
    keys: tuple[str, ...] = ()
    marked: bool = False
    steps: bool = False
    noise: bool = False
    level: float | None = None


def runs_of(groups: Sequence[Group]) -> list[Run]:
    """Return the runs of all groups."""
    return [run for group in groups for run in group.runs]


def axes_by_kind(groups: Sequence[Group]) -> dict[str, dict[str, Axis]]:
    """Return kind of axis -> name of a run -> its axis, for the axes that all runs have."""
    runs = runs_of(groups)
    names = [run.name for run in runs]
    return {kind: dict(zip(names, axes, strict=True)) for kind, axes in axes_of(list(runs)).items()}


def lines_of(
    groups: Sequence[Group], curve_of: Callable[[Run], Curve], *, smooth: bool = False
) -> list[Line]:
    """Return a line for each group that has a finite value; seeds are one line with a band.

    Args:
        groups: in the order of their colours.
        curve_of: returns what is drawn of a run, x ascending.
        smooth: whether to draw running means, over what was logged.
    """
    lines = []
    for place, group in enumerate(groups):
        logged = [curve_of(run) for run in group.runs]
        curves = [(x, smoothed(y)) for x, y in logged] if smooth else logged
        if not any(np.isfinite(y).any() for _, y in curves):
            continue
        if group.is_band:
            mean, band = spread(curves)
            lines.append(Line(place, group.name, mean, band))
        else:
            lines.append(Line(place, group.name, curves[0], logged=logged[0] if smooth else None))
    return lines


def spread(curves: Sequence[Curve]) -> tuple[Curve, Curve]:
    """Return the mean of curves, and the lowest and highest value at each of its points.

    They are taken at the x of the first curve, as far as all curves that hold a value reach.
    """
    known = [(x[np.isfinite(y)], y[np.isfinite(y)]) for x, y in curves if np.isfinite(y).any()]
    first = max(x[0] for x, _ in known)
    last = min(x[-1] for x, _ in known)
    grid = known[0][0]
    grid = grid[(grid >= first) & (grid <= last)]
    values = np.array([np.interp(grid, x, y) for x, y in known])
    return (grid, values.mean(axis=0)), (values.min(axis=0), values.max(axis=0))


def framed(groups: Sequence[Group], curve_of: Callable[[Run], Curve], early: float) -> Range:
    """Return the frame that holds everything but the first part of the runs.

    A run that diverged may leave the frame, rather than make the others a line at its bottom.

    Args:
        groups: that the panel shows.
        curve_of: as in `lines_of`.
        early: share of a run that may lie outside.
    """
    runs = runs_of(groups)
    late = [curve_of(run)[1] for run in runs]
    late = [values[int(early * len(values)) :] for values in late]
    late = [values[np.isfinite(values)] for values in late]
    calm = [v for run, v in zip(runs, late, strict=True) if v.size and not run.has_diverged]
    shown = calm or [values for values in late if values.size]
    if not shown:
        return None, None
    low, high = min(map(np.min, shown)), max(map(np.max, shown))
    margin = 0.05 * (high - low) or 0.05
    return float(low - margin), float(high + margin)


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


def thinned(curve: Curve, points: int) -> Curve:
    """Return at most about this many points: of each stretch the lowest and the highest.

    A spike of one log line stays, which a running mean or every n-th point would lose.
    """
    x, y = curve
    known = np.isfinite(y)
    x, y = x[known], y[known]
    if len(x) <= points:
        return x, y
    kept = {0, len(x) - 1}
    for stretch in np.array_split(np.arange(len(x)), max(1, points // 2)):
        kept |= {int(stretch[y[stretch].argmin()]), int(stretch[y[stretch].argmax()])}
    places = np.array(sorted(kept))
    return x[places], y[places]
