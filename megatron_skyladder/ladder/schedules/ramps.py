"""Ramps: from the start window to the final one, at a rate or over a share of the run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from megatron_skyladder.ladder.numbers import exact, whole, written
from megatron_skyladder.ladder.schedules.base import INT64_LIMIT, WindowSchedule
from megatron_skyladder.ladder.settings import SettingError, setting

STEPWISE_ROUND_TO = 1024  # Table 20: r
DEFAULT_NUM_CYCLES = 2  # up-down-up-down: the M shape
MAX_CYCLES = 10_000

# A real-valued window this close below an integer is that integer: libm differs in the last bit
# between machines (32 * 256**0.5 must be 512 on all of them), a window must not.
_INTEGER_TOLERANCE = 1e-9


class Ramp(WindowSchedule):
    """A window that grows over ``ramp_steps``; a ramp says how far it has grown.

    ``_grown`` is all integers: ``done`` of ``ramp`` units (0 <= done < ramp) lie behind, where one
    step is the ramp's denominator of units. Fractions would make a plan ten times slower.
    """

    uses = ("start_window", "alpha", "expand_fraction", "round_to")
    takes_arrays: ClassVar[bool] = True  # whether _grown takes an int64 array for ``done`` too

    def _grown(self, done: Any, ramp: int) -> Any:
        """Return the window, before rounding, when done / ramp of the ramp lies behind."""
        raise NotImplementedError

    @property
    def _num_legs(self) -> int:
        """Stretches of the ramp over which the window only grows or only shrinks."""
        return 1

    @property
    def _own_text(self) -> str:
        """The schedule's own parameters, for the fingerprint."""
        return ""

    @property
    def _span(self) -> int:
        return self.final_window - self.start_window

    @cached_property
    def ramp_steps(self) -> Fraction:
        """Steps until the final window is reached for good."""
        if self.expand_fraction is not None:
            assert self.total_steps is not None
            return exact(self.expand_fraction) * self.total_steps
        assert self.alpha is not None
        return self._span / exact(self.alpha) * self._num_legs

    def turns(self) -> Iterable[Fraction]:
        legs = self._num_legs
        return (self.ramp_steps * leg / legs for leg in range(1, legs + 1))

    @cached_property
    def _units(self) -> tuple[int, int]:
        """``ramp_steps`` as (units of the ramp, units of a step)."""
        return self.ramp_steps.numerator, self.ramp_steps.denominator

    def _window(self, step: int) -> int:
        ramp, unit = self._units
        done = step * unit
        if done >= ramp:
            return self.final_window
        return int(min(self._round(self._grown(done, ramp), self.start_window), self.final_window))

    def on_arrays(self, end: int) -> bool:
        """Return whether `windows` takes all steps before ``end`` at once, without an overflow."""
        ramp, unit = self._units
        largest = 2 * max(1, self._span) * self._num_legs * max(ramp, end * unit)
        return self.takes_arrays and largest < INT64_LIMIT

    def windows(self, first: int, end: int) -> np.ndarray:
        """Return the windows at the steps first .. end - 1, int64 [end - first]."""
        ramp, unit = self._units
        growing = range(first, max(first, min(end, -(-ramp // unit))))
        if self.on_arrays(end):
            grown = self._grown(np.arange(growing.start, growing.stop) * unit, ramp)
        else:
            grown = np.array([self._grown(step * unit, ramp) for step in growing], dtype=np.int64)
        windows = np.full(end - first, self.final_window, dtype=np.int64)
        rounded = self._round(grown, self.start_window)
        windows[: len(growing)] = np.minimum(rounded, self.final_window)
        return windows

    def describe(self) -> str:
        """Return the schedule for the fingerprint."""
        if self.alpha is not None:
            rate = f"alpha {self.alpha}"
        else:
            assert self.expand_fraction is not None
            share = written(exact(self.expand_fraction))
            rate = f"fraction {share} of {self.total_steps} steps"
        window = f"{self.schedule} {self.start_window} -> {self.final_window}"
        return f"{window}, {rate}{self._own_text}{self._rounding_text}"

    def _check(self) -> None:
        if self.start_window < 1:
            raise SettingError(
                f"$start_window={self.start_window} is not a window. "
                "Give at least 1 token, such as 32 (the paper's) or 8 (its recommendation)."
            )
        if self.start_window > self.final_window:
            raise SettingError(
                f"$start_window={self.start_window} is above the final window of "
                f"{self.final_window}. Give a smaller start, or use $schedule=reversed "
                "for a window that shrinks."
            )
        if self.alpha is not None and self.expand_fraction is not None:
            raise SettingError(
                f"$alpha={float(exact(self.alpha)):g} and $expand_fraction="
                f"{float(exact(self.expand_fraction)):g} both set the rate. "
                "Give only one of them."
            )
        if self.alpha is not None:
            self._check_alpha(exact(self.alpha))
        elif self.expand_fraction is not None:
            self._check_share(exact(self.expand_fraction))
        else:
            raise SettingError(
                f"schedule {self.schedule} has no rate. Give $alpha (tokens per step) "
                "or $expand_fraction (share of all training samples)."
            )

    def _check_alpha(self, alpha: Fraction) -> None:
        if alpha <= 0:
            raise SettingError(
                f"$alpha={float(alpha)} never reaches the final window of "
                f"{self.final_window} tokens. Give a positive rate such as 0.125 (one token "
                "every 8 steps), or $expand_fraction=0.64."
            )

    def _check_share(self, share: Fraction) -> None:
        if not 0 < share <= 1:
            raise SettingError(
                f"$expand_fraction={float(share)} is not a "
                "share of the run. Give a number above 0 and at most 1, such as 0.64."
            )
        if self.total_steps is None:
            raise SettingError(
                "an expand fraction needs the length of the run. Give $total_steps, or a rate "
                "with $alpha."
            )


@dataclass(frozen=True)
class Linear(Ramp):
    """The paper's ladder."""

    schedule: str = "linear"

    summary = "grows by the same number of tokens at every step (the default)"
    formula = "w_s + (w_e - w_s) x/T"

    def _grown(self, done: Any, ramp: int) -> Any:
        return self.start_window + self._span * done // ramp


@dataclass(frozen=True)
class Stepwise(Linear):
    """`Linear`, rounded down to multiples of 1,024 tokens where no other is given."""

    schedule: str = "stepwise"

    summary = f"linear, in steps of {STEPWISE_ROUND_TO:,} tokens or of another multiple"
    formula = "max(w_s, r floor(linear/r))"

    def __post_init__(self) -> None:
        if self.round_to is None:
            object.__setattr__(self, "round_to", STEPWISE_ROUND_TO)
        super().__post_init__()


@dataclass(frozen=True)
class Sinusoidal(Ramp):
    """A quarter of a sine wave."""

    schedule: str = "sinusoidal"

    summary = "grows fast at first and slower towards the end"
    formula = "w_s + (w_e - w_s) sin(pi/2 x/T)"
    takes_arrays = False

    def _grown(self, done: int, ramp: int) -> int:
        grown = self._span * math.sin(math.pi / 2 * (done / ramp))
        return self.start_window + math.floor(grown + _INTEGER_TOLERANCE)


@dataclass(frozen=True)
class Exponential(Ramp):
    """Grows by the same factor at every step."""

    schedule: str = "exponential"

    summary = "grows by the same factor at every step: slow at first, fast at the end"
    formula = "w_s (w_e/w_s)^(x/T)"
    takes_arrays = False

    def _grown(self, done: int, ramp: int) -> int:
        growth = self.final_window / self.start_window
        window: float = self.start_window * growth ** (done / ramp)
        return math.floor(window + _INTEGER_TOLERANCE)


@dataclass(frozen=True)
class Reversed(Ramp):
    """Long to short, then the final window."""

    schedule: str = "reversed"

    summary = "shrinks from the final window to the start window, then jumps back"
    formula = "w_e - (w_e - w_s) x/T"

    def _grown(self, done: Any, ramp: int) -> Any:
        return self.final_window - self._span * done // ramp


# --- ramps that grow more than once ---------------------------------------------------------------


@dataclass(frozen=True)
class _Cycles(Ramp):
    """Grows more than once."""

    num_cycles: int = field(
        default=DEFAULT_NUM_CYCLES,
        metadata=setting(
            read=whole,
            flag="cycles",
            metavar="N",
            help=f"how often the window grows. Default: {DEFAULT_NUM_CYCLES}.",
        ),
    )

    @property
    def _own_text(self) -> str:
        return f", {self.num_cycles} cycles"

    def _check(self) -> None:
        if not 1 <= self.num_cycles <= MAX_CYCLES:
            raise SettingError(
                f"$num_cycles={self.num_cycles}: give at least 1 cycle and at most {MAX_CYCLES:,}."
            )
        super()._check()


@dataclass(frozen=True)
class Cyclic(_Cycles):
    """Up and down: the M shape."""

    schedule: str = "cyclic"

    summary = "grows and shrinks again, several times"
    formula = "linear, up and down"

    @property
    def _num_legs(self) -> int:
        return 2 * self.num_cycles

    def _grown(self, done: Any, ramp: int) -> Any:
        position = 2 * self.num_cycles * done % (2 * ramp)  # 0..ramp up, ramp..2 * ramp down
        return self.start_window + self._span * (ramp - abs(position - ramp)) // ramp


@dataclass(frozen=True)
class CyclicJump(_Cycles):
    """Up, and back at once: the saw tooth."""

    schedule: str = "cyclic-jump"

    summary = "grows and falls back at once, several times"
    formula = "linear, and again from w_s"

    @property
    def _num_legs(self) -> int:
        return self.num_cycles

    def _grown(self, done: Any, ramp: int) -> Any:
        return self.start_window + self._span * (self.num_cycles * done % ramp) // ramp
