"""The pictures of validation losses by context length and position."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_skyladder.report.curves import Run, axes_of, finite
from megatron_skyladder.report.drawing import (
    HEIGHT,
    along_run,
    colour_of,
    frame,
    label,
    make_panels,
    name_runs,
    noise_band,
)
from megatron_skyladder.report.runlog import Validation


def loss_by_length(runs: list[Run]) -> Any:
    """Draw the last validation's losses by context length and by position."""
    finals = [_last_by_length(run) for run in runs]
    if all(final is None for final in finals):
        return None
    compared = len(runs) > 1 and finals[0] is not None
    figure, panels = make_panels(
        2, height=HEIGHT * (1.75 if compared else 1), rows=2 if compared else 1
    )
    grid = panels if compared else panels[None, :]
    for column, kind in enumerate(("by_length", "by_positions")):
        values = [getattr(final, kind) if final else {} for final in finals]
        keys = sorted({key for found in values for key in found})
        losses = [finite(found.get(key) for key in keys) for found in values]
        _plot_keys(grid[0, column], runs, keys, losses)
        if compared:
            _plot_keys(grid[1, column], runs, keys, [own - losses[0] for own in losses])
    _title_by_length(grid, runs[0].name if compared else "")
    name_runs(figure, runs)
    return figure


def _plot_keys(axes: Any, runs: list[Run], keys: list[Any], columns: list[np.ndarray]) -> None:
    """Draw a value of each run at each key; NaN where it has none."""
    for index, values in enumerate(columns):
        known = np.flatnonzero(np.isfinite(values))
        style = {"color": colour_of(index), "linewidth": 1.8, "marker": "o", "markersize": 5}
        axes.plot(known, values[known], **style)
    axes.set_xticks(range(len(keys)), [_key_text(key) for key in keys])
    axes.margins(x=0.08)
    if any(run.has_diverged for run in runs):
        frame(axes, runs, columns, early=0)


def _title_by_length(grid: np.ndarray, baseline: str) -> None:
    by_length, by_positions = "context length (tokens)", "position in the row (tokens)"
    label(grid[0, 0], "Final loss by context length", by_length, "loss (nats per token)")
    label(grid[0, 1], "Final loss by position", by_positions, "")
    if baseline:
        label(grid[1, 0], f"Difference to {baseline}", by_length, "lower is better")
        label(grid[1, 1], f"Difference to {baseline}", by_positions, "")
        for axes in grid[1]:
            noise_band(axes)


def _key_text(key: Any) -> str:
    return f"{key[0]:,} to {key[1]:,}" if isinstance(key, tuple) else f"{key:,}"


def _last_by_length(run: Run) -> Any:
    records = [record for record in run.validations() if record.by_length]
    return records[-1] if records else None


def loss_by_length_over_training(runs: list[Run]) -> Any:
    """Draw the loss at each length against tokens; of several runs, what they differ by."""
    baseline = _length_losses(runs[0])
    lengths = sorted(baseline)
    if not lengths or max(len(found) for found in baseline.values()) < 2:
        return None
    compared = len(runs) > 1
    figure, panels = make_panels(len(lengths))
    columns: list[list[np.ndarray]] = [[] for _ in runs]
    for axes, length in zip(panels, lengths, strict=True):
        for index, (run, axis) in enumerate(zip(runs, axes_of(runs)["tokens"], strict=True)):
            found = _length_losses(run).get(length, [])
            values = finite(record.by_length[length] for record in found)
            if compared:
                reference = baseline[length]
                known = finite(record.by_length[length] for record in reference)
                at_tokens = runs[0].at(runs[0].tokens, reference)
                values = values - np.interp(run.at(run.tokens, found), at_tokens, known)
            columns[index].append(values)
            style = {"linewidth": 1.8, "marker": "o", "markersize": 3.5}
            axes.plot(run.at(axis.values, found), values, color=colour_of(index), **style)
        along_run(axes, axis, f"{length:,} tokens visible")
        if compared:
            noise_band(axes)
    for other in panels[1:]:
        other.sharey(panels[0])
        other.tick_params(labelleft=False)
    if any(run.has_diverged for run in runs):
        frame(panels[0], runs, [np.concatenate(parts) for parts in columns], early=0)
    panels[0].set_ylabel(f"loss minus that of {runs[0].name}" if compared else "validation loss")
    name_runs(figure, runs)
    return figure


def _length_losses(run: Run) -> dict[int, list[Validation]]:
    """Return the validation records that have a loss at each length."""
    by_length: dict[int, list[Validation]] = {}
    for record in run.validations():
        for length in record.by_length:
            by_length.setdefault(length, []).append(record)
    return by_length
