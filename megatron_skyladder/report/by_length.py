"""The pictures of validation losses by context length and position."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from megatron_skyladder.report.comparable import other_text
from megatron_skyladder.report.curves import Run, finite
from megatron_skyladder.report.groups import Group
from megatron_skyladder.report.panels import (
    SAME,
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
    """Show the last validation's losses by context length and by position.

    Seeds are taken at tokens that all of a group have seen, differences at those that both groups
    have: losses of runs that have come less far say nothing about the runs. Nor do differences of
    losses on other texts: there are none.
    """
    first = groups[0]
    # up to which tokens a run is looked at: as far as its seeds have come, and the first group too
    own_end: dict[str, float] = {}
    both_end: dict[str, float] = {}
    for group in groups:
        own_end |= dict.fromkeys(_names(group), _common_end(group.runs))
        both_end |= dict.fromkeys(_names(group), _common_end([*group.runs, *first.runs]))
    final = all(_have_come_as_far(group.runs) for group in groups)
    equal = all(_have_come_as_far([*group.runs, *first.runs]) for group in groups)
    panels, differences = [], []
    for kind, name, axis in KINDS:
        records = [_last_until(run, own_end[run.name]) for run in runs_of(groups)]
        keys = sorted({key for record in records if record for key in getattr(record, kind)})
        if not keys:
            continue

        def curve(run: Run, kind: str = kind, keys: list[Any] = keys) -> Curve:
            record = _last_until(run, own_end[run.name])
            return _by_key(getattr(record, kind) if record else {}, keys)

        def difference(run: Run, kind: str = kind, keys: list[Any] = keys) -> Curve:
            record = _last_until(run, both_end[run.name])
            losses = getattr(record, kind) if record else {}
            x, y = _by_key(losses, keys)
            if other_text(run.log, first.runs[0].log):
                return x, np.full_like(y, np.nan)
            if record is None:
                return x, y
            (tokens,) = run.at(run.tokens, [record])
            return x, y - np.array([_mean_at(first.runs, kind, key, tokens) for key in keys])

        own = Panel(
            f"{'Final loss' if final else 'Loss where all seeds have been,'} by {name}",
            axis,
            LOSS,
            lines_of(groups, curve),
            _frame(groups, curve),
            tuple(_key_text(key) for key in keys),
            marked=True,
        )
        panels.append(own)
        if len(groups) > 1 and _has_values(first, curve):
            title = f"Difference to {first.name}{'' if equal else ' at equal tokens'}, by {name}"
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
        if other_text(run.log, groups[0].runs[0].log):
            return x, np.full_like(y, np.nan)
        return x, y - np.interp(x, at, known, left=np.nan, right=np.nan)

    return difference


def _frame(groups: list[Group], curve: Callable[[Run], Curve]) -> Range:
    if any(run.has_diverged for run in runs_of(groups)):
        return framed(groups, curve, 0)
    return None, None


def _key_text(key: Any) -> str:
    return f"{key[0]:,} to {key[1]:,}" if isinstance(key, tuple) else f"{key:,}"


def _names(group: Group) -> list[str]:
    return [run.name for run in group.runs]


def _by_key(losses: dict[Any, float], keys: list[Any]) -> Curve:
    return np.arange(len(keys), dtype=float), finite(losses.get(key) for key in keys)


def _records(run: Run) -> list[Validation]:
    return [record for record in run.validations() if record.by_length]


def _ends(runs: Iterable[Run]) -> list[float]:
    """Return the tokens of each run's last validation by length, of those that have one."""
    found = ((run, _records(run)) for run in runs)
    return [float(run.at(run.tokens, records[-1:])[0]) for run, records in found if records]


def _common_end(runs: Iterable[Run]) -> float:
    """Return the last tokens at which all runs that are validated by length have been."""
    return min(_ends(runs), default=math.inf) * (1 + SAME)


def _have_come_as_far(runs: Iterable[Run]) -> bool:
    ends = _ends(runs)
    return max(ends, default=0.0) <= min(ends, default=0.0) * (1 + SAME)


def _last_until(run: Run, tokens: float) -> Validation | None:
    """Return a run's last validation by length up to so many tokens."""
    records = _records(run)
    places = run.at(run.tokens, records) if records else np.empty(0)
    within = [record for record, at in zip(records, places, strict=True) if at <= tokens]
    return within[-1] if within else None


def _mean_at(runs: Iterable[Run], kind: str, key: Any, tokens: float) -> float:
    """Return the mean of runs' losses at so many tokens, interpolated; NaN before the first."""
    found = []
    for run in runs:
        records = _records(run)
        values = finite(getattr(record, kind).get(key) for record in records)
        known = np.isfinite(values)
        if known.any():
            x = run.at(run.tokens, records)[known]
            found.append(np.interp(tokens, x, values[known], left=np.nan))
    return float(np.mean(found)) if found else math.nan


def _has_values(group: Group, curve: Callable[[Run], Curve]) -> bool:
    return any(np.isfinite(curve(run)[1]).any() for run in group.runs)


def _length_losses(run: Run) -> dict[int, list[Validation]]:
    """Return the validation records that have a loss at each length."""
    by_length: dict[int, list[Validation]] = {}
    for record in run.validations():
        for length in record.by_length:
            by_length.setdefault(length, []).append(record)
    return by_length
