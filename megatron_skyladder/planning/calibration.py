"""Step times out of a Megatron console log, split into what the window changes and what not.

A run under a growing window measures its own cost model: time = fixed + attention * fraction,
fitted by least squares over the log's lines. The log's fraction is the mean of all ranks; where
context-parallel ranks differ, a step waits for the busiest one, so the fraction is made its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from megatron_skyladder.ladder.costs import StepTime
from megatron_skyladder.report.runlog import Iteration, RunLog

# (window, what a query of local layers sees at most) -> attention work of the busiest
# context-parallel rank over the mean one's
OverMean = Callable[[int, int | None], float]

_OUTLIER = 5.0  # times the median deviation: a step that compiled, or waited for a file system


class Point(NamedTuple):
    """One line of a log.

    seconds: of an iteration, on average over those the line stands for.
    fraction: their mean attention work relative to full causal, on the busiest rank.
    """

    seconds: float
    fraction: float
    window: int


@dataclass(frozen=True)
class Calibration:
    """A fitted step time and how well it is known.

    Args:
        step_time: seconds of a step, of the log's batch.
        batch: sequences in the log's global batch.
        num_lines: log lines the fit stands on.
        num_dropped: lines left out: the first one, and outliers.
        num_windows: different windows among them.
        spread: standard deviation of a line around the fit, in seconds.
        covariance: of (fixed, attention): their variances and the covariance, in seconds squared.
        num_gpus: the log's last world size; None where it does not say.
    """

    step_time: StepTime
    batch: int
    num_lines: int
    num_dropped: int
    num_windows: int
    spread: float
    covariance: tuple[float, float, float]
    num_gpus: int | None

    def saved_error(self, fraction: float, baseline: float) -> float:
        """Return the standard error of the share of time saved, by the delta method.

        With F and A of a step's time F + A * work, saved = 1 - (F + A fraction) / (F + A baseline);
        its derivatives are (fraction - baseline) A / seconds(baseline)**2 by F, and
        (baseline - fraction) F / seconds(baseline)**2 by A.

        Args:
            fraction: mean attention work of the run, relative to full causal.
            baseline: the same without the ladder: less than 1 where documents are masked or layers
                are local.
        """
        fixed, attention = self.step_time.fixed, self.step_time.attention
        scale = (baseline - fraction) / self.step_time.seconds(baseline) ** 2
        by_fixed, by_attention = -scale * attention, scale * fixed
        var_fixed, var_attention, covariance = self.covariance
        variance = (
            by_fixed**2 * var_fixed
            + by_attention**2 * var_attention
            + 2 * by_fixed * by_attention * covariance
        )
        return math.sqrt(max(0.0, variance))


def calibrate(run: RunLog, over_mean: OverMean | None = None) -> Calibration:
    """Fit a step time to the log of a run.

    Args:
        run: what `runlog.read_run` returns.
        over_mean: how unequal the ranks' work was; None: all had the same.

    Raises:
        ValueError: it says nothing about windows, or has too few of them, or time does not grow
            with the work.
    """
    points, batch = _points(run, over_mean)
    windows = {point.window for point in points}
    if len({point.fraction for point in points}) < 2 or len(points) < 3:
        raise ValueError(
            f"{run.path} has {len(points)} usable lines with {len(windows)} window lengths (its "
            "first line does not count). Calibration needs at least 3 lines and 2 windows: train "
            "for longer, or with a lower --log-interval."
        )
    kept = _without_outliers(points)
    fit, spread, covariance = _fit(kept)
    if fit.fixed <= 0 or fit.attention < 0:
        raise ValueError(
            f"{run.path}: steps do not get slower with the window ({len(kept)} lines give "
            f"{fit.attention * 1e3:.1f} ms for full attention and {fit.fixed * 1e3:.1f} ms for the "
            "rest). Give a log that covers short and long windows, or --device instead."
        )
    return Calibration(
        step_time=fit,
        batch=batch,
        num_lines=len(kept),
        num_dropped=1 + len(points) - len(kept),
        num_windows=len({point.window for point in kept}),
        spread=spread,
        covariance=covariance,
        num_gpus=run.num_gpus,
    )


def _points(run: RunLog, over_mean: OverMean | None) -> tuple[list[Point], int]:
    """Return the lines of the last batch size and GPUs, without the first; and that size."""
    lines = [line for line in run.iterations if _is_usable(line)]
    if not lines:
        raise ValueError(
            f"{run.path} says nothing about windows (skyladder/attention_fraction). Give the "
            "console output of a run with --skyladder-* flags; its last rank prints it."
        )
    batch = _batch(lines[-1])
    gpus = lines[-1].num_gpus
    lines = [line for line in lines if (_batch(line), line.num_gpus) == (batch, gpus)]
    points = []
    fractions = [_fraction(line, over_mean) for line in lines]
    for (before, latest), line in zip(itertools.pairwise(fractions), lines[1:], strict=True):
        # A line's time is the mean over its steps, its window that of the last one: the mean work
        # lies between the two lines, half a step closer to this one.
        steps = line.num_iterations
        fraction = latest - (latest - before) * (steps - 1) / (2 * steps)
        points.append(Point(line.elapsed_ms / 1e3, fraction, line.window or 0))
    return points, batch


def _fraction(line: Iteration, over_mean: OverMean | None) -> float:
    """Return the attention work of a line's last iteration on the busiest rank."""
    assert line.attention_fraction is not None
    if over_mean is None or line.window is None:
        return line.attention_fraction
    local_window = line.values.get("skyladder/local_window")
    own = None if local_window is None else int(local_window)
    return line.attention_fraction * over_mean(line.window, own)


def _is_usable(line: Iteration) -> bool:
    """Whether a line has the figures; those of a damaged one may be anything."""
    needed = (line.attention_fraction, line.values.get("global batch size", 0.0))
    return all(value is not None and math.isfinite(value) for value in needed)


def _batch(line: Iteration) -> int:
    return int(line.values.get("global batch size", 0))


def _without_outliers(points: list[Point]) -> list[Point]:
    robust = _robust_fit(points)
    distances = [abs(point.seconds - robust.seconds(point.fraction)) for point in points]
    limit = max(_OUTLIER * median(distances), 0.01 * robust.seconds(1.0))
    kept = [point for point, far in zip(points, distances, strict=True) if far <= limit]
    enough = len(kept) >= 3 and len({point.fraction for point in kept}) >= 2
    return kept if enough else points


def _robust_fit(points: list[Point]) -> StepTime:
    """Return a line that a few slow steps do not move: medians of slopes and of what is left."""
    ordered = sorted(points, key=lambda point: point.fraction)
    half = len(ordered) // 2
    slopes = [
        (high.seconds - low.seconds) / (high.fraction - low.fraction)
        for low, high in zip(ordered, ordered[half:], strict=False)
        if high.fraction > low.fraction
    ]
    slope = median(slopes) if slopes else 0.0
    return StepTime(median(p.seconds - slope * p.fraction for p in points), slope)


def _fit(points: list[Point]) -> tuple[StepTime, float, tuple[float, float, float]]:
    """Return the least-squares line, the spread around it and the covariance of its two terms."""
    count = len(points)
    work = [point.fraction for point in points]
    seconds = [point.seconds for point in points]
    mean_work, mean_seconds = sum(work) / count, sum(seconds) / count
    squares = sum((x - mean_work) ** 2 for x in work)
    slope = (
        sum((x - mean_work) * (y - mean_seconds) for x, y in zip(work, seconds, strict=True))
        / squares
    )
    fit = StepTime(fixed=mean_seconds - slope * mean_work, attention=slope)
    residuals = [y - fit.seconds(x) for x, y in zip(work, seconds, strict=True)]
    variance = sum(residual**2 for residual in residuals) / max(1, count - 2)
    covariance = (
        variance * (1 / count + mean_work**2 / squares),
        variance / squares,
        -variance * mean_work / squares,
    )
    return fit, math.sqrt(variance), covariance
