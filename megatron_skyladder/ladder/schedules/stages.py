"""One table for a run: stages of window, batch, learning rate and RoPE, one after the other.

A stage is a word, or a section of an .ini file:

    4096:0.4                            a window of 4,096 for 40 % of the run
    4096..32768:20B,batch=x2,lr=sqrt    grown over 20B tokens; twice the batch, rate x sqrt 2
    final:rest,rope=1000000             the final window to the end, with another RoPE base

What a stage leaves out goes on as it was. Everything is a function of the step, so all of it
changes with the same global batch, on every rank.
"""

from __future__ import annotations

import configparser
import itertools
import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np

from megatron_skyladder.ladder.numbers import exact, whole, written
from megatron_skyladder.ladder.schedules.base import (
    FINAL_WINDOW,
    INT64_LIMIT,
    StageValues,
    read_window,
)
from megatron_skyladder.ladder.schedules.shares import GivenWindows
from megatron_skyladder.ladder.settings import SettingError, setting

MAX_STAGES = 1000  # all of them are in the fingerprint
AS_BEFORE = -2  # in the place of a stage's first window: the one that the stage before ended with
SQRT = "sqrt"  # in the place of a rate factor: it follows the root of the batch
REST = "rest"
_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12, "TOKENS": 1}  # Megatron's, and one
_TOKENS = re.compile(r"([\d.]+)(K|M|B|T|tokens)", re.IGNORECASE)
_KEYS = ("batch", "lr", "rope", "yarn")
_FILE_KEYS = ("window", "share", "tokens", *_KEYS)


@dataclass(frozen=True)
class Stage:
    """A part of the run. None: as in the stage before.

    Args:
        window: tokens, or FINAL_WINDOW; where it grows, that of its end.
        share: of all training steps, 0 < share <= 1; None: given in tokens, or the rest.
        first_window: tokens at its beginning, or AS_BEFORE; None: the window is held.
        tokens: its length, where it is not a share.
        batch: samples in a global batch, or text such as x2: times the stage before.
        squared_rate: the square of the factor on the learning rate, so that roots are exact; or
            SQRT: times the batch relative to the stage before.
        rope: base of the rotary embedding.
        yarn: its scaling factor, where it is YaRN's.
    """

    window: int
    share: Fraction | None = None
    first_window: int | None = None
    tokens: int | None = None
    batch: int | str | None = None
    squared_rate: Fraction | str | None = None
    rope: int | None = None
    yarn: Fraction | None = None

    def __str__(self) -> str:
        """Return the stage as it is given on a command line."""
        window = "final" if self.window == FINAL_WINDOW else str(self.window)
        if self.first_window is not None:
            first = "" if self.first_window == AS_BEFORE else self.first_window
            window = f"{first}..{window}"
        if self.share is not None:
            extent = written(self.share)
        else:
            extent = REST if self.tokens is None else f"{self.tokens}tokens"
        words = [f"{window}:{extent}"]
        if self.batch is not None:
            words.append(f"batch={self.batch}")
        if self.squared_rate is not None:
            words.append(f"lr={_written_rate(self.squared_rate)}")
        if self.rope is not None:
            words.append(f"rope={self.rope}")
        if self.yarn is not None:
            words.append(f"yarn={_written(self.yarn)}")
        return ",".join(words)

    @property
    def values(self) -> StageValues:
        """What it sets beside the window; of a resolved stage."""
        assert not isinstance(self.batch, str) and not isinstance(self.squared_rate, str)
        rate = None if self.squared_rate is None else _root(self.squared_rate)
        yarn = None if self.yarn is None else float(self.yarn)
        return StageValues(self.batch, rate, self.rope, yarn)


# --- reading --------------------------------------------------------------------------------------


def _read_stages(given: Stage | str) -> tuple[Stage, ...]:
    """Read WINDOW:SHARE and what follows, or a file of stages."""
    if isinstance(given, Stage):
        return (given,)
    if given.endswith(".ini"):
        return _read_file(given)
    place, *settings = given.split(",")
    window, _, extent = place.partition(":")
    try:
        first, last = _windows(window)
        share, tokens = _extent(extent)
    except ValueError:
        raise ValueError(
            f"{given!r} is not WINDOW:SHARE, such as 128:0.5, 128..2048:0.5, final:20B (tokens) or "
            "final:rest"
        ) from None
    pairs = [setting.partition("=")[::2] for setting in settings]
    return (Stage(last, share, first, tokens, **_settings(pairs, given)),)


def _windows(text: str) -> tuple[int | None, int]:
    """Read 4096, final, 32..4096 or ..4096: the first window and the last."""
    first, grows, last = text.partition("..")
    if not grows:
        return None, read_window(text)
    return (read_window(first) if first else AS_BEFORE), read_window(last)


def _extent(text: str) -> tuple[Fraction | None, int | None]:
    """Read a share of the run, a number of tokens such as 20B, or rest."""
    if text == REST:
        return None, None
    tokens = _TOKENS.fullmatch(text)
    if tokens is None:
        return exact(text), None
    number = exact(tokens[1]) * _UNITS[tokens[2].upper()]
    if number.denominator != 1 or number < 1:
        raise ValueError(f"{text!r} is no whole number of tokens")
    return None, whole(int(number))


def _settings(pairs: Iterable[tuple[str, str]], given: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key not in _KEYS:
            raise ValueError(
                f"{given!r} sets {key or 'nothing'}: behind WINDOW:SHARE there may be "
                "batch=SAMPLES, lr=FACTOR, rope=BASE and yarn=FACTOR, each after a comma"
            )
        name = "squared_rate" if key == "lr" else key
        if name in found:
            raise ValueError(f"{given!r} sets {key} twice")
        try:
            found[name] = _READ[key](value)
        except ValueError:
            raise ValueError(f"{given!r}: {key}={value} is not {_EXPECTED[key]}") from None
    return found


def _read_batch(text: str) -> int | str:
    if text.startswith("x"):
        if exact(text[1:]) <= 0:
            raise ValueError(text)
        return text
    return _at_least(1, text)


def _read_rate(text: str) -> Fraction | str:
    """Read sqrt, a factor, or the root of a number (2^0.5); return the factor's square."""
    if text == SQRT:
        return text
    number, root, power = text.partition("^")
    factor = exact(number)
    if factor <= 0 or (root and power != "0.5"):
        raise ValueError(text)
    return factor if root else factor**2


def _at_least(lowest: int, text: str) -> int:
    number = whole(text)
    if number < lowest:
        raise ValueError(text)
    return number


def _read_base(text: str) -> int:
    return _at_least(2, text)


def _read_yarn(text: str) -> Fraction:
    factor = exact(text)
    if factor < 1:
        raise ValueError(text)
    return factor


_READ: dict[str, Callable[[str], Any]] = {
    "batch": _read_batch,
    "lr": _read_rate,
    "rope": _read_base,
    "yarn": _read_yarn,
}
_EXPECTED = {
    "batch": "a number of samples, such as 256, or x2 for twice the batch before",
    "lr": "a factor on the learning rate, such as 0.5, 2^0.5, or sqrt for the root of the batch's",
    "rope": "a base of the rotary embedding, such as 500000",
    "yarn": "a scaling factor of YaRN, 1 or more, such as 4",
}


def _read_file(path: str) -> tuple[Stage, ...]:
    """Read an .ini file with a section for each stage, in their order; the names are free."""
    parser = configparser.ConfigParser(interpolation=None)
    try:
        with open(path, encoding="utf-8-sig") as file:
            parser.read_file(file)
    except (OSError, UnicodeDecodeError, configparser.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise ValueError(f"{path!r} cannot be read: {reason}") from None
    if not parser.sections():
        raise ValueError(f"{path!r} has no stages. Give sections with a window and a share")
    stages: list[Stage] = []
    for name in parser.sections():
        try:
            stages += _read_stages(_word(parser[name]))
        except ValueError as error:
            raise ValueError(f"{path!r}, [{name}]: {error}") from None
    return tuple(stages)


def _word(section: Mapping[str, str]) -> str:
    """Return a section of a file as a word of a command line."""
    unknown = [key for key in section if key not in _FILE_KEYS]
    if unknown:
        raise ValueError(f"{unknown[0]} is no setting. There are: {', '.join(_FILE_KEYS)}")
    extents = [key for key in ("share", "tokens") if key in section]
    if "window" not in section or len(extents) != 1:
        raise ValueError("give a window, and either a share of the run or tokens")
    extent = section[extents[0]].strip()
    if extents == ["tokens"] and extent != REST and not extent[-1:].isalpha():
        extent += "tokens"
    settings = [f"{key}={section[key].strip()}" for key in _KEYS if key in section]
    return ",".join([f"{section['window'].strip()}:{extent}", *settings])


def _root(square: Fraction) -> float:
    """Return the root: exact where it is a fraction, else rounded once, alike on all machines."""
    exact_root = _exact_root(square)
    return math.sqrt(square) if exact_root is None else float(exact_root)


def _exact_root(square: Fraction) -> Fraction | None:
    root = Fraction(math.isqrt(square.numerator), math.isqrt(square.denominator))
    return root if root**2 == square else None


def _written_rate(squared_rate: Fraction | str) -> str:
    if isinstance(squared_rate, str):
        return squared_rate
    root = _exact_root(squared_rate)
    return f"{_written(squared_rate)}^0.5" if root is None else _written(root)


def _written(number: Fraction) -> str:
    return written(number).removesuffix(".0")


# --- the schedule ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Staged(GivenWindows):
    """One stage after the other.

    Args:
        of_run: what stages in tokens and batches relative to the run's first are measured with:
            ``step_samples``, ``seq_length`` and ``first_batch``. Gone once the stages are resolved,
            so that two schedules of the same stages are equal.
    """

    schedule: str = "staged"
    stages: tuple[Stage, ...] = field(
        default=(),
        metadata=setting(
            read=_read_stages,
            several=True,
            metavar="WINDOW:SHARE",
            help="windows with their shares of the run, such as 128:0.5 final:0.5. A window may "
            "grow (128..2048:0.3), a share may be tokens (20B) or the rest, and after commas a "
            "stage may set batch=256 (or x2), lr=0.5 (a factor; sqrt: the batch's root), "
            "rope=500000 and yarn=4 (YaRN's factor); or an .ini file with a section for each "
            "stage.",
        ),
    )
    of_run: Any = None

    summary = "holds or grows one given window after the other; may move batch, rate and RoPE too"
    formula = "the stage's window"
    uses = ("round_to",)
    needs_run = True

    @classmethod
    def without_effect(cls, settings: Mapping[str, Any]) -> set[str]:
        """Return which of its settings mean nothing beside the others, as people give them."""
        return set() if _any(_of_settings(settings), "first_window") else {"round_to"}

    @classmethod
    def final_batch(cls, settings: Mapping[str, Any], first_batch: int) -> int | None:
        """Return the batch that settings as people give them end with; None: they set none."""
        stages = _of_settings(settings)
        return _batches(stages, first_batch)[-1] if _any(stages, "batch") else None

    @cached_property
    def _starts(self) -> list[Fraction]:
        """The step at which each stage begins, in steps."""
        total = self._need_total_steps("stages are")
        shares = itertools.accumulate(
            (stage.share or Fraction(0) for stage in self.stages[:-1]), initial=Fraction(0)
        )
        return [share * total for share in shares]

    @cached_property
    def first_steps(self) -> list[int]:
        """The first step of each stage."""
        return [math.ceil(start) for start in self._starts]

    @property
    def ramp_steps(self) -> Fraction:
        """Steps before the last stage; all of them where it grows."""
        if self.stages[-1].first_window is not None:
            return Fraction(self._need_total_steps("stages are"))
        return self._starts[-1]

    def turns(self) -> Iterable[Fraction]:
        return self._starts

    def stage_at(self, step: int) -> Stage:
        """Return the stage of a step >= 0."""
        return self.stages[bisect_right(self._starts, step) - 1]

    def values_at(self, step: int) -> StageValues:
        """Return what the stage of a step sets beside the window."""
        return self.stage_at(step).values

    def moves(self) -> set[str]:
        """Return which fields of `StageValues` it sets, at any step."""
        values = [vars(stage.values) for stage in self.stages]
        return {name for each in values for name, value in each.items() if value is not None}

    def _window(self, step: int) -> int:
        at = bisect_right(self._starts, step) - 1
        stage = self.stages[at]
        if stage.first_window is None or step >= self._lasts:
            return stage.window
        (begin, end), unit = self._places[at], self._unit
        way = (stage.window - stage.first_window) * (step * unit - begin) // (end - begin)
        return int(self._round(stage.first_window + way, min(stage.first_window, stage.window)))

    @cached_property
    def _lasts(self) -> int:
        """The steps of the run: behind them the last window stays."""
        return self._need_total_steps("stages are")

    @cached_property
    def _unit(self) -> int:
        """Parts of a step, of which every stage begins and ends with a whole number."""
        return math.lcm(*(start.denominator for start in self._starts))

    @cached_property
    def _places(self) -> list[tuple[int, int]]:
        """Where each stage begins and ends, in these parts."""
        ends = [*self._starts[1:], Fraction(self._lasts)]
        return [
            (int(start * self._unit), int(end * self._unit))
            for start, end in zip(self._starts, ends, strict=True)
        ]

    def on_arrays(self, end: int) -> bool:
        """Return whether `windows` takes all steps before ``end`` at once, without an overflow."""
        return self.final_window * max(end, self._lasts) * self._unit < INT64_LIMIT

    def windows(self, first: int, end: int) -> np.ndarray:
        """Return the windows at the steps first .. end - 1, int64 [end - first]."""
        if not self.on_arrays(end):
            return super().windows(first, end)
        found = np.full(end - first, self.stages[-1].window, dtype=np.int64)
        edges = [*self.first_steps, self._lasts]
        for stage, (begin, stop), places in zip(
            self.stages, itertools.pairwise(edges), self._places, strict=True
        ):
            low, high = np.clip([begin, stop], first, end).tolist()
            window: Any = stage.window
            if stage.first_window is not None and low < high:
                done = np.arange(low, high, dtype=np.int64) * self._unit - places[0]
                way = (stage.window - stage.first_window) * done // (places[1] - places[0])
                lowest = min(stage.first_window, stage.window)
                window = self._round(stage.first_window + way, lowest)
            found[low - first : high - first] = window
        return found

    def batches(self) -> list[tuple[int, int]]:
        """Return (first step, samples in a batch) where the batch changes; empty: not set here."""
        found: list[tuple[int, int]] = []
        if not _any(self.stages, "batch"):
            return found
        ends = [*self.first_steps[1:], self._need_total_steps("stages are")]
        for stage, first, end in zip(self.stages, self.first_steps, ends, strict=True):
            assert isinstance(stage.batch, int)
            if first < end and (not found or found[-1][1] != stage.batch):
                found.append((first, stage.batch))
        return found

    def describe(self) -> str:
        """Return the schedule for the fingerprint."""
        stages = " ".join(map(str, self.stages))
        grows = _any(self.stages, "first_window")
        rounding = self._rounding_text if grows else ""
        return f"staged {stages} of {self.total_steps} steps{rounding}"

    # --- checks -----------------------------------------------------------------------------------

    def _check(self) -> None:
        if not self.stages:
            raise SettingError(
                "$schedule=staged needs $stages WINDOW:SHARE ..., for example "
                "$stages 128:0.5 2048:0.5."
            )
        if len(self.stages) > MAX_STAGES:
            raise SettingError(f"$stages has {len(self.stages)} of them: give up to {MAX_STAGES}.")
        self._need_total_steps("stages are")
        stages: Sequence[Stage] = _with_windows(self.stages, self.final_window)
        self._check_windows("stages", (stage.window for stage in stages))
        self._check_windows("stages", (stage.first_window or stage.window for stage in stages))
        stages = self._with_shares(stages)
        for stage in stages:
            assert stage.share is not None
            if stage.share <= 0:
                raise SettingError(
                    f"$stages gives the window {stage.window} a share of "
                    f"{float(stage.share):g}. Shares are above 0."
                )
        total = sum(stage.share or 0 for stage in stages)
        if total != 1:
            raise SettingError(
                f"the shares of $stages add up to {float(total):g}. They have to add up "
                "to 1: each is a share of the whole run. A last stage of final:rest takes what is "
                "left."
            )
        self._check_last("stages", stages[-1].window)
        object.__setattr__(self, "stages", self._with_values(stages))
        object.__setattr__(self, "of_run", None)
        self._check_batches()

    def _check_batches(self) -> None:
        """Refuse batches that shrink: Megatron's training loop ends where they do."""
        for (_, before), (_, after) in itertools.pairwise(self.batches()):
            if after < before:
                raise SettingError(
                    f"$stages goes from a batch of {before} samples to one of {after}, and "
                    f"Megatron stops where batches shrink. Give the later stage batch={before} or "
                    f"more, or the one before it batch={after} or less."
                )

    def _with_shares(self, stages: Sequence[Stage]) -> list[Stage]:
        """Turn tokens and the rest into shares of the run."""
        if any(stage.tokens is not None for stage in stages):
            if self.of_run is None:
                raise SettingError(
                    "$stages in tokens need to know a step's: give shares of the run here."
                )
            run_tokens = self._run_tokens()
            stages = [
                stage
                if stage.tokens is None
                else replace(stage, share=Fraction(stage.tokens, run_tokens), tokens=None)
                for stage in stages
            ]
        open_ones = [stage for stage in stages if stage.share is None]
        if not open_ones:
            return list(stages)
        left = 1 - sum((stage.share or Fraction(0) for stage in stages), Fraction(0))
        if len(open_ones) > 1:
            raise SettingError(
                f"$stages has {len(open_ones)} stages of the rest. One stage can take it."
            )
        if left <= 0:
            has = f", which has {self._run_tokens():,} tokens" if self.of_run else ""
            raise SettingError(
                "$stages leaves nothing to the stage of the rest: the others take "
                f"{float(1 - left):.4g} times the run{has}. Give a longer run or shorter stages."
            )
        return [replace(each, share=left) if each.share is None else each for each in stages]

    def _run_tokens(self) -> int:
        return int(self.of_run.step_samples * self.of_run.seq_length * self.total_steps)

    def _with_values(self, stages: Sequence[Stage]) -> tuple[Stage, ...]:
        """Give every stage all values that any of them sets."""
        batches: Sequence[int | None] = [None] * len(stages)
        if _any(stages, "batch"):
            first_batch = self.of_run.first_batch if self.of_run is not None else None
            batches = _batches(stages, first_batch)
        rates = _squared_rates(stages, batches)
        found: list[Stage] = []
        rope, yarn = None, None
        for stage, batch, rate in zip(stages, batches, rates, strict=True):
            rope, yarn = stage.rope or rope, stage.yarn or yarn
            found.append(replace(stage, batch=batch, squared_rate=rate, rope=rope, yarn=yarn))
        return tuple(found)


def _of_settings(settings: Mapping[str, Any]) -> tuple[Stage, ...]:
    """Return the stages among settings; none where they cannot be read, which is said later."""
    try:
        return tuple(Staged.settings()["stages"].value(settings.get("stages") or ()))
    except (TypeError, ValueError):
        return ()


def shown_stage(stage: Stage) -> str:
    """Return a stage for a template of an error."""
    return str(stage).replace("$", "$$")


def _any(stages: Iterable[Stage], name: str) -> bool:
    return any(getattr(stage, name) is not None for stage in stages)


def _with_windows(stages: Iterable[Stage], final_window: int) -> list[Stage]:
    """Put numbers in the place of the final window and of the one before."""
    found: list[Stage] = []
    for stage in stages:
        window = final_window if stage.window == FINAL_WINDOW else stage.window
        first = final_window if stage.first_window == FINAL_WINDOW else stage.first_window
        if first == AS_BEFORE:
            if not found:
                raise SettingError(
                    f"$stages begins with {shown_stage(stage)}, and there is no window before it. "
                    f"Give both, such as 32{str(stage)[:2]}..."
                )
            first = found[-1].window
        found.append(replace(stage, window=window, first_window=first))
    return found


def _batches(stages: Iterable[Stage], first_batch: int | None) -> list[int]:
    """Return the batch of each stage.

    Args:
        stages: of which at least one sets it.
        first_batch: of the run, for a first stage that sets none, or one relative to it.
    """
    found: list[int] = []
    before = first_batch
    for stage in stages:
        batch = stage.batch
        if isinstance(batch, str) or batch is None:
            if before is None:
                raise SettingError(
                    "$stages sets batches relative to the run's first one, which is not known here."
                    " Give the first stage a number of samples, such as batch=256."
                )
            times = exact(batch[1:]) if batch else Fraction(1)
            if not found and times != 1:
                raise SettingError(
                    f"$stages begins with {batch} of the batch before, and there is none: give a "
                    "number of samples, or x1 for the run's first batch."
                )
            if (before * times).denominator != 1:
                raise SettingError(
                    f"$stages: {batch} of a batch of {before} is no whole number of samples. Give "
                    "the number."
                )
            batch = int(before * times)
        found.append(batch)
        before = batch
    return found


def _squared_rates(
    stages: Sequence[Stage], batches: Sequence[int | None]
) -> Sequence[Fraction | None]:
    """Return the square of each stage's factor on the learning rate."""
    if not _any(stages, "squared_rate"):
        return [None] * len(stages)
    found: list[Fraction] = []
    square = Fraction(1)
    for index, stage in enumerate(stages):
        if isinstance(stage.squared_rate, str):
            batch, before = batches[index], batches[max(0, index - 1)]
            if batch is None or before is None:
                raise SettingError(
                    f"$stages: lr={SQRT} follows the batch, and no stage sets one. Give a factor, "
                    "such as lr=0.7, or batch=x2 beside it."
                )
            square *= Fraction(batch, before)
        elif stage.squared_rate is not None:
            square = stage.squared_rate
        found.append(square)
    return found
