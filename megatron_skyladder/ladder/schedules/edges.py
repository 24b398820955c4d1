"""Runs of equal windows over a run of any length."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Protocol

import numpy as np


class Stepwise(Protocol):
    """What is asked of a schedule here; see `base.WindowSchedule`."""

    @property
    def round_to(self) -> int | str | None: ...

    def turns(self) -> Iterable[Fraction]: ...

    def window_at(self, step: int, /) -> int: ...

    def on_arrays(self, end_step: int, /) -> bool: ...

    def windows(self, start: int, end: int, /) -> np.ndarray: ...


# Up to so many steps for each window, trying every step is faster than bisection for the edges:
# on arrays, and one by one.
_STEPS_PER_WINDOW_ON_ARRAYS = 256
_STEPS_PER_WINDOW = 4
_CHUNK = 1 << 20  # steps that are tried at once: 8 MB for each array


def equal_runs(schedule: Stepwise, total_steps: int) -> list[tuple[int, int, int]]:
    """Return ``(first_step, end_step, window)``, see `WindowSchedule.segments`."""
    if total_steps <= 0:
        return []
    found = [_edges(schedule, *stretch) for stretch in _monotone_stretches(schedule, total_steps)]
    steps, windows = (np.concatenate(parts) for parts in zip(*found, strict=True))
    new = np.append(True, windows[1:] != windows[:-1])  # a turn need not change the window
    firsts = steps[new].tolist()
    return list(zip(firsts, [*firsts[1:], total_steps], windows[new].tolist(), strict=True))


def _monotone_stretches(schedule: Stepwise, total_steps: int) -> Iterator[tuple[int, int]]:
    """Split 0..total_steps where the window may turn round or jump."""
    turns = {min(total_steps, math.ceil(turn)) for turn in schedule.turns()}
    return itertools.pairwise(sorted(turns | {0, total_steps}))


def _edges(schedule: Stepwise, first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps of a monotone stretch at which a window begins, and those windows."""
    distance = abs(schedule.window_at(end - 1) - schedule.window_at(first))
    if isinstance(schedule.round_to, str):  # powers of two
        num_windows = distance.bit_length() + 1
    else:
        num_windows = distance // (schedule.round_to or 1) + 1
    worth = _STEPS_PER_WINDOW_ON_ARRAYS if schedule.on_arrays(end) else _STEPS_PER_WINDOW
    if end - first > num_windows * worth:
        steps = list(_bisected(schedule, first, end))
        return np.array(steps), np.array([schedule.window_at(step) for step in steps])
    starts, values = [], []
    for start in range(first, end, _CHUNK):
        windows = schedule.windows(start, min(end, start + _CHUNK))
        at = np.append(0, np.flatnonzero(windows[1:] != windows[:-1]) + 1)
        starts.append(at + start)
        values.append(windows[at])
    return np.concatenate(starts), np.concatenate(values)


def _bisected(schedule: Stepwise, first: int, end: int) -> Iterator[int]:
    """Yield the steps of a monotone stretch at which a window begins."""
    step = first
    while step < end:
        yield step
        window = schedule.window_at(step)
        low, stride = step, 1  # window_at(low) == window
        while low + stride < end and schedule.window_at(low + stride) == window:
            low += stride
            stride *= 2
        high = min(end, low + stride)
        while high - low > 1:
            middle = (low + high) // 2
            if schedule.window_at(middle) == window:
                low = middle
            else:
                high = middle
        step = high
