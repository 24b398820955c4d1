"""Going on from a checkpoint: whether the windows stay what they were, and which flags keep them.

A checkpoint holds Megatron's arguments of the run that wrote it, ours among them, so that its
configuration can be made again and asked for any window. Two schedules that are written in another
way, or step by another global batch, may still give every batch the same window: windows are
compared, not texts. Standard library only.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import Any

from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder import local_ladder
from megatron_skyladder.ladder.batch_sizes import BatchSizes, batch_sizes
from megatron_skyladder.ladder.config import SkyLadderConfig
from megatron_skyladder.ladder.flags import (
    FINGERPRINT,
    PREFIX,
    config_from_args,
    is_requested,
    nothing_logged,
)
from megatron_skyladder.ladder.schedules import (
    FINAL_WINDOW,
    Points,
    Rotary,
    Staged,
    WindowSchedule,
)

_SHARES = ("stages", "points")  # the fields of schedules that are given by shares of the run
_NOT_OF_THE_MASK = {  # flags that leave every window and document as it is
    *("attention_backend", "eval_lengths", "init", "attention_stats_interval", "no_probe"),
    *("allow_unfinished", "allow_schedule_change", "end_ladder", "fingerprint"),
    *("require_documents", "context_parallel_layout"),
}

# Where a trainer keeps its configuration but no arguments (Megatron Bridge), two of its environment
# variables carry what the arguments would: the fingerprint, and what it was made of, as JSON.
FINGERPRINT_VARIABLE = "SKYLADDER_FINGERPRINT"
SETTINGS_VARIABLE = "SKYLADDER_SETTINGS"

Flags = dict[str, Any]  # by name without prefix; True is a flag without a value, None: leave it out


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint says about the run that wrote it.

    Args:
        fingerprint: of its schedule, or None where it was trained without SkyLadder.
        consumed_samples: training samples.
        arguments: Megatron's of that run, ours among them.
    """

    fingerprint: str | None
    consumed_samples: int
    arguments: Any

    @classmethod
    def of(cls, arguments: Any) -> Checkpoint:
        """Read it from the arguments that lie in the checkpoint."""
        typed = {name: _as_typed(value) for name, value in vars(arguments).items()}
        return cls(
            typed.get(FINGERPRINT),
            typed.get("consumed_train_samples") or 0,
            argparse.Namespace(**typed),
        )

    @classmethod
    def of_variables(cls, variables: Mapping[str, Any], consumed_samples: int) -> Checkpoint:
        """Read it from the environment variables that a configuration carries.

        Args:
            variables: all of them; without ours it was trained without SkyLadder.
            consumed_samples: training samples.
        """
        try:
            options = json.loads(variables.get(SETTINGS_VARIABLE) or "{}")
        except ValueError:  # the fingerprint still tells
            options = {}
        options["consumed_train_samples"] = consumed_samples
        options[FINGERPRINT] = variables.get(FINGERPRINT_VARIABLE)
        return cls.of(argparse.Namespace(**options))

    def variables(self) -> dict[str, str]:
        """Return what `of_variables` reads."""
        given = {name: value for name, value in vars(self.arguments).items() if value is not None}
        return {FINGERPRINT_VARIABLE: self.fingerprint or "", SETTINGS_VARIABLE: json.dumps(given)}

    def config(self) -> SkyLadderConfig | None:
        """Return the configuration it was trained under, or None where that is not sure.

        Not sure: arguments or defaults of another version of this package, which read now give
        something else than the fingerprint says.
        """
        config = _config(self.arguments, {"allow_unfinished": True})
        return config if config is not None and config.fingerprint == self.fingerprint else None

    def flags(self) -> Flags:
        """Return the flags that decided its mask, as they were given."""
        given = {
            name.removeprefix(PREFIX): value
            for name, value in vars(self.arguments).items()
            if name.startswith(PREFIX) and value is not None
        }
        return {name: value for name, value in given.items() if name not in _NOT_OF_THE_MASK}


def rotary_reached(arguments: Any) -> Rotary:
    """Return what stages set of rotary embeddings in the latest batch of a checkpoint.

    Args:
        arguments: Megatron's, as the checkpoint has them.

    Raises:
        UsageError: stages moved them, and what they were cannot be read any more.
    """
    checkpoint = Checkpoint.of(arguments)
    fingerprint = checkpoint.fingerprint or ""
    if ",rope=" not in fingerprint and ",yarn=" not in fingerprint:
        return Rotary()
    config = checkpoint.config()
    if config is None:
        raise UsageError(
            "the run's stages moved rotary embeddings, and what this checkpoint has reached is not "
            f"known: its arguments no longer give its schedule, {checkpoint.fingerprint!r}. Use the"
            " version of megatron-skyladder that trained it."
        )
    batches = batch_sizes(arguments)
    return config.values_of_latest(checkpoint.consumed_samples, batches).rotary


def _as_typed(value: Any) -> Any:
    """Return a flag as it was typed, where an early version kept what it had read."""
    if isinstance(value, Fraction):
        return str(value)
    if isinstance(value, tuple) and value and all(isinstance(length, int) for length in value):
        return ",".join(map(str, value))
    if isinstance(value, list) and value and all(hasattr(stage, "share") for stage in value):
        windows = ["final" if stage.window == FINAL_WINDOW else stage.window for stage in value]
        return [f"{window}:{stage.share}" for window, stage in zip(windows, value, strict=True)]
    return value


def goes_on(one: SkyLadderConfig, other: SkyLadderConfig, options: Any, first: int) -> bool:
    """Return whether a run goes on with the masks that it had.

    Either the ramp is the same line over the samples, of which each run takes the points where its
    own batches begin; or every batch that is left has the same window, such as behind the ladder.

    Args:
        one: the configuration it had.
        other: the one it is to have.
        options: Megatron's arguments of the run that goes on: its batches, and where it ends.
        first: consumed samples.
    """
    for name in ("seq_length", "local_layers", "mask", "intra_document", "recurrent_state"):
        if getattr(one, name) != getattr(other, name):
            return False
    if _over_samples(one) == _over_samples(other):
        return True
    still = max(first, _ramp_end(one), _ramp_end(other))  # from there on no window moves
    own_matters = one.local_schedule is not None or other.local_schedule is not None
    sizes = batch_sizes(options)
    starts = _batch_starts(sizes, first, min(_train_samples(options), still + sizes.final))
    return all(
        one.window_at_samples(at) == other.window_at_samples(at)
        and not (own_matters and _local_windows_differ(one, other, at))
        and one.values_at_samples(at) == other.values_at_samples(at)
        for at in starts
    )


def _local_windows_differ(one: SkyLadderConfig, other: SkyLadderConfig, at: int) -> bool:
    return one.local_window_at_samples(at) != other.local_window_at_samples(at)


def _over_samples(config: SkyLadderConfig) -> dict[str, Any]:
    """Return all that decides the windows at a sample, whatever a step or the run's length is."""
    values = _schedule_over_samples(config.schedule, config)
    if config.local_schedule is not None:
        values["local"] = _schedule_over_samples(config.local_schedule, config)
    return values


def _schedule_over_samples(schedule: WindowSchedule, config: SkyLadderConfig) -> dict[str, Any]:
    values = {each.name: getattr(schedule, each.name) for each in fields(schedule)}
    values["begin_samples"] = config.begin_samples
    rates = [values.pop(name) for name in ("alpha", "expand_fraction")]
    total = values.pop("total_steps")
    if rates != [None, None]:
        values["ramp_samples"] = schedule.ramp_steps * config.step_samples
    elif total is not None:
        samples = total * config.step_samples
        values |= dict.fromkeys(_SHARES)
        values["shares_of_samples"] = _shares(schedule, Fraction(samples)) or samples
    return values


def _shares(schedule: WindowSchedule, factor: Fraction) -> list[tuple[Fraction, Any]]:
    """Return where windows begin or lie that are given by share, times a factor; else nothing.

    Of stages: with all that they set.
    """
    if isinstance(schedule, Staged):
        lengths = (stage.share or Fraction(0) for stage in schedule.stages)
        ends = itertools.accumulate(lengths, initial=Fraction(0))
        pairs = zip(ends, schedule.stages, strict=False)
        return [(start * factor, replace(stage, share=None)) for start, stage in pairs]
    if isinstance(schedule, Points):
        return [(point.share * factor, point.window) for point in schedule.points]
    return []


def _train_samples(options: Any) -> int:
    """Return the samples of a whole run; 0 for an evaluation."""
    samples = getattr(options, "train_samples", None)
    if samples is None:
        samples = batch_sizes(options).samples_in(getattr(options, "train_iters", None) or 0)
    return int(samples)


def _ramp_end(config: SkyLadderConfig) -> int:
    """Return the consumed samples from which on the window is the final one, and the local one."""
    schedules = [it for it in (config.schedule, config.local_schedule) if it is not None]
    steps = max(math.ceil(schedule.ramp_steps) for schedule in schedules)
    return config.begin_samples + steps * config.step_samples


def _batch_starts(sizes: BatchSizes, first: int, end: int) -> Iterator[int]:
    """Yield the samples consumed before each global batch from ``first`` to before ``end``."""
    stages = list(sizes.stages)
    at = first
    while at < end:
        yield at
        while len(stages) > 1 and stages[1][0] <= at:
            del stages[0]
        at += stages[0][1]


def flags_that_keep(checkpoint: Checkpoint, options: Any) -> Flags | None:
    """Return the flags under which a run goes on with the windows of its checkpoint.

    Args:
        checkpoint: where it goes on from.
        options: Megatron's arguments of the run that goes on, with its ``skyladder_*``.

    Returns:
        What to change in the run's own flags: as little as possible. None where nothing helps, or
        where the checkpoint's schedule is not sure.
    """
    saved = checkpoint.config()
    if saved is None:
        return None
    rates = _rate(checkpoint, saved, options)
    all_of_them = {**dict.fromkeys(_given(options)), **checkpoint.flags(), **rates}
    for flags in (rates, all_of_them):
        for allowed in ({}, {"allow_unfinished": True}):
            config = _config(options, {**flags, **allowed})
            if config and goes_on(saved, config, options, checkpoint.consumed_samples):
                return {**flags, **allowed}
    return None


def _given(options: Any) -> list[str]:
    """Return the names of the run's own flags that decide the mask."""
    names = [name.removeprefix(PREFIX) for name in vars(options) if name.startswith(PREFIX)]
    return [name for name in names if name not in _NOT_OF_THE_MASK]


def _rate(checkpoint: Checkpoint, saved: SkyLadderConfig, options: Any) -> Flags:
    """Return the flags that let the ramps take as many samples as they did."""
    flags: Flags = dict.fromkeys(("alpha", "expand_fraction", *_SHARES))
    final = batch_sizes(options).final
    if saved.local_schedule is not None:
        samples = saved.local_schedule.ramp_steps * saved.step_samples
        run_steps = (_train_samples(options) - saved.begin_samples) // final
        flags[local_ladder.SHARE] = str(samples / (max(1, run_steps) * final))
    if saved.schedule.has_rate():
        steps = saved.schedule.ramp_steps * saved.step_samples / final
        at_rate_1 = {**checkpoint.flags(), **flags, "alpha": "1", "allow_unfinished": True}
        slow = _config(checkpoint.arguments, at_rate_1)
        if slow is not None and steps:
            flags["alpha"] = str(slow.schedule.ramp_steps / steps)
        return flags
    num_steps = (_train_samples(options) - saved.begin_samples) // final
    if num_steps <= 0 or saved.schedule.total_steps is None:
        return flags
    factor = Fraction(saved.schedule.total_steps * saved.step_samples, num_steps * final)
    at = _shares(saved.schedule, factor)
    if isinstance(saved.schedule, Staged):
        ends = [start for start, _ in at[1:]] + [Fraction(1)]
        stages = zip(at, ends, strict=True)
        flags["stages"] = [str(replace(each, share=end - start)) for (start, each), end in stages]
    elif isinstance(saved.schedule, Points):
        flags["points"] = [f"{share}:{window}" for share, window in at]
    return flags


def _config(options: Any, flags: Flags) -> SkyLadderConfig | None:
    """Return the configuration of some arguments with other flags, or None where they are wrong."""
    changed = {PREFIX + name: value for name, value in flags.items()}
    arguments = argparse.Namespace(**{**vars(options), **changed})
    arguments.skyladder_fingerprint = arguments.skyladder_end_ladder = None
    if not is_requested(arguments):
        return None
    with nothing_logged():
        try:
            return config_from_args(arguments)
        except (ValueError, TypeError, AttributeError):  # of another version, or do not fit
            return None
