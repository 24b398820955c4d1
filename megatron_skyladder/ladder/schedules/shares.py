"""Windows given at shares of the run: points that lines join. Stages are in `stages`."""

from __future__ import annotations

import csv
import itertools
import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np

from megatron_skyladder.ladder.numbers import exact, written
from megatron_skyladder.ladder.schedules.base import (
    FINAL_WINDOW,
    INT64_LIMIT,
    WindowSchedule,
    read_window,
)
from megatron_skyladder.ladder.settings import SettingError, setting

MAX_POINTS = 1000  # all of them are in the fingerprint


class GivenWindows(WindowSchedule):
    """Windows given one by one, as shares of the run."""

    def _check_windows(self, name: str, windows: Iterable[int]) -> None:
        for window in windows:
            if not 1 <= window <= self.final_window:
                raise SettingError(
                    f"${name} has a window of {window}. "
                    f"Windows lie between 1 and the final window of {self.final_window}."
                )

    def _check_last(self, name: str, window: int) -> None:
        if window != self.final_window:
            raise SettingError(
                f"the last of ${name} is {window}, but the final window "
                f"is {self.final_window}. Make them equal ($final_window)."
            )


# --- points ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A window at a point of the run."""

    share: Fraction  # of all training steps that lie behind, 0 <= share <= 1
    window: int  # tokens, or FINAL_WINDOW


def _read_points(given: Point | str) -> tuple[Point, ...]:
    """Read SHARE:WINDOW, or a file of them."""
    if isinstance(given, Point):
        return (given,)
    if given.endswith(".csv"):
        return _read_points_file(given)
    share, _, window = given.partition(":")
    try:
        return (Point(exact(share), read_window(window)),)
    except ValueError:
        raise ValueError(
            f"{given!r} is neither SHARE:WINDOW, such as 0.5:4096, nor a .csv file"
        ) from None


def _read_points_file(path: str) -> tuple[Point, ...]:
    """Read a CSV file with a share and a window in each line; a first line may name them."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = list(itertools.islice(csv.reader(file), MAX_POINTS + 2))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no CSV text"
        raise ValueError(f"{path!r} cannot be read: {reason}") from None
    points = []
    for number, line in enumerate(lines, start=1):
        cells = [cell.strip() for cell in line]
        if not any(cells) or (number == 1 and cells[:2] == ["share", "window"]):
            continue
        try:
            share, window = cells
            points.append(Point(exact(share), read_window(window)))
        except ValueError:
            raise ValueError(
                f"{path!r}, line {number}: {','.join(line)[:64]!r} is not SHARE,WINDOW, such as "
                "0.5,4096"
            ) from None
    if not points:
        raise ValueError(f"{path!r} has no points. Give lines of SHARE,WINDOW, such as 0.5,4096")
    return tuple(points)


@dataclass(frozen=True)
class Points(GivenWindows):
    """Linear between given points: any curve.

    Two points at the same share make a jump; after the last point its window stays.
    """

    schedule: str = "points"
    points: tuple[Point, ...] = field(
        default=(),
        metadata=setting(
            read=_read_points,
            several=True,
            metavar="SHARE:WINDOW",
            help="windows at shares of the run, linear between them, such as "
            "0:32 0.1:512 0.5:4096 0.64:final; or a .csv file with a share and a window in each "
            "line.",
        ),
    )

    summary = "goes in straight lines through given points: a curve of your own"
    formula = "linear between the points"
    uses = ("round_to",)

    @property
    def ramp_steps(self) -> Fraction:
        """Steps until the window stays at the final one."""
        return self.points[self._reached].share * self._need_total_steps("points are at")

    @cached_property
    def _reached(self) -> int:
        """The first point from which the window stays at the final one."""
        before = [i for i, point in enumerate(self.points) if point.window != self.final_window]
        return before[-1] + 1 if before else 0

    def turns(self) -> Iterable[Fraction]:
        total = self._need_total_steps("points are at")
        return (point.share * total for point in self.points)

    @cached_property
    def _units(self) -> tuple[list[int], int]:
        """Where the points lie, and the length of a step, in the same whole units."""
        total = self._need_total_steps("points are at")
        unit = math.lcm(*(point.share.denominator for point in self.points))
        return [int(point.share * unit) * total for point in self.points], unit

    def _window(self, step: int) -> int:
        places, unit = self._units
        done = step * unit
        at = bisect_right(places, done) - 1
        if at >= self._reached:
            return self.final_window
        low, high = self.points[at].window, self.points[at + 1].window
        window = low + (high - low) * (done - places[at]) // (places[at + 1] - places[at])
        return int(self._rounded(window))

    def on_arrays(self, end: int) -> bool:
        """Return whether `windows` takes all steps before ``end`` at once, without an overflow."""
        places, unit = self._units
        return self.final_window * max(places[-1], end * unit) < INT64_LIMIT

    def windows(self, first: int, end: int) -> np.ndarray:
        """Return the windows at the steps first .. end - 1, int64 [end - first]."""
        if not self.on_arrays(end):
            return super().windows(first, end)
        places, unit = self._units
        done = np.arange(first, end, dtype=np.int64) * unit
        starts = np.array(places)
        at = np.searchsorted(starts, done, side="right") - 1
        given = np.array([point.window for point in self.points])
        lengths, growth = np.append(np.diff(starts), 1), np.append(np.diff(given), 0)
        # of two points at one place the first is never `at`, so its length of 0 divides nothing
        windows = given[at] + growth[at] * (done - starts[at]) // lengths[at]
        return np.where(at >= self._reached, self.final_window, self._rounded(windows))

    def _rounded(self, window: Any) -> Any:
        return self._round(window, min(point.window for point in self.points))

    def describe(self) -> str:
        """Return the schedule for the fingerprint."""
        points = " ".join(
            f"{written(point.share).removesuffix('.0')}:{point.window}" for point in self.points
        )
        return f"points {points} of {self.total_steps} steps{self._rounding_text}"

    def _check(self) -> None:
        if not 2 <= len(self.points) <= MAX_POINTS:
            raise SettingError(
                f"$schedule=points needs $points SHARE:WINDOW ..., 2 to {MAX_POINTS} of them, for "
                "example $points 0:32 0.5:4096 0.64:final."
            )
        points = tuple(
            Point(point.share, self.final_window) if point.window == FINAL_WINDOW else point
            for point in self.points
        )
        object.__setattr__(self, "points", points)
        self._need_total_steps("points are at")
        self._check_windows("points", (point.window for point in points))
        shares = [point.share for point in points]
        if shares[0] != 0 or shares[-1] > 1:
            raise SettingError(
                f"$points run from {float(shares[0]):g} to {float(shares[-1]):g}. They are shares "
                "of the run: the first is at 0, the last at 1 or before."
            )
        for one, other in itertools.pairwise(shares):
            if other < one:
                raise SettingError(
                    f"$points go back from {float(one):g} to {float(other):g}. Give them in order."
                )
        self._check_last("points", points[-1].window)
