"""The report's pictures. Each is a function of the runs that returns a figure, or None.

One colour is one run in all of them; the colours (after Okabe and Ito) stay apart for colour-blind
readers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_skyladder.report.curves import Axis, Run, axes_of
from megatron_skyladder.report.stability import loss_ratios
from megatron_skyladder.runlog import Validation

COLOURS = ("#555555", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SIGNIFICANT = 0.01  # the paper counts smaller differences in loss as noise
WIDTH, HEIGHT = 10.5, 4.2  # inches
_EARLY = 0.05  # share of the run whose losses may lie above the frame
_SMOOTHED = 40  # a smoothed curve has about this many independent points


@dataclass(frozen=True)
class Picture:
    """One picture of the report.

    Args:
        name: of the file, without its ending.
        title: its heading.
        caption: what is to be seen, for somebody who was not there.
        draw: returns the figure, or None where the logs do not have what it shows.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[list[Run]], Any]


def colour_of(index: int) -> str:
    """Return the colour of a run by its place."""
    return COLOURS[index % len(COLOURS)]


def _panels(count: int, height: float = HEIGHT, rows: int = 1) -> tuple[Any, np.ndarray]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained", dpi=130)
    panels = figure.subplots(rows, count, squeeze=False)
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
    return figure, panels if rows > 1 else panels[0]


def _label(axes: Any, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)


def _along_run(axes: Any, axis: Axis, title: str, y_label: str = "") -> None:
    _label(axes, title, axis.label, y_label)
    axes.set_xlim(left=0)


def _whole_numbers(axes: Any) -> None:
    axes.yaxis.set_major_formatter("{x:,.0f}")


def _noise_band(axes: Any) -> None:
    axes.axhspan(-SIGNIFICANT, SIGNIFICANT, color="#eeeeee", zorder=0)


def _name_runs(figure: Any, runs: Sequence[Run]) -> None:
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


def windows(runs: list[Run]) -> Any:
    """Draw the window, and the attention work it leaves, against tokens."""
    if all(np.isnan(run.column("skyladder/window")).all() for run in runs):
        return None
    figure, (window, work) = _panels(2)
    for index, (run, axis) in enumerate(zip(runs, axes_of(runs)["tokens"], strict=True)):
        style = {"color": colour_of(index), "linewidth": 2, "drawstyle": "steps-post"}
        window.plot(axis.values, run.column("skyladder/window"), **style)
        work.plot(axis.values, 100 * run.column("skyladder/attention_fraction"), **style)
    _along_run(window, axis, "Attention window", "tokens")
    _along_run(work, axis, "Attention work", "% of full causal attention")
    _whole_numbers(window)
    for axes in (window, work):
        axes.set_ylim(bottom=0)
    _name_runs(figure, runs)
    return figure


def training_loss(runs: list[Run]) -> Any:
    """Draw the training loss against tokens, time and FLOPs."""
    if all(np.isnan(run.losses).all() for run in runs):
        return None
    axes_by_kind = axes_of(runs)
    figure, panels = _panels(len(axes_by_kind))
    for axes, kind in zip(panels, axes_by_kind.values(), strict=True):
        for index, (run, axis) in enumerate(zip(runs, kind, strict=True)):
            colour = colour_of(index)
            axes.plot(axis.values, run.losses, color=colour, linewidth=0.6, alpha=0.3)
            axes.plot(axis.values, smoothed(run.losses), color=colour, linewidth=2)
        _along_run(axes, kind[0], f"Training loss against {kind[0].name}")
        axes.set_ylim(*_frame([run.losses for run in runs]))
    panels[0].set_ylabel("loss (nats per token)")
    _name_runs(figure, runs)
    return figure


def _frame(columns: Sequence[np.ndarray]) -> tuple[float, float]:
    """Return limits that hold everything but the first part of the run."""
    late = [column[int(_EARLY * len(column)) :] for column in columns]
    low = min(float(np.nanmin(values)) for values in late)
    high = max(float(np.nanmax(values)) for values in late)
    margin = 0.05 * (high - low) or 0.05
    return low - margin, high + margin


def smoothed(values: np.ndarray) -> np.ndarray:
    """Return running means over a window that grows to 1/40 of the run on either side."""
    reach = len(values) // (2 * _SMOOTHED)
    sums = np.cumsum(np.insert(np.nan_to_num(values), 0, 0.0))
    counts = np.cumsum(np.insert(np.isfinite(values), 0, 0))
    places = np.arange(len(values))
    near = np.minimum(np.minimum(places, len(values) - 1 - places), reach)
    first, end = places - near, places + near + 1
    with np.errstate(invalid="ignore"):
        return (sums[end] - sums[first]) / (counts[end] - counts[first])


def validation_loss(runs: list[Run]) -> Any:
    """Draw the validation loss (whole rows in sight) against tokens, time and FLOPs."""
    if not any(run.validations() for run in runs):
        return None
    axes_by_kind = axes_of(runs)
    figure, panels = _panels(len(axes_by_kind))
    for axes, kind in zip(panels, axes_by_kind.values(), strict=True):
        for index, (run, axis) in enumerate(zip(runs, kind, strict=True)):
            records = run.validations()
            losses = [record.loss for record in records]
            axes.plot(
                run.at(axis.values, records),
                losses,
                color=colour_of(index),
                linewidth=1.8,
                marker="o",
                markersize=4,
            )
        _along_run(axes, kind[0], f"Validation loss against {kind[0].name}")
    panels[0].set_ylabel("loss (nats per token)")
    _name_runs(figure, runs)
    return figure


def loss_by_length(runs: list[Run]) -> Any:
    """Draw the last validation's losses by context length and by position."""
    finals = [_last_by_length(run) for run in runs]
    if all(final is None for final in finals):
        return None
    compared = len(runs) > 1 and finals[0] is not None
    figure, panels = _panels(
        2, height=HEIGHT * (1.75 if compared else 1), rows=2 if compared else 1
    )
    grid = panels if compared else panels[None, :]
    for column, kind in enumerate(("by_length", "by_positions")):
        values = [getattr(final, kind) if final else {} for final in finals]
        keys = sorted({key for found in values for key in found})
        for index, found in enumerate(values):
            style = {"color": colour_of(index), "linewidth": 1.8, "marker": "o", "markersize": 5}
            places = [place for place, key in enumerate(keys) if key in found]
            grid[0, column].plot(places, [found[keys[place]] for place in places], **style)
            if compared:
                common = [place for place in places if keys[place] in values[0]]
                differences = [found[keys[place]] - values[0][keys[place]] for place in common]
                grid[1, column].plot(common, differences, **style)
        for axes in grid[:, column]:
            axes.set_xticks(range(len(keys)), [_key_text(key) for key in keys])
            axes.margins(x=0.08)
    _title_by_length(grid, runs[0].name if compared else "")
    _name_runs(figure, runs)
    return figure


def _title_by_length(grid: np.ndarray, baseline: str) -> None:
    by_length, by_positions = "context length (tokens)", "position in the row (tokens)"
    _label(grid[0, 0], "Final loss by context length", by_length, "loss (nats per token)")
    _label(grid[0, 1], "Final loss by position", by_positions, "")
    if baseline:
        _label(grid[1, 0], f"Difference to {baseline}", by_length, "lower is better")
        _label(grid[1, 1], f"Difference to {baseline}", by_positions, "")
        for axes in grid[1]:
            _noise_band(axes)


def _key_text(key: Any) -> str:
    return f"{key[0]:,} to {key[1]:,}" if isinstance(key, tuple) else f"{key:,}"


def _last_by_length(run: Run) -> Any:
    records = [record for record in run.validations() if record.by_length]
    return records[-1] if records else None


def loss_by_length_over_training(runs: list[Run]) -> Any:
    """Draw the loss at each length against tokens; of several runs, what they differ by."""
    lengths = sorted({length for run in runs for length in _length_losses(run)})
    baseline = _length_losses(runs[0])
    if not lengths or max(len(found) for found in baseline.values() or [()]) < 2:
        return None
    compared = len(runs) > 1
    figure, panels = _panels(len(lengths))
    for axes, length in zip(panels, lengths, strict=True):
        for index, (run, axis) in enumerate(zip(runs, axes_of(runs)["tokens"], strict=True)):
            found = _length_losses(run).get(length, [])
            values = np.array([record.by_length[length] for record in found])
            if compared:
                reference = baseline[length]
                known = [record.by_length[length] for record in reference]
                at_tokens = runs[0].at(runs[0].tokens, reference)
                values = values - np.interp(run.at(run.tokens, found), at_tokens, known)
            style = {"linewidth": 1.8, "marker": "o", "markersize": 3.5}
            axes.plot(run.at(axis.values, found), values, color=colour_of(index), **style)
        _along_run(axes, axis, f"{length:,} tokens in sight")
        if compared:
            _noise_band(axes)
    for other in panels[1:]:
        other.sharey(panels[0])
        other.tick_params(labelleft=False)
    panels[0].set_ylabel(f"loss minus that of {runs[0].name}" if compared else "validation loss")
    _name_runs(figure, runs)
    return figure


def _length_losses(run: Run) -> dict[int, list[Validation]]:
    """Return the validation records that have a loss at each length."""
    by_length: dict[int, list[Validation]] = {}
    for record in run.validations():
        for length in record.by_length:
            by_length.setdefault(length, []).append(record)
    return by_length


def throughput(runs: list[Run]) -> Any:
    """Draw tokens and FLOPs per second and GPU against tokens."""
    rates = [_tokens_per_second(run) for run in runs]
    has_flops = all(run.flops is not None for run in runs)
    figure, panels = _panels(2 if has_flops else 1)
    for index, (run, axis) in enumerate(zip(runs, axes_of(runs)["tokens"], strict=True)):
        colour = colour_of(index)
        panels[0].plot(axis.values, rates[index], color=colour, linewidth=0.6, alpha=0.3)
        panels[0].plot(axis.values, smoothed(rates[index]), color=colour, linewidth=2)
        if has_flops:
            tflops = run.column(lambda record: record.tflops_per_gpu)
            panels[1].plot(axis.values, tflops, color=colour, linewidth=0.6, alpha=0.3)
            panels[1].plot(axis.values, smoothed(tflops), color=colour, linewidth=2)
    per_gpu = " and GPU" if all(run.log.num_gpus for run in runs) else ""
    _along_run(panels[0], axis, "Throughput", f"tokens per second{per_gpu}")
    _whole_numbers(panels[0])
    if has_flops:
        _along_run(panels[1], axis, "Rate of the hardware", "TFLOP/s per GPU")
    for axes in panels:
        axes.set_ylim(bottom=0)
    _name_runs(figure, runs)
    return figure


def _tokens_per_second(run: Run) -> np.ndarray:
    tokens = np.diff(run.tokens, prepend=0.0)
    tokens[0] = np.nan  # what the first record covers is unknown where a log begins later
    seconds = np.diff(run.seconds, prepend=0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = tokens / seconds / (run.log.num_gpus or 1)
    return np.where(np.isfinite(rate), rate, np.nan)


def stability(runs: list[Run]) -> Any:
    """Draw the gradient norm and the loss ratio against tokens."""
    norms = [run.column("grad norm") for run in runs]
    ratios = [np.append(np.nan, loss_ratios(run.losses)) for run in runs]
    if min(len(column) for column in norms) < 3 or any(np.isnan(x).all() for x in norms + ratios):
        return None
    figure, panels = _panels(2)
    for axes, columns in zip(panels, (norms, ratios), strict=True):
        for index, axis in enumerate(axes_of(runs)["tokens"]):
            colour = colour_of(index)
            axes.plot(axis.values, columns[index], color=colour, linewidth=0.6, alpha=0.3)
            axes.plot(axis.values, smoothed(columns[index]), color=colour, linewidth=2)
        axes.set_ylim(*_frame(columns))
    _along_run(panels[0], axis, "Gradient norm", "before clipping")
    _along_run(panels[1], axis, "Loss ratio", "loss / lowest loss before")
    panels[1].axhline(1.0, color="#999999", linewidth=0.8)
    _name_runs(figure, runs)
    return figure


PICTURES = (
    Picture(
        "windows",
        "How far attention sees",
        "Left: the window, the number of tokens that attention may look across. Right: the "
        "attention work this leaves, compared with ordinary causal attention over whole rows.",
        windows,
    ),
    Picture(
        "training-loss",
        "Training loss",
        "The same losses three times: for tokens seen, time spent and compute spent. While windows "
        "are short a token has less context to be predicted from, so training losses of different "
        "windows are not comparable; those at the end, at equal windows, and validation losses "
        "are. Thin: as logged; thick: smoothed. The first steps may lie above the frame.",
        training_loss,
    ),
    Picture(
        "validation-loss",
        "Validation loss",
        "Measured with the whole row in sight, whatever the window in training.",
        validation_loss,
    ),
    Picture(
        "loss-by-length",
        "Loss by context length",
        "The last validation. Left: the same tokens under blocked windows of each length, so that "
        "no token sees more than that. Right: whole rows in sight, by the token's position. Grey: "
        f"differences below {SIGNIFICANT}, which the paper counts as noise.",
        loss_by_length,
    ),
    Picture(
        "loss-by-length-over-training",
        "Loss by context length over training",
        "Each panel is one context length; lower is better. Grey as above.",
        loss_by_length_over_training,
    ),
    Picture(
        "throughput",
        "Speed",
        "Left: what counts for the schedule of a run. Right: how well the hardware is used; it "
        "counts only the attention that windows leave, so a run can be faster at a lower rate.",
        throughput,
    ),
    Picture(
        "stability",
        "Stability",
        "Left: the gradient norm. Right: each loss relative to the lowest one before it; spikes "
        "are steps back.",
        stability,
    ),
)
