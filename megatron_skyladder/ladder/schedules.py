"""How long the attention window is at a step: pure arithmetic, nothing but the standard library.

A schedule is a value: it holds no counter, so step N has the same window whether the run got
there in one go, was resumed, or is only being planned. Formulas: arXiv:2503.15450, Table 20.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from megatron_skyladder.errors import UsageError

STEPWISE_ROUND_TO = 1024  # Table 20: r
FINAL_WINDOW = -1  # in a stage: stands for the final window until that is known
DEFAULT_NUM_CYCLES = 2  # up-down-up-down: the M shape
KERNEL_TILE = 128  # tokens: attention kernels work on blocks of this many queries and keys

# A real-valued window this close below an integer is that integer: libm differs in the last bit
# between machines (32 * 256**0.5 must be 512 on all of them), a window must not.
_INTEGER_TOLERANCE = 1e-9


def exact(value: Fraction | float | int | str) -> Fraction:
    """Return the number the user wrote: 0.1 and "1/8" are tenths and eighths, not binary floats."""
    return Fraction(str(value)) if isinstance(value, float) else Fraction(value)


def aligned_multiple(seq_length: int, cp_size: int = 1) -> int:
    """Return what windows should be multiples of; they are then rounded down by less than this.

    The largest number that divides both a kernel's tile and a context-parallel chunk (half of a
    rank's part of a row): windows, chunks and tiles then end together, and where a window crosses a
    chunk's end, the pieces on both sides are multiples of it too. 128 in most runs; 32 for rows of
    9,024 tokens on 3 ranks, whose chunks have 1,504.
    """
    chunk_length = seq_length // (2 * cp_size) if cp_size > 1 else seq_length
    return math.gcd(KERNEL_TILE, chunk_length)


def explain_multiple(seq_length: int, cp_size: int = 1) -> str:
    """Return one line on the choice of `aligned_multiple`, for the log and the plan."""
    multiple = aligned_multiple(seq_length, cp_size)
    what = f"kernel tiles of {KERNEL_TILE} tokens"
    if cp_size > 1:
        what += f" and context-parallel chunks of {seq_length // (2 * cp_size):,}"
    else:
        what += f" and rows of {seq_length:,}"
    return (
        f"--skyladder-round-to auto is {multiple}, the largest number that divides {what}: windows "
        f"end where they do, and each is at most {multiple - 1} tokens shorter than scheduled."
    )


@dataclass(frozen=True)
class Stage:
    """One window held for a share of the run."""

    window: int  # tokens, or FINAL_WINDOW until the final window is known
    share: Fraction  # of all training steps, 0 < share <= 1


@dataclass(frozen=True)
class WindowSchedule:
    """The attention window, in tokens, as a function of the step.

    Args:
        schedule: a key of ``SCHEDULES``.
        start_window: tokens at step 0.
        final_window: tokens once the schedule has ended, at most the sequence length.
        alpha: tokens per step while the window grows; give this or ``expand_fraction``.
        expand_fraction: share of ``total_steps`` over which the window grows.
        total_steps: steps of the whole run; needed with ``expand_fraction`` and ``stages``.
        round_to: growing windows are rounded down to a multiple of this, never below
            ``start_window``. The final window is not rounded.
        stages: for ``staged``: the windows and their shares of the run, in order.
        num_cycles: for ``cyclic`` and ``cyclic-jump``: how often the window grows.

    Raises:
        UsageError: a value is out of range, or the rate is missing or given twice.

    Example (1B model at 8K in the paper): ``WindowSchedule(start_window=32, final_window=8192,
    alpha=0.125).window_at(8) == 33``, and 8192 from step 65,280 on.
    """

    schedule: str = "linear"
    start_window: int = 32
    final_window: int = 8192
    alpha: Fraction | float | str | None = None
    expand_fraction: Fraction | float | str | None = None
    total_steps: int | None = None
    round_to: int | None = None
    stages: tuple[Stage, ...] = ()
    num_cycles: int = DEFAULT_NUM_CYCLES

    def __post_init__(self) -> None:
        _check(self)

    @cached_property
    def ramp_steps(self) -> Fraction:
        """Steps until the final window is reached for good; 0 for ``constant``."""
        if self.schedule == "constant":
            return Fraction(0)
        if self.schedule == "staged":
            assert self.total_steps is not None
            return sum((stage.share for stage in self.stages[:-1]), Fraction(0)) * self.total_steps
        if self.expand_fraction is not None:
            assert self.total_steps is not None
            return exact(self.expand_fraction) * self.total_steps
        assert self.alpha is not None
        return (self.final_window - self.start_window) / exact(self.alpha) * self._num_legs

    @cached_property
    def _multiple(self) -> int:
        """What growing windows are rounded down to a multiple of."""
        return self.round_to or (STEPWISE_ROUND_TO if self.schedule == "stepwise" else 1)

    @property
    def _num_legs(self) -> int:
        """Stretches of the ramp over which the window only grows or only shrinks."""
        return {"cyclic": 2 * self.num_cycles, "cyclic-jump": self.num_cycles}.get(self.schedule, 1)

    def window_at(self, step: int) -> int:
        """Return the window in tokens at ``step`` >= 0."""
        if step < 0:
            raise ValueError(f"step={step}: steps count from 0.")
        ramp, unit = self._ramp
        done = step * unit
        if done >= ramp:
            return self.final_window
        if self.schedule == "staged":
            return self._stage_at(step).window
        window = SCHEDULES[self.schedule](self, done, ramp)
        window = max(self.start_window, window // self._multiple * self._multiple)
        return min(window, self.final_window)

    @cached_property
    def _ramp(self) -> tuple[int, int]:
        """``ramp_steps`` as (numerator, denominator): a plan asks for 100,000 windows."""
        return self.ramp_steps.numerator, self.ramp_steps.denominator

    def _stage_at(self, step: int) -> Stage:
        assert self.total_steps is not None
        end = Fraction(0)
        for stage in self.stages:
            end += stage.share * self.total_steps
            if step < end:
                return stage
        return self.stages[-1]

    def segments(self, total_steps: int) -> list[tuple[int, int, int]]:
        """Return runs of equal windows, ``(first_step, end_step, window)``, over ``total_steps``.

        Found by bisection over monotone stretches, so a run of 100,000 steps with 8,000 windows
        costs what its windows cost, not what its steps cost.
        """
        if total_steps <= 0:
            return []
        runs: list[tuple[int, int, int]] = []
        for first, end in self._monotone_stretches(total_steps):
            step = first
            while step < end:
                window = self.window_at(step)
                low, high = step, end  # window_at(low) == window; high is past the run
                stride = 1
                while low + stride < high and self.window_at(low + stride) == window:
                    low += stride
                    stride *= 2
                high = min(high, low + stride)
                while high - low > 1:
                    middle = (low + high) // 2
                    if self.window_at(middle) == window:
                        low = middle
                    else:
                        high = middle
                if runs and runs[-1][2] == window:
                    runs[-1] = (runs[-1][0], high, window)
                else:
                    runs.append((step, high, window))
                step = high
        return runs

    def _monotone_stretches(self, total_steps: int) -> list[tuple[int, int]]:
        """Split 0..total_steps where the window may turn round or jump."""
        ramp = self.ramp_steps
        turns = {0, total_steps, min(total_steps, math.ceil(ramp))}
        for leg in range(1, self._num_legs):
            turns.add(min(total_steps, math.ceil(ramp * leg / self._num_legs)))
        if self.schedule == "staged" and self.total_steps is not None:
            end = Fraction(0)
            for stage in self.stages:
                end += stage.share * self.total_steps
                turns.add(min(total_steps, math.ceil(end)))
        points = sorted(turns)
        return list(itertools.pairwise(points))

    def describe(self) -> str:
        """Return one line for logs, error messages and the checkpoint's fingerprint.

        Two schedules with the same line have the same windows, so rates and shares are exact.
        """
        if self.schedule == "constant":
            return f"constant {self.final_window}"
        if self.schedule == "staged":
            stages = " ".join(f"{stage.window}:{_text(stage.share)}" for stage in self.stages)
            return f"staged {stages} of {self.total_steps} steps"
        if self.alpha is not None:
            rate = f"alpha {exact(self.alpha)}"
        else:
            assert self.expand_fraction is not None
            rate = f"fraction {_text(exact(self.expand_fraction))} of {self.total_steps} steps"
        rounding = f", rounded to {self._multiple}" if self._multiple > 1 else ""
        cycles = f", {self.num_cycles} cycles" if self.schedule.startswith("cyclic") else ""
        return (
            f"{self.schedule} {self.start_window} -> {self.final_window}, {rate}{cycles}{rounding}"
        )


def _text(share: Fraction) -> str:
    """Write 16/25 as 0.64, but 1/3 as 1/3."""
    return str(float(share)) if exact(float(share)) == share else str(share)


# One function per ramp: the window when ``done / ramp`` of it (0 <= done < ramp, exact integers)
# lies behind. Integers, because Fractions make a plan of 100,000 steps ten times slower.


def _linear(schedule: WindowSchedule, done: int, ramp: int) -> int:
    span = schedule.final_window - schedule.start_window
    return schedule.start_window + span * done // ramp


def _sinusoidal(schedule: WindowSchedule, done: int, ramp: int) -> int:
    span = schedule.final_window - schedule.start_window
    grown = span * math.sin(math.pi / 2 * (done / ramp))
    return schedule.start_window + math.floor(grown + _INTEGER_TOLERANCE)


def _exponential(schedule: WindowSchedule, done: int, ramp: int) -> int:
    growth = schedule.final_window / schedule.start_window
    return math.floor(schedule.start_window * growth ** (done / ramp) + _INTEGER_TOLERANCE)


def _reversed(schedule: WindowSchedule, done: int, ramp: int) -> int:
    span = schedule.final_window - schedule.start_window
    return schedule.final_window - span * done // ramp


def _cyclic(schedule: WindowSchedule, done: int, ramp: int) -> int:
    position = 2 * schedule.num_cycles * done % (2 * ramp)  # 0..ramp up, ramp..2 * ramp down
    return _linear(schedule, min(position, 2 * ramp - position), ramp)


def _cyclic_jump(schedule: WindowSchedule, done: int, ramp: int) -> int:
    return _linear(schedule, schedule.num_cycles * done % ramp, ramp)


def _table_lookup(schedule: WindowSchedule, done: int, ramp: int) -> int:
    raise AssertionError("constant and staged have no ramp formula")


SCHEDULES: dict[str, Callable[[WindowSchedule, int, int], int]] = {
    "constant": _table_lookup,
    "linear": _linear,
    "stepwise": _linear,  # linear, rounded down to STEPWISE_ROUND_TO
    "sinusoidal": _sinusoidal,
    "exponential": _exponential,
    "staged": _table_lookup,
    "cyclic": _cyclic,
    "cyclic-jump": _cyclic_jump,
    "reversed": _reversed,
}


def _check(schedule: WindowSchedule) -> None:
    name = schedule.schedule
    if name not in SCHEDULES:
        raise UsageError(
            f"--skyladder-schedule={name} is unknown. Choose one of: {', '.join(SCHEDULES)}."
        )
    if schedule.final_window < 1:
        raise UsageError(
            f"--skyladder-final-window={schedule.final_window} is not a window. "
            "Give at least 1 token, or leave it out for --seq-length."
        )
    if schedule.round_to is not None and schedule.round_to < 1:
        raise UsageError(
            f"--skyladder-round-to={schedule.round_to} is not a multiple. Give at least 1 token."
        )
    if schedule.total_steps is not None and schedule.total_steps < 1:
        raise UsageError(f"total_steps={schedule.total_steps}: a run has at least one step.")
    if name == "constant":
        return
    if name == "staged":
        _check_stages(schedule)
        return
    if schedule.stages:
        raise UsageError(
            f"--skyladder-stages is for --skyladder-schedule=staged, but the schedule is {name}. "
            "Drop one of the two."
        )
    if schedule.start_window < 1:
        raise UsageError(
            f"--skyladder-start-window={schedule.start_window} is not a window. "
            "Give at least 1 token, such as 32 (the paper's) or 8 (its recommendation)."
        )
    if schedule.start_window > schedule.final_window:
        raise UsageError(
            f"--skyladder-start-window={schedule.start_window} is above the final window of "
            f"{schedule.final_window}. Give a smaller start, or use --skyladder-schedule=reversed "
            "for a window that shrinks."
        )
    if name in ("cyclic", "cyclic-jump") and schedule.num_cycles < 1:
        raise UsageError(f"--skyladder-cycles={schedule.num_cycles}: give at least 1 cycle.")
    _check_rate(schedule)


def _check_rate(schedule: WindowSchedule) -> None:
    if schedule.alpha is not None and schedule.expand_fraction is not None:
        raise UsageError(
            f"--skyladder-alpha={float(exact(schedule.alpha)):g} and --skyladder-expand-fraction="
            f"{float(exact(schedule.expand_fraction)):g} both set the rate. Give only one of them."
        )
    if schedule.alpha is None and schedule.expand_fraction is None:
        raise UsageError(
            f"schedule {schedule.schedule} has no rate. Give --skyladder-alpha (tokens per step) "
            "or --skyladder-expand-fraction (share of all training samples)."
        )
    if schedule.alpha is not None and exact(schedule.alpha) <= 0:
        raise UsageError(
            f"--skyladder-alpha={float(exact(schedule.alpha))} never reaches the final window of "
            f"{schedule.final_window} tokens. Give a positive rate such as 0.125 (one token "
            "every 8 steps), or --skyladder-expand-fraction=0.64."
        )
    if schedule.expand_fraction is not None:
        if not 0 < exact(schedule.expand_fraction) <= 1:
            raise UsageError(
                f"--skyladder-expand-fraction={float(exact(schedule.expand_fraction))} is not a "
                "share of the run. Give a number above 0 and at most 1, such as 0.64."
            )
        if schedule.total_steps is None:
            raise UsageError(
                "an expand fraction needs the length of the run. Give total_steps "
                "(--train-samples or --train-iters), or a rate with --skyladder-alpha."
            )


def _check_stages(schedule: WindowSchedule) -> None:
    if not schedule.stages:
        raise UsageError(
            "--skyladder-schedule=staged needs --skyladder-stages WINDOW:SHARE ..., for example "
            "--skyladder-stages 128:0.5 2048:0.5."
        )
    if schedule.total_steps is None:
        raise UsageError(
            "stages are shares of the run: give total_steps (--train-samples or --train-iters)."
        )
    for stage in schedule.stages:
        if not 1 <= stage.window <= schedule.final_window:
            raise UsageError(
                f"--skyladder-stages has a window of {stage.window}. "
                f"Windows lie between 1 and the final window of {schedule.final_window}."
            )
        if stage.share <= 0:
            raise UsageError(
                f"--skyladder-stages gives the window {stage.window} a share of "
                f"{float(stage.share):g}. Shares are above 0."
            )
    total = sum(stage.share for stage in schedule.stages)
    if total != 1:
        raise UsageError(
            f"the shares of --skyladder-stages add up to {float(total):g}. They have to add up "
            "to 1: each is a share of the whole run."
        )
    if schedule.stages[-1].window != schedule.final_window:
        raise UsageError(
            f"the last of --skyladder-stages is {schedule.stages[-1].window}, but the final window "
            f"is {schedule.final_window}. Make them equal (--skyladder-final-window)."
        )
