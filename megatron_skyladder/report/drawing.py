"""Panels as bokeh figures, which embed themselves and their library in the page.

Loaded when a page is made, and not before.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np
from bokeh.embed import components
from bokeh.models import (
    BoxAnnotation,
    ColumnDataSource,
    CrosshairTool,
    DataRange1d,
    HoverTool,
    NumeralTickFormatter,
    Span,
)
from bokeh.palettes import Bright
from bokeh.plotting import figure
from bokeh.resources import Resources

from megatron_skyladder.report.panels import SIGNIFICANT, Curve, Line, Panel, thinned

COLOURS = Bright[7]  # stay apart for colour-blind readers; one colour is one group everywhere
POINTS = 600  # of a curve: more than a screen shows
NUMBERS = 45_000  # of the whole page: about 0.3 MB beside the library's 1.4
TOOLS = "pan,box_zoom,wheel_zoom,reset,save"


class Drawn(NamedTuple):
    """What goes into the page: the script with all data, and a place for each panel."""

    script: str
    places: list[list[str]]


def colour_of(group: int) -> str:
    """Return the colour of a group by its place."""
    return COLOURS[group % len(COLOURS)]


def library() -> str:
    """Return bokeh itself as script elements."""
    return Resources(mode="inline", components=["bokeh"]).render()


def draw(pictures: Sequence[Sequence[Panel]]) -> Drawn:
    """Return the panels of pictures; those of a picture with one x-axis are zoomed together."""
    curves = sum(_num_curves(line) for panels in pictures for p in panels for line in p.lines)
    points = max(40, min(POINTS, NUMBERS // max(1, 3 * curves)))  # x, y, and y to be read
    figures: list[figure] = []
    counts = []
    for panels in pictures:
        shared: dict[tuple[str, tuple[str, ...]], DataRange1d] = {}
        for panel in panels:
            padding = 0.2 if panel.keys else 0.03  # names are wider than numbers
            own = DataRange1d(range_padding=padding)
            along = shared.setdefault((panel.x_label, panel.keys), own)
            figures.append(_figure(panel, along, points))
        counts.append(len(panels))
    if not figures:
        return Drawn("", [[] for _ in pictures])
    script, places = components(tuple(figures), wrap_script=True)
    remaining = iter(places)
    return Drawn(script, [[next(remaining) for _ in range(count)] for count in counts])


def _num_curves(line: Line) -> int:
    return 1 + (line.logged is not None) + (line.band is not None)


def _figure(panel: Panel, along: DataRange1d, points: int) -> figure:
    low, high = panel.y_range
    plot = figure(
        height=300,
        sizing_mode="stretch_width",
        tools=TOOLS,
        toolbar_location="above",
        x_range=along,
        y_range=DataRange1d(**_given(start=low, end=high), range_padding=0.06),
        x_axis_label=panel.x_label,
        # the last label of the axis is centred on its tick
        min_border_right=48 if panel.keys else 24,
        min_border_left=8,
        outline_line_color=None,
        active_drag="box_zoom",
    )
    plot.toolbar.logo = None
    plot.xgrid.visible = False
    plot.xaxis.axis_label_text_font_style = "normal"
    for axis in plot.axis:
        axis.major_label_text_font_size = axis.axis_label_text_font_size = "13px"
    _draw_lines(plot, panel, points)
    if panel.lines:
        _make_readable(plot, panel, points)
    if panel.keys:
        plot.xaxis.ticker = list(range(len(panel.keys)))
        plot.xaxis.major_label_overrides = dict(enumerate(panel.keys))
        plot.xaxis.major_label_orientation = 0.6 if len(panel.keys) > 3 else 0.0
    else:
        plot.xaxis.formatter = NumeralTickFormatter(format="0,0.[000]")
    plot.yaxis.formatter = NumeralTickFormatter(format="0,0.[0000]")
    if panel.noise:
        plot.add_layout(
            BoxAnnotation(
                bottom=-SIGNIFICANT,
                top=SIGNIFICANT,
                fill_color="#888888",
                fill_alpha=0.15,
                line_color=None,
                level="underlay",
            )
        )
    if panel.level is not None:
        plot.add_layout(Span(location=panel.level, dimension="width", line_color="#999999"))
    plot.add_tools(CrosshairTool(dimensions="height", line_color="#bbbbbb"))
    return plot


def _draw_lines(plot: figure, panel: Panel, points: int) -> None:
    """Draw a panel's lines: one of bokeh's glyphs for all groups, as each is kilobytes of page."""
    bands = [(line, line.curve[0], line.band) for line in panel.lines if line.band is not None]
    if bands:
        some = [_some(len(x), points) for _, x, _ in bands]
        around = [np.concatenate([places, places[::-1]]) for places in some]
        plot.patches(
            [_plain(x[places]) for (_, x, _), places in zip(bands, around, strict=True)],
            [
                _plain(np.concatenate([low[places], high[places[::-1]]]))
                for (_, _, (low, high)), places in zip(bands, some, strict=True)
            ],
            fill_color=[colour_of(line.group) for line, _, _ in bands],
            fill_alpha=0.2,
            line_color=None,
        )
    logged = [line for line in panel.lines if line.logged is not None]
    if logged:
        _multi_line(plot, logged, [thinned(line.logged, points) for line in logged if line.logged],
                    alpha=0.35, width=0.7)  # fmt: skip
    curves = [thinned(line.curve, points) for line in panel.lines]
    if panel.steps:
        curves = [(np.repeat(x, 2)[1:], np.repeat(y, 2)[:-1]) for x, y in curves]
    if curves:
        _multi_line(plot, panel.lines, curves, alpha=1.0, width=2)
    if panel.marked and curves:
        counts = [len(x) for x, _ in curves]
        colours = [colour_of(line.group) for line in panel.lines]
        plot.scatter(
            _plain(np.concatenate([x for x, _ in curves])),
            _plain(np.concatenate([y for _, y in curves])),
            color=[c for c, count in zip(colours, counts, strict=True) for _ in range(count)],
            size=6,
        )


def _multi_line(
    plot: figure, lines: Sequence[Line], curves: Sequence[Curve], *, alpha: float, width: float
) -> None:
    plot.multi_line(
        [_plain(x) for x, _ in curves],
        [_plain(y) for _, y in curves],
        line_color=[colour_of(line.group) for line in lines],
        line_alpha=alpha,
        line_width=width,
    )


def _make_readable(plot: figure, panel: Panel, points: int) -> None:
    """Show the values of all groups at the pointer's place, wherever it is above or below them.

    bokeh makes a tooltip of its own for each curve, one on top of the other where curves are near.
    So one curve, not to be seen, carries the values of all: at the points of the longest.
    """
    curves = [_finite(line.curve) for line in panel.lines]
    grid = thinned(max(curves, key=lambda curve: float(curve[0][-1])), points)[0]
    values = [_at(grid, curve, panel.steps) for curve in curves]
    known = np.isfinite(values)
    middle = np.where(known, values, 0).sum(axis=0) / known.sum(axis=0)
    data = {f"y{place}": _plain(column) for place, column in enumerate(values)}
    data |= {"x": _plain(grid), "middle": _plain(middle)}
    if panel.keys:
        data["key"] = np.array([panel.keys[int(place)] for place in grid], dtype=object)
    carrier = plot.line("x", "middle", source=ColumnDataSource(data), alpha=0)
    said = [
        f'<div><i style="color:{colour_of(line.group)}">&#9632;</i> @y{place}{{0,0.[0000]}} '
        f"{_literal(line.name)}</div>"
        for place, line in enumerate(panel.lines)
    ]
    said.append(f"<div>{'@key' if panel.keys else '@x{0,0.[000]}'} {_literal(panel.x_label)}</div>")
    style = "font-size:13px; max-width:15rem; overflow-wrap:anywhere"
    plot.add_tools(
        HoverTool(
            renderers=[carrier],
            tooltips=f'<div style="{style}">{"".join(said)}</div>',
            mode="vline",
            line_policy="nearest",
            visible=False,
        )
    )


def _finite(curve: Curve) -> Curve:
    known = np.isfinite(curve[1])
    return curve[0][known], curve[1][known]


def _at(grid: np.ndarray, curve: Curve, steps: bool) -> np.ndarray:
    """Return a curve's values at other places, NaN beyond its ends."""
    x, y = curve
    values = np.interp(grid, x, y, left=np.nan, right=np.nan)
    if steps:
        held = y[np.maximum(np.searchsorted(x, grid, side="right") - 1, 0)]
        values = np.where(np.isnan(values), np.nan, held)
    return values


def _literal(text: str) -> str:
    """Return text for bokeh's templates: neither HTML nor the name of a column."""
    return escape(text).replace("@", "&#64;").replace("$", "&#36;")


def _given(**limits: float | None) -> dict[str, float]:
    return {name: limit for name, limit in limits.items() if limit is not None}


def _some(count: int, points: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(count, points)).astype(int))


def _plain(values: np.ndarray) -> np.ndarray:
    """Return values in the precision of a log, at half the size."""
    return values.astype(np.float32)
