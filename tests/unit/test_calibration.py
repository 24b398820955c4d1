"""Step times out of a log: the format Megatron prints, exact data, noise, and useless logs."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from megatron_skyladder.calibration import calibrate, parse

# Two lines of Megatron 0.19's console, as they are.
LOG = """\
using world size: 8, data-parallel size: 4, context-parallel size: 1, tensor-model-parallel
 [2026-11-23 06:51:53.080908] iteration       38/      40 | consumed samples:           76 | \
elapsed time per iteration (ms): 3758.1 | throughput per GPU (TFLOP/s/GPU): 41.7 | \
learning rate: 5.000000E-05 | global batch size:     2 | skyladder/window: 1.024000E+03 | \
skyladder/attention_fraction: 5.002440E-01 | lm loss: 2.419728E+00 | loss scale: 1.0 |
[after training is done] datetime: 2026-11-23 06:52:01.990726
 [2026-11-23 06:51:56.503907] iteration       39/      40 | consumed samples:           78 | \
elapsed time per iteration (ms): 3422.9 | learning rate: 2.500000E-05 | \
global batch size:     2 | lm loss: 2.411035E+00 |
"""


def log_line(iteration: int, milliseconds: float, fraction: float, *, batch: int = 8) -> str:
    return (
        f" [2026-11-23 06:51:53] iteration {iteration:8d}/    1000 | "
        f"elapsed time per iteration (ms): {milliseconds:.1f} | global batch size: {batch:5d} | "
        f"skyladder/window: {8192 * fraction:.6E} | skyladder/attention_fraction: {fraction:.6E} |"
    )


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_a_line_of_megatrons_console() -> None:
    (line,) = parse(LOG)  # the second has no window: another run's, or SkyLadder is off
    assert line.iteration == 38
    assert line.milliseconds == 3758.1
    assert line.batch == 2
    assert line.window == 1024
    assert line.fraction == pytest.approx(0.500244)


def test_an_exact_log_gives_its_two_parts_back(tmp_path: Path) -> None:
    """600 ms whatever the window, 400 ms for full attention; the first line is compilation."""
    lines = [log_line(1, 9000, 0.1)]
    lines += [log_line(step, 600 + 400 * step / 20, step / 20) for step in range(2, 21)]
    found = calibrate(write(tmp_path / "log", ["using world size: 8, data", *lines]))
    assert found.step_time.fixed == pytest.approx(0.6, abs=1e-4)
    assert found.step_time.attention == pytest.approx(0.4, abs=1e-4)
    assert found.spread == pytest.approx(0, abs=1e-4)
    assert (found.num_lines, found.num_dropped, found.num_windows) == (19, 1, 19)
    assert (found.batch, found.num_gpus) == (8, 8)


def test_a_line_stands_for_its_whole_interval(tmp_path: Path) -> None:
    """Logged every 10 steps: times are means over the steps, windows those of the last one."""

    def mean(last: int) -> float:
        return sum(600 + 400 * step / 100 for step in range(last - 9, last + 1)) / 10

    lines = [log_line(last, mean(last), last / 100) for last in range(10, 101, 10)]
    found = calibrate(write(tmp_path / "log", lines))
    assert found.step_time.fixed == pytest.approx(0.6, abs=1e-3)
    assert found.step_time.attention == pytest.approx(0.4, abs=1e-3)
    assert found.num_gpus is None


def test_first_lines_after_each_start_and_outliers_are_left_out(tmp_path: Path) -> None:
    lines = [log_line(1, 9000, 0.05)]
    lines += [log_line(step, 600 + 20 * step, step / 20) for step in range(2, 12)]
    lines += [log_line(8, 9000, 0.4)]  # restarted from a checkpoint of step 7
    lines += [log_line(step, 600 + 20 * step, step / 20) for step in range(9, 20)]
    lines += [log_line(20, 30_000, 1.0)]  # waited for a checkpoint to be written
    found = calibrate(write(tmp_path / "log", lines))
    assert found.step_time.fixed == pytest.approx(0.6, abs=1e-4)
    assert found.step_time.attention == pytest.approx(0.4, abs=1e-4)
    assert found.num_dropped == 3


def test_other_batch_sizes_are_left_out(tmp_path: Path) -> None:
    lines = [log_line(step, 100, step / 20, batch=4) for step in range(1, 6)]
    lines += [log_line(step, 600 + 20 * step, step / 20) for step in range(6, 20)]
    found = calibrate(write(tmp_path / "log", lines))
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
        found = calibrate(write(tmp_path / "log", lines))
        error = found.saved_error(0.64)
        assert 0 < error < 0.01
        assert 0.010 < found.spread < 0.030
        covered += abs(found.step_time.saved(0.64) - truth) <= 2 * error
    assert covered >= 34


def test_error_of_the_saving_by_hand(tmp_path: Path) -> None:
    """saved = (1 - f) b / (a + b): its derivatives, against small changes of a and b."""
    noise = random.Random(1)
    lines = [log_line(i, 600 + 20 * i + noise.gauss(0, 10), i / 20) for i in range(1, 21)]
    found = calibrate(write(tmp_path / "log", lines))
    fixed, attention = found.step_time.fixed, found.step_time.attention
    step = 1e-6

    def saved(a: float, b: float) -> float:
        return 0.5 * b / (a + b)

    by_fixed = (saved(fixed + step, attention) - saved(fixed, attention)) / step
    by_attention = (saved(fixed, attention + step) - saved(fixed, attention)) / step
    var_fixed, var_attention, both = found.covariance
    variance = by_fixed**2 * var_fixed + by_attention**2 * var_attention
    variance += 2 * by_fixed * by_attention * both
    assert found.saved_error(0.5) == pytest.approx(math.sqrt(variance), rel=1e-3)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["nothing here"], "has no line with 'elapsed time per iteration"),
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
        calibrate(write(tmp_path / "run.log", lines))
