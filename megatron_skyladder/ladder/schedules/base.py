"""What every schedule is: a value that knows its window at a step, and says all about itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from fractions import Fraction
from typing import Any, ClassVar, NamedTuple

import numpy as np

from megatron_skyladder.ladder.numbers import LARGEST, exact, whole
from megatron_skyladder.ladder.schedules.edges import equal_runs
from megatron_skyladder.ladder.settings import (
    Setting,
    SettingError,
    read_settings,
    setting,
    setting_of,
    shown,
)

DEFAULT_START_WINDOW = 32  # the paper's 8K setting
DEFAULT_EXPAND_FRACTION = "0.64"  # its best share under every budget
FINAL_WINDOW = -1  # in a stage or a point: stands for the final window
POWERS_OF_TWO = "pow2"  # in the place of a multiple: windows are rounded down to these
MAX_WINDOW = 2**31 - 1  # tokens; offsets into sequences are int32
INT64_LIMIT = 2**62  # products below this are safe on arrays

SCHEDULES: dict[str, type[WindowSchedule]] = {}  # in the order in which they are defined


def read_window(text: str) -> int:
    """Read a number of tokens, or final.

    Raises:
        ValueError: it is neither.
    """
    window = FINAL_WINDOW if text == "final" else whole(text)
    if window < 1 and text != "final":
        raise ValueError(f"{text!r} is not a window")
    return window


def _multiple(value: int | str) -> int | str:
    """Read a number of tokens, pow2, or auto, which needs the run's layout to be worked out."""
    try:
        return value if value in ("auto", POWERS_OF_TWO) else whole(value)
    except ValueError:
        raise ValueError(f"{value!r} is neither a number, nor auto or pow2") from None


class Rotary(NamedTuple):
    """What decides a rotary embedding. None: what Megatron's flags say."""

    base: float | None = None
    factor: float | None = None  # of YaRN


@dataclass(frozen=True)
class StageValues:
    """What a stage sets beside the window. None: nothing, it is what Megatron's flags say.

    Args:
        batch: samples in a global batch.
        rate_factor: on the learning rate that Megatron's own schedule gives.
        rope: base of the rotary embedding.
        yarn: its scaling factor, where it is YaRN's.
    """

    batch: int | None = None
    rate_factor: float | None = None
    rope: int | None = None
    yarn: float | None = None

    @property
    def rotary(self) -> Rotary:
        """What concerns the rotary embedding."""
        return Rotary(self.rope, self.yarn)


NO_VALUES = StageValues()


@dataclass(frozen=True, init=False)
class WindowSchedule:
    """The attention window, in tokens, as a function of the step.

    ``WindowSchedule("cyclic", 8, 2048, alpha=1)`` is ``Cyclic(start_window=8, final_window=2048,
    alpha=1)``: calling this class picks the schedule's own by its name. Parameters may be given as
    the text of their flags, such as ``alpha="1/8"`` or ``stages="128:0.5 final:0.5"``.

    Args:
        schedule: a key of ``SCHEDULES``.
        start_window: tokens at step 0, where the schedule uses it.
        final_window: tokens once the schedule has ended, at most the sequence length.
        alpha: tokens per step while the window grows; give this or ``expand_fraction``.
        expand_fraction: share of ``total_steps`` over which the window grows.
        total_steps: steps of the whole run; needed where shares of it are given.
        round_to: growing windows are rounded down to a multiple of this, or to a power of two
            (`POWERS_OF_TWO`), never below ``start_window``. The final window is not rounded.

    Raises:
        SettingError: a value is out of range, missing, or has no meaning for this schedule.

    Example (1B model at 8K in the paper): ``WindowSchedule(start_window=32, final_window=8192,
    alpha=0.125).window_at(8) == 33``, and 8192 from step 65,280 on.
    """

    schedule: str = "linear"
    start_window: int = field(
        default=DEFAULT_START_WINDOW,
        metadata=setting(
            read=whole,
            metavar="TOKENS",
            help=f"window at the first step. Default: {DEFAULT_START_WINDOW}; the paper recommends "
            "8.",
        ),
    )
    final_window: int = field(
        default=8192,
        metadata=setting(
            read=whole,
            metavar="TOKENS",
            help="window once the schedule has ended. Default: --seq-length.",
        ),
    )
    alpha: Fraction | float | str | None = field(
        default=None,
        metadata=setting(
            read=exact,
            metavar="RATE",
            help="growth in tokens per step of one global batch, such as 0.125 or 1/8. "
            "Instead of --skyladder-expand-fraction.",
        ),
    )
    expand_fraction: Fraction | float | str | None = field(
        default=None,
        metadata=setting(
            read=exact,
            metavar="SHARE",
            help="share of all training samples over which the window grows. Default: "
            f"{DEFAULT_EXPAND_FRACTION}.",
        ),
    )
    total_steps: int | None = None
    round_to: int | str | None = field(  # the text auto is read, and refused by the checks
        default=None,
        metadata=setting(
            read=_multiple,
            metavar="TOKENS",
            help="round growing windows down to a multiple of this; auto: one that fits kernel "
            "tiles and context-parallel chunks, 128 in most runs; pow2: to powers of two. "
            "Default: no rounding (stepwise: 1024).",
        ),
    )

    summary: ClassVar[str] = ""  # one line for the help and the documentation's table
    formula: ClassVar[str] = ""  # the window at step x of a ramp of T steps, for the same table
    uses: ClassVar[tuple[str, ...]] = ()  # which of the shared settings above mean something
    is_baseline: ClassVar[bool] = False  # a run without a ladder, which ignores a ladder's settings
    needs_run: ClassVar[bool] = False  # whether it takes ``of_run``, see `stages.Staged`

    def __new__(cls, schedule: str = "linear", *_: Any, **given: Any) -> WindowSchedule:
        if cls is not WindowSchedule:
            return object.__new__(cls)
        kind = kind_of(schedule)
        known = {each.name for each in fields(kind)}
        for name in given:
            if name not in known:
                raise SettingError(not_for(name, schedule))
        return object.__new__(kind)

    def __init_subclass__(cls) -> None:
        name = cls.__dict__.get("schedule")
        if name:
            assert name not in SCHEDULES, f"two schedules are called {name}"
            SCHEDULES[name] = cls

    def __post_init__(self) -> None:
        if self.schedule != type(self).schedule:
            raise SettingError(
                f"$schedule={shown(self.schedule)} was given to {type(self).__name__}, which is "
                f"{type(self).schedule}. Call WindowSchedule with the name."
            )
        read_settings(self)
        self._check_shared()
        self._check()

    @classmethod
    def settings(cls) -> dict[str, Setting]:
        """Return what can be set by hand in this schedule, by field."""
        shared = {each.name for each in fields(WindowSchedule)} - {"final_window", *cls.uses}
        described = {each.name: setting_of(each) for each in fields(cls)}
        return {name: it for name, it in described.items() if it and name not in shared}

    @classmethod
    def has_rate(cls) -> bool:
        """Return whether ``alpha`` or ``expand_fraction`` set how fast the window grows."""
        return "alpha" in cls.uses

    @classmethod
    def required(cls) -> tuple[str, ...]:
        """Return the settings of its own that it cannot do without."""
        shared = {each.name for each in fields(WindowSchedule)}
        return tuple(
            each.name for each in fields(cls) if each.name not in shared and each.default == ()
        )

    # --- what a schedule has to say -------------------------------------------------------------

    @property
    def ramp_steps(self) -> Fraction:
        """Steps until the final window is reached for good."""
        raise NotImplementedError

    def describe(self) -> str:
        """Return one line for logs, error messages and the checkpoint's fingerprint.

        Two schedules with the same line have the same windows, so rates and shares are exact.
        """
        raise NotImplementedError

    def _window(self, step: int) -> int:
        """Return the window at a step >= 0."""
        raise NotImplementedError

    def _check(self) -> None:
        """Raise SettingError where the schedule's own settings do not fit."""

    def turns(self) -> Iterable[Fraction]:
        """Yield the steps at which the window may turn round or jump; between them it may not."""
        return (self.ramp_steps,)

    def on_arrays(self, end: int) -> bool:
        """Return whether `windows` takes all steps before ``end`` at once, without an overflow."""
        return False

    def values_at(self, step: int) -> StageValues:
        """Return what goes with the window at a step >= 0; see `StageValues`."""
        return NO_VALUES

    def moves(self) -> set[str]:
        """Return which fields of `StageValues` it sets, at any step."""
        return set()

    def batches(self) -> list[tuple[int, int]]:
        """Return (first step, samples in a batch) where the batch changes; empty: not set here."""
        return []

    @classmethod
    def without_effect(cls, settings: Mapping[str, Any]) -> set[str]:
        """Return which of its settings mean nothing beside the others, as people give them."""
        return set()

    @classmethod
    def final_batch(cls, settings: Mapping[str, Any], first_batch: int) -> int | None:
        """Return the batch that settings as people give them end with; None: they set none."""
        return None

    # --- what everybody asks --------------------------------------------------------------------

    def window_at(self, step: int) -> int:
        """Return the window in tokens at ``step`` >= 0."""
        if step < 0:
            raise ValueError(f"step={step}: steps count from 0.")
        return self._window(step)

    def windows(self, first: int, end: int) -> np.ndarray:
        """Return the windows at the steps first .. end - 1, int64 [end - first]."""
        return np.array([self.window_at(step) for step in range(first, end)], dtype=np.int64)

    def segments(self, total_steps: int) -> list[tuple[int, int, int]]:
        """Return runs of equal windows, ``(first_step, end_step, window)``, over ``total_steps``.

        A run of a million steps with as many windows takes about a second; one of 10**12 steps
        with few windows costs what its windows cost, by bisection.
        """
        return equal_runs(self, total_steps)

    # --- checks that all share ------------------------------------------------------------------

    def _check_shared(self) -> None:
        for name in ("alpha", "expand_fraction", "round_to"):
            if name not in self.uses and getattr(self, name) is not None:
                raise SettingError(not_for(name, self.schedule))
        if not 1 <= self.final_window <= MAX_WINDOW:
            raise SettingError(
                f"$final_window={self.final_window} is not a window. Give 1 to {MAX_WINDOW} "
                "tokens, or leave it out for $seq_length."
            )
        if isinstance(self.round_to, str) and self.round_to != POWERS_OF_TWO:
            raise SettingError(
                "$round_to=auto needs the run's layout. Give a number here: aligned_multiple"
                "(seq_length, cp_size) is what auto takes."
            )
        if isinstance(self.round_to, int) and self.round_to < 1:
            raise SettingError(
                f"$round_to={self.round_to} is not a multiple. Give at least 1 token."
            )
        if self.total_steps is not None and not 1 <= self.total_steps <= LARGEST:
            raise SettingError(
                f"total_steps={self.total_steps}: a run has at least one step, at most 1e15."
            )

    def _need_total_steps(self, what: str) -> int:
        """Return the steps of the run, of which something is a share."""
        if self.total_steps is None:
            raise SettingError(f"{what} shares of the run: give $total_steps.")
        return self.total_steps

    @property
    def _rounding_text(self) -> str:
        """The rounding, for the fingerprint."""
        if self.round_to == POWERS_OF_TWO:
            return ", rounded to powers of two"
        multiple = self.multiple
        return f", rounded to {multiple}" if multiple > 1 else ""

    @property
    def multiple(self) -> int:
        """What growing windows are multiples of; 1 where they are powers of two."""
        return self.round_to if isinstance(self.round_to, int) else 1

    def _round(self, window: Any, lowest: int) -> Any:
        """Round a growing window, an integer or an array, down."""
        if self.round_to == POWERS_OF_TWO:
            rounded = _power_of_two(window)
        else:
            rounded = window // self.multiple * self.multiple
        return (
            np.maximum(rounded, lowest) if isinstance(window, np.ndarray) else max(rounded, lowest)
        )


def _power_of_two(window: Any) -> Any:
    """Return the largest power of two that is at most a window (>= 1), an integer or an array."""
    if isinstance(window, np.ndarray):
        return np.left_shift(1, np.frexp(window)[1].astype(np.int64) - 1)
    return 1 << (int(window).bit_length() - 1)


def kind_of(name: str) -> type[WindowSchedule]:
    """Return the schedule of this name.

    Raises:
        SettingError: there is none.
    """
    if name not in SCHEDULES:
        raise SettingError(
            f"$schedule={shown(name)} is unknown. Choose one of: {', '.join(SCHEDULES)}."
        )
    return SCHEDULES[name]


def schedules_with(name: str) -> list[str]:
    """Return the schedules that have this setting."""
    return [schedule for schedule, kind in SCHEDULES.items() if name in kind.settings()]


def all_settings() -> dict[str, Setting]:
    """Return what can be set by hand in any schedule, by field, in the order of their flags."""
    found = {name: it for kind in SCHEDULES.values() for name, it in kind.settings().items()}
    shared = [each.name for each in fields(WindowSchedule) if each.name in found]
    return {name: found[name] for name in dict.fromkeys([*shared, *found])}


def not_for(name: str, schedule: str) -> str:
    """Return why a setting cannot be given to a schedule; a template."""
    having = schedules_with(name)
    if not having:
        known = ", ".join(all_settings())
        return f"{shown(name)} is no setting of a schedule. There are: {known}."
    if name in (each.name for each in fields(WindowSchedule)):
        return f"${name} has no meaning with $schedule={schedule}. Leave it out."
    return (
        f"${name} is for $schedule={' or '.join(having)}, but the schedule is {schedule}. "
        "Drop one of the two."
    )
