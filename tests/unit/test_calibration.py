"""Step times out of a log: the format Megatron prints, exact data, noise, and useless logs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_skyladder.planning.calibration import calibrate
from megatron_skyladder.planning.time_model import TimeModel
from megatron_skyladder.report.runlog import read_run


def log_line(iteration: int, milliseconds: float, fraction: float, *, batch: int = 8) -> str:
    return (
        f" [2026-11-23 06:51:53] iteration {iteration:8d}/    1000 | "
        f"elapsed time per iteration (ms): {milliseconds:.1f} | global batch size: {batch:5d} | "
        f"skyladder/window: {8192 * fraction:.6E} | skyladder/attention_fraction: {fraction:.6E} |"
    )


def started(times: Sequence[tuple[int, float, float]]) -> list[str]:
    """Return the log of one attempt: its first iteration takes 9 s, and is in two lines' means."""
    (first, _, fraction), (second, milliseconds, later), *rest = times
    lines = [
        "------------------------ arguments ------------------------",
        log_line(first, 9000, fraction),
        log_line(second, (9000 + milliseconds) / 2, later),
    ]
    return lines + [log_line(*time) for time in rest]


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_an_exact_log_gives_its_two_parts_back(tmp_path: Path) -> None:
    """600 ms whatever the window, 400 ms for full attention; the first line is compilation."""
    lines = started([(step, 600 + 400 * step / 20, step / 20) for step in range(1, 21)])
    found = calibrate(read_run(write(tmp_path / "log", ["using world size: 8, data", *lines])))
    assert found.step_time.fixed == pytest.approx(0.6, abs=1e-4)
    assert found.step_time.attention == pytest.approx(0.4, abs=1e-4)
    assert found.spread == pytest.approx(0, abs=1e-4)
    assert (found.num_lines, found.num_dropped, found.num_windows) == (19, 1, 19)
    assert (found.batch, found.num_gpus) == (8, 8)


def test_the_folder_of_a_slurm_run(tmp_path: Path) -> None:
    """Rank 0 has the world size, the last rank the lines; two attempts."""
    times = [(step, 600 + 400 * step / 20, step / 20) for step in range(1, 21)]
    for attempt, (head, *lines) in (("001", started(times[:12])), ("002", started(times[10:]))):
        folder = tmp_path / "attempts" / attempt
        folder.mkdir(parents=True)
        write(folder / "rank.0000.log", ["using world size: 8, data", head])
        write(folder / "rank.0007.log", lines)
    found = calibrate(read_run(tmp_path))
    assert found.num_gpus == 8
    assert found.step_time.fixed == pytest.approx(0.6, abs=1e-4)
    assert found.step_time.attention == pytest.approx(0.4, abs=1e-4)


def test_a_line_stands_for_its_whole_interval(tmp_path: Path) -> None:
    """Logged every 10 steps: times are means over the steps, windows those of the last one."""

    def mean(last: int) -> float:
        return sum(600 + 400 * step / 100 for step in range(last - 9, last + 1)) / 10

    lines = [log_line(last, mean(last), last / 100) for last in range(10, 101, 10)]
    found = calibrate(read_run(write(tmp_path / "log", lines)))
    assert found.step_time.fixed == pytest.approx(0.6, abs=1e-3)
    assert found.step_time.attention == pytest.approx(0.4, abs=1e-3)
    assert found.num_gpus is None


def test_slow_first_lines_and_outliers_are_left_out(tmp_path: Path) -> None:
    times = [(step, 600 + 20 * step, step / 20) for step in range(1, 20)]
    lines = started(times[:11]) + started(times[7:])  # started again after step 7
    lines += [log_line(20, 30_000, 1.0)]  # waited for a checkpoint to be written
    found = calibrate(read_run(write(tmp_path / "log", lines)))
    assert found.step_time.fixed == pytest.approx(0.6, abs=1e-4)
    assert found.step_time.attention == pytest.approx(0.4, abs=1e-4)
    assert found.num_dropped == 3


def test_attempts_on_other_gpus_are_left_out(tmp_path: Path) -> None:
    """Steps on half of the GPUs took twice the time; the fit is of the last attempt's."""
    slow = [(i, 2 * (600 + 40 * i), i / 10) for i in range(1, 11)]
    fast = [(i, 600 + 40 * (i - 10), (i - 10) / 10) for i in range(11, 21)]
    size = "using world size: {}, data-parallel size: 1"
    lines = [size.format(4), *started(slow), size.format(8), *started(fast)]
    found = calibrate(read_run(write(tmp_path / "log", lines)))
    assert found.num_gpus == 8 and found.num_lines < 10
    assert found.step_time.fixed == pytest.approx(0.6, abs=1e-3)
    assert found.step_time.attention == pytest.approx(0.4, abs=1e-3)


def test_other_batch_sizes_are_left_out(tmp_path: Path) -> None:
    lines = [log_line(step, 300 + 10 * step, step / 40, batch=4) for step in range(1, 20)]
    lines += [log_line(step, 600 + 10 * step, step / 40) for step in range(20, 40)]
    found = calibrate(read_run(write(tmp_path / "log", lines)))
    assert found.batch == 8
    assert found.step_time.attention == pytest.approx(0.4, abs=1e-4)


def test_the_stated_spread_covers_the_truth(tmp_path: Path) -> None:
    """Noise of 20 ms on 600 + 400: two standard errors hold the true saving in most logs."""
    truth = 0.4 * (1 - 0.64)
    covered = 0
    for seed in range(40):
        noise = random.Random(seed)
        lines = [
            log_line(step, 600 + 400 * step / 50 + noise.gauss(0, 20), step / 50)
            for step in range(1, 51)
        ]
        found = calibrate(read_run(write(tmp_path / "log", lines)))
        error = found.saved_error(0.64, 1.0)
        assert 0 < error < 0.01
        assert 0.010 < found.spread < 0.030
        covered += abs(found.step_time.saved(0.64) - truth) <= 2 * error
    assert covered >= 34


@pytest.mark.parametrize(("fraction", "baseline"), [(0.5, 1.0), (0.3, 0.4), (0.4, 0.4)])
def test_error_of_the_saving_by_hand(tmp_path: Path, fraction: float, baseline: float) -> None:
    """Against fits drawn by their covariance: how far apart are the savings they give?"""
    noise = random.Random(1)
    lines = [log_line(i, 600 + 20 * i + noise.gauss(0, 10), i / 20) for i in range(1, 21)]
    found = calibrate(read_run(write(tmp_path / "log", lines)))
    mean = (found.step_time.fixed, found.step_time.attention)
    var_fixed, var_attention, both = found.covariance
    matrix = [[var_fixed, both], [both, var_attention]]
    fits = np.random.default_rng(2).multivariate_normal(mean, matrix, size=20_000)
    savings = [
        1 - (fixed + attention * fraction) / (fixed + attention * baseline)
        for fixed, attention in fits
    ]
    spread = float(np.std(savings))
    assert (spread > 0) == (fraction != baseline)
    assert found.saved_error(fraction, baseline) == pytest.approx(spread, rel=0.03)


def test_the_range_is_that_of_the_runs_own_baseline(tmp_path: Path) -> None:
    """Documents leave 40 % of the work, the ladder 30 %: the range is around what that saves."""
    noise = random.Random(1)
    lines = [log_line(i, 600 + 20 * i + noise.gauss(0, 10), i / 20) for i in range(1, 21)]
    found = calibrate(read_run(write(tmp_path / "log", lines)))
    time = TimeModel(found.step_time, (found.step_time,), found, None, None, "log")
    low, high = time.saved_range(0.3, 0.4)
    assert (low + high) / 2 == pytest.approx(found.step_time.saved(0.3, 0.4))
    assert high - low == pytest.approx(4 * found.saved_error(0.3, 0.4))
    assert high - low < 0.3 * 4 * found.saved_error(0.3, 1.0)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["nothing here"], "no training line of Megatron"),
        (
            [" iteration 1/ 9 | elapsed time per iteration (ms): 600.0 | global batch size: 8 |"],
            "says nothing about windows",
        ),
        (
            [log_line(step, 600, 0.5) for step in range(1, 9)],
            "has 7 usable lines with 1 window lengths",
        ),
        (
            [log_line(step, 600, step / 20) for step in range(1, 4)],
            "has 2 usable lines with 2 window lengths",
        ),
        (
            [log_line(step, 900 - 20 * step, step / 20) for step in range(1, 20)],
            "steps do not get slower with the window",
        ),
    ],
)
def test_useless_logs_are_refused(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate(read_run(write(tmp_path / "run.log", lines)))
