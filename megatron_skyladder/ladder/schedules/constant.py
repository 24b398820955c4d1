"""No ladder."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from megatron_skyladder.ladder.schedules.base import WindowSchedule


@dataclass(frozen=True)
class Constant(WindowSchedule):
    """The final window from the first step on."""

    schedule: str = "constant"

    summary = "the final window from the first step on: the baseline"
    formula = "w_e"
    is_baseline = True

    @property
    def ramp_steps(self) -> Fraction:
        """Steps until the final window is reached: none."""
        return Fraction(0)

    def describe(self) -> str:
        """Return the schedule for the fingerprint."""
        return f"constant {self.final_window}"

    def _window(self, step: int) -> int:
        return self.final_window

    def on_arrays(self, end: int) -> bool:
        """Return whether `windows` takes all steps at once: yes."""
        return True

    def windows(self, first: int, end: int) -> np.ndarray:
        """Return the windows at the steps first .. end - 1, int64 [end - first]."""
        return np.full(end - first, self.final_window, dtype=np.int64)
