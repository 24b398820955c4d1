"""Step times out of a Megatron console log, split into what the window changes and what not.

A run under a growing window measures its own cost model: time = fixed + attention * fraction,
fitted by least squares over the log's lines.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from megatron_skyladder.costs import StepTime

_ITERATION = re.compile(r"iteration\s+(\d+)/\s*\d+ \|")
_FIELDS = {
    "milliseconds": re.compile(r"elapsed time per iteration \(ms\): ([\d.]+)"),
    "batch": re.compile(r"global batch size:\s*(\d+)"),
    "window": re.compile(r"skyladder/window: (\S+)"),
    "fraction": re.compile(r"skyladder/attention_fraction: (\S+)"),
}
_WORLD_SIZE = re.compile(r"using world size: (\d+)")
_OUTLIER = 5.0  # times the median deviation: a step that waited for a checkpoint or the file system


@dataclass(frozen=True)
class LogLine:
    """One line of the log: means over its interval, the window of its last step."""

    iteration: int
    milliseconds: float
    batch: int  # rows in the global batch
    window: int
    fraction: float  # attention work relative to full causal


@dataclass(frozen=True)
class Calibration:
    """A fitted step time and how well it is known.

    Args:
        step_time: seconds of a step, of the log's batch.
        batch: rows in the log's global batch.
        num_lines: log lines the fit stands on.
        num_dropped: lines left out: the first after each start, and outliers.
        num_windows: different windows among them.
        spread: standard deviation of a line around the fit, in seconds.
        covariance: of (fixed, attention): their variances and the covariance, in seconds squared.
        num_gpus: the log's world size; None where it does not say.
    """

    step_time: StepTime
    batch: int
    num_lines: int
    num_dropped: int
    num_windows: int
    spread: float
    covariance: tuple[float, float, float]
    num_gpus: int | None

    def saved_error(self, fraction: float) -> float:
        """Return the standard error of the share of time saved at this mean attention work."""
        fixed, attention = self.step_time.fixed, self.step_time.attention
        scale = (1 - fraction) / (fixed + attention) ** 2
        by_fixed, by_attention = -scale * attention, scale * fixed
        var_fixed, var_attention, covariance = self.covariance
        variance = (
            by_fixed**2 * var_fixed
            + by_attention**2 * var_attention
            + 2 * by_fixed * by_attention * covariance
        )
        return math.sqrt(max(0.0, variance))


def calibrate(path: str | Path) -> Calibration:
    """Fit a step time to a console log.

    Raises:
        ValueError: the log has no window in it, or fewer than two windows, or too few lines.
    """
    with open(path, encoding="utf-8", errors="replace") as file:
        lines, num_first, num_gpus = _read(file.read(), str(path))
    kept = _without_outliers(lines)
    fit, spread, covariance = _fit(kept)
    if fit.fixed <= 0 or fit.attention < 0:
        raise ValueError(
            f"{path}: steps do not get slower with the window ({len(kept)} lines give "
            f"{fit.attention * 1e3:.1f} ms for full attention and {fit.fixed * 1e3:.1f} ms for the "
            "rest). Give a log that covers short and long windows, or --device instead."
        )
    return Calibration(
        step_time=fit,
        batch=kept[-1].batch,
        num_lines=len(kept),
        num_dropped=num_first + len(lines) - len(kept),
        num_windows=len({line.window for line in kept}),
        spread=spread,
        covariance=covariance,
        num_gpus=num_gpus,
    )


def parse(text: str) -> list[LogLine]:
    """Return the log's training lines that carry a window, in order."""
    lines = []
    for row in text.splitlines():
        iteration = _ITERATION.search(row)
        found = {name: pattern.search(row) for name, pattern in _FIELDS.items()}
        if iteration is None or not all(found.values()):
            continue
        value = {name: float(match[1]) for name, match in found.items() if match}
        lines.append(
            LogLine(
                iteration=int(iteration[1]),
                milliseconds=value["milliseconds"],
                batch=int(value["batch"]),
                window=int(value["window"]),
                fraction=value["fraction"],
            )
        )
    return lines


def _read(text: str, path: str) -> tuple[list[LogLine], int, int | None]:
    """Return the usable lines, how many were left out as first ones, and the world size."""
    lines = parse(text)
    if not lines:
        raise ValueError(
            f"{path} has no line with 'elapsed time per iteration (ms)' and 'skyladder/window'. "
            "Give the console output of a run of megatron_skyladder.pretrain_gpt (its last rank)."
        )
    lines = [line for line in lines if line.batch == lines[-1].batch]  # one batch size
    usable = []
    for before, line in zip([None, *lines[:-1]], lines, strict=True):
        if before is None or line.iteration <= before.iteration:
            continue  # the first line after a start: compilation, caches, memory pools
        # A line's time is the mean over its steps, its window that of the last one: the mean work
        # lies between the two lines, half a step closer to this one.
        steps = line.iteration - before.iteration
        behind = (line.fraction - before.fraction) * (steps - 1) / (2 * steps)
        usable.append(replace(line, fraction=line.fraction - behind))
    windows = {line.window for line in usable}
    if len({line.fraction for line in usable}) < 2 or len(usable) < 3:
        raise ValueError(
            f"{path} has {len(usable)} usable lines with {len(windows)} window lengths (the "
            "first line after each start does not count). Calibration needs at least 3 lines and "
            "2 windows: train for longer, or with a lower --log-interval."
        )
    world = _WORLD_SIZE.search(text)
    return usable, len(lines) - len(usable), int(world[1]) if world else None


def _without_outliers(lines: list[LogLine]) -> list[LogLine]:
    fit, _, _ = _fit(lines)
    distances = [abs(line.milliseconds / 1e3 - fit.seconds(line.fraction)) for line in lines]
    limit = max(_OUTLIER * median(distances), 0.01 * fit.seconds(0.0))
    kept = [line for line, far in zip(lines, distances, strict=True) if far <= limit]
    enough = len(kept) >= 3 and len({line.fraction for line in kept}) >= 2
    return kept if enough else lines


def _fit(lines: list[LogLine]) -> tuple[StepTime, float, tuple[float, float, float]]:
    """Return the least-squares line, the spread around it and the covariance of its two terms."""
    count = len(lines)
    work = [line.fraction for line in lines]
    seconds = [line.milliseconds / 1e3 for line in lines]
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
