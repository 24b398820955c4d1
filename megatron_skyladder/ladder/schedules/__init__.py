"""How long the attention window is at a step: pure arithmetic, one class for each schedule.

A schedule is a value: it holds no counter, so step N has the same window whether the run got
there in one go, was resumed, or is only being planned. Formulas: arXiv:2503.15450, Table 20.

A class is all there is to a schedule: its formula, its parameters with their flags and help, its
checks, and the text that goes into a checkpoint's fingerprint. To add one, write such a class in
one of the files here (and a table of windows in its test): flags, ``plan``, ``compare`` and the
documentation's table follow from it. `ramps.Cyclic` is the shortest example with a parameter of
its own, `shares.Points` one that shares nothing.
"""

from megatron_skyladder.ladder.schedules.base import (
    DEFAULT_EXPAND_FRACTION,
    DEFAULT_START_WINDOW,
    FINAL_WINDOW,
    SCHEDULES,
    Rotary,
    StageValues,
    WindowSchedule,
    all_settings,
    kind_of,
    not_for,
    schedules_with,
)
from megatron_skyladder.ladder.schedules.constant import Constant
from megatron_skyladder.ladder.schedules.ramps import (
    DEFAULT_NUM_CYCLES,
    STEPWISE_ROUND_TO,
    Cyclic,
    CyclicJump,
    Exponential,
    Linear,
    Ramp,
    Reversed,
    Sinusoidal,
    Stepwise,
)
from megatron_skyladder.ladder.schedules.shares import Point, Points
from megatron_skyladder.ladder.schedules.stages import Stage, Staged

__all__ = [
    "DEFAULT_EXPAND_FRACTION",
    "DEFAULT_NUM_CYCLES",
    "DEFAULT_START_WINDOW",
    "FINAL_WINDOW",
    "SCHEDULES",
    "STEPWISE_ROUND_TO",
    "Constant",
    "Cyclic",
    "CyclicJump",
    "Exponential",
    "Linear",
    "Point",
    "Points",
    "Ramp",
    "Reversed",
    "Rotary",
    "Sinusoidal",
    "Stage",
    "StageValues",
    "Staged",
    "Stepwise",
    "WindowSchedule",
    "all_settings",
    "kind_of",
    "not_for",
    "schedules_with",
]
