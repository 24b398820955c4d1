"""The pictures of validation losses by context length and position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from megatron_skyladder.report.curves import Run, finite
from megatron_skyladder.report.groups import Group
from megatron_skyladder.report.panels import (
    Curve,
    Panel,
    Range,
    axes_by_kind,
    framed,
    lines_of,
    runs_of,
)
from megatron_skyladder.report.runlog import Validation

LOSS = "loss (nats per token)"
KINDS = (  # of losses, what a title calls them, their axis
    ("by_length", "context length", "context length (tokens)"),
    ("by_positions", "position", "position in the sequence (tokens)"),
)


def loss_by_length(groups: list[Group]) -> list[Panel]:
    """Show the last validation's losses by context length and by position."""
    finals = {run.name: _last_by_length(run) for run in runs_of(groups)}
    panels, differences = [], []
    for kind, name, axis in KINDS:
        losses = {run: getattr(final, kind) if final else {} for run, final in finals.items()}
        keys = sorted({key for found in losses.values() for key in found})
        if not keys:
            continue

        def curve(run: Run, losses: dict[str, Any] = losses, keys: list[Any] = keys) -> Curve:
            values = finite(losses[run.name].get(key) for key in keys)
            return np.arange(len(keys), dtype=float), values

        own = Panel(
            f"Final loss by {name}",
            axis,
            LOSS,
            lines_of(groups, curve),
            _frame(groups, curve),
            tuple(_key_text(key) for key in keys),
            marked=True,
        )
        panels.append(own)
        difference = _minus_first(groups, curve)
        if difference is not None:
            title = f"Difference to {groups[0].name}, by {name}"
            differences.append(
                replace(
                    own,
                    title=title,
                    y_label="nats per token, lower is better",
                    lines=lines_of(groups, difference),
                    y_range=_frame(groups, difference),
                    noise=True,
                )
            )
    return [*panels, *differences]


def loss_by_length_over_training(groups: list[Group]) -> list[Panel]:
    """Show the loss at each length against tokens; of several groups, what they differ by."""
    first = [_length_losses(run) for run in groups[0].runs]
    lengths = sorted({length for found in first for length in found})
    if not lengths or max(len(found.get(lengths[0], ())) for found in first) < 2:
        return []
    tokens = axes_by_kind(groups)["tokens"]
    label = next(iter(tokens.values())).label
    panels = []
    for length in lengths:

        def curve(run: Run, length: int = length) -> Curve:
            records = _length_losses(run).get(length, [])
            losses = finite(record.by_length[length] for record in records)
            return run.at(tokens[run.name].values, records), losses

        difference = _minus_first(groups, curve)
        unit = LOSS if difference is None else f"loss minus that of {groups[0].name}"
        shown: Callable[[Run], Curve] = difference or curve
        panels.append(
            Panel(
                f"{length:,} tokens of context",
                label,
                unit,
                lines_of(groups, shown),
                _frame(groups, shown),
                marked=True,
                noise=difference is not None,
            )
        )
    return panels


def _minus_first(
    groups: list[Group], curve: Callable[[Run], Curve]
) -> Callable[[Run], Curve] | None:
    """Return the curve of a run's difference to the first group; None where there is none."""
    reference = lines_of(groups[:1], curve)
    if len(groups) < 2 or not reference:
        return None
    at, known = reference[0].curve
    at, known = at[np.isfinite(known)], known[np.isfinite(known)]

    def difference(run: Run) -> Curve:
        x, y = curve(run)
        return x, y - np.interp(x, at, known, left=np.nan, right=np.nan)

    return difference


def _frame(groups: list[Group], curve: Callable[[Run], Curve]) -> Range:
    if any(run.has_diverged for run in runs_of(groups)):
        return framed(groups, curve, 0)
    return None, None


def _key_text(key: Any) -> str:
    return f"{key[0]:,} to {key[1]:,}" if isinstance(key, tuple) else f"{key:,}"


def _last_by_length(run: Run) -> Any:
    records = [record for record in run.validations() if record.by_length]
    return records[-1] if records else None


def _length_losses(run: Run) -> dict[int, list[Validation]]:
    """Return the validation records that have a loss at each length."""
    by_length: dict[int, list[Validation]] = {}
    for record in run.validations():
        for length in record.by_length:
            by_length.setdefault(length, []).append(record)
    return by_length
