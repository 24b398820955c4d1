"""What a run is to do: one frozen value that checks itself, whoever builds it.

`make_config` builds it from settings as people give them, by name: the flag layer (`flags`) and
Python callers come through here, so that both get the same defaults, presets and checks. Errors
name fields (``alpha=0``); the flag layer puts flags in their places.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from megatron_skyladder.ladder import local_ladder
from megatron_skyladder.ladder.alignment import aligned_multiple, explain_multiple
from megatron_skyladder.ladder.batch_sizes import BatchSizes
from megatron_skyladder.ladder.kernels import AUTO, KERNELS
from megatron_skyladder.ladder.local_layers import LocalLayers
from megatron_skyladder.ladder.numbers import LARGEST, whole
from megatron_skyladder.ladder.presets import RENAMED_PRESETS, SCHEDULE_PRESETS, Preset
from megatron_skyladder.ladder.schedules import (
    DEFAULT_EXPAND_FRACTION,
    SCHEDULES,
    StageValues,
    WindowSchedule,
    all_settings,
    kind_of,
    not_for,
    schedules_with,
)
from megatron_skyladder.ladder.settings import (
    SAME_ON_ALL_RANKS,
    Naming,
    SettingError,
    rename,
    shown,
)

DEFAULT_SCHEDULE = "linear"
MEASURES = {"eval_lengths", "attention_stats_interval"}  # what only measures
MASKS = ("local", "sliding")
BACKENDS = (AUTO, *KERNELS)
ROUND_TO_AUTO = "auto"
INITS = ("megatron", "reference")
RECURRENT_STATES = ("fragments", "documents", "free")
CP_LAYOUTS = ("balanced", "zigzag")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SkyLadderConfig:
    """Everything the rest of the package needs to know, checked.

    Args:
        schedule: the window as a function of the step.
        seq_length: tokens of a sequence.
        step_samples: training samples that make one step of the schedule: the (final) global
            batch size.
        begin_samples: consumed samples at which the schedule's step 0 lies.
        intra_document: whether attention also ends at documents.
        require_documents: whether a run is refused whose documents cannot be found.
        mask: ``local`` (fixed grid of windows) or ``sliding``.
        attention_backend: a key of the backend table, or ``auto``.
        probe: whether the mask is tried out on the real model at start-up.
        eval_lengths: context lengths at which validation is reported, in any order, or text such
            as "512,4096"; empty: not.
        attention_stats_interval: iterations between measurements of attention; 0: none.
        init: how weights are drawn: Megatron's way, or that of the paper's code.
        recurrent_state: where the state of layers without attention starts anew (Mamba, gated delta
            net); empty: there are no such layers.
        context_parallel_layout: which tokens a context-parallel rank holds in training:
            ``balanced`` (the same attention work for all, where the trainer can), or Megatron's
            ``zigzag``. No part of the fingerprint: it changes no mask.
        allow_unfinished: whether the schedule may be longer than its ``total_steps``.
        local_layers: the model's layers with a sliding window of their own, for what is counted;
            None: it has none. No part of the fingerprint: the model's, as its sizes are; a resume
            compares it beside the fingerprint, and ``seq_length``.
        local_schedule: the own window of these layers as a function of the step (`local_ladder`),
            in training; None: it is always the model's.

    Raises:
        SettingError: a value is out of range, or two do not fit.
    """

    schedule: WindowSchedule
    seq_length: int
    step_samples: int
    begin_samples: int = 0
    intra_document: bool = False
    require_documents: bool = False
    mask: str = "local"
    attention_backend: str = "auto"
    probe: bool = True
    eval_lengths: tuple[int, ...] = ()
    attention_stats_interval: int = 0
    init: str = "megatron"
    recurrent_state: str = ""
    context_parallel_layout: str = "balanced"
    allow_unfinished: bool = False
    local_layers: LocalLayers | None = None
    local_schedule: WindowSchedule | None = None

    def __post_init__(self) -> None:
        assert self.local_schedule is None or self.local_layers is not None
        _check_count("seq_length", self.seq_length, 1, "tokens")
        _check_count("step_samples", self.step_samples, 1, "samples")
        _check_count("begin_samples", self.begin_samples, 0, "consumed samples")
        _check_count("attention_stats_interval", self.attention_stats_interval, 0, "iterations")
        _check_choice("mask", self.mask, MASKS)
        _check_choice("attention_backend", self.attention_backend, BACKENDS)
        _check_choice("init", self.init, INITS)
        _check_state(self.recurrent_state, self.mask, documents=self.intra_document)
        _check_choice("context_parallel_layout", self.context_parallel_layout, CP_LAYOUTS)
        _check_final_window(self.schedule.final_window, self.seq_length)
        if self.require_documents and not self.intra_document:
            raise SettingError(
                "$require_documents is about documents that are to be masked. Add "
                "$intra_document, or leave it out."
            )
        lengths = _checked_lengths(self.eval_lengths, self.seq_length)
        object.__setattr__(self, "eval_lengths", lengths)
        if not self.allow_unfinished:
            _check_ends(self.schedule)

    @property
    def begin_steps(self) -> int:
        """Steps of a run, counted from sample 0, that begin before the schedule does."""
        return -(-self.begin_samples // self.step_samples)

    def step_at_samples(self, consumed_samples: int) -> int:
        """Return the step of the schedule at ``consumed_samples``; 0 before it begins."""
        return max(0, consumed_samples - self.begin_samples) // self.step_samples

    def window_at_samples(self, consumed_samples: int) -> int:
        """Return the window of the global batch that starts after ``consumed_samples``."""
        return self.schedule.window_at(self.step_at_samples(consumed_samples))

    def local_window_at_samples(self, consumed_samples: int) -> int | None:
        """Return what a query of a local layer sees at most in that batch, itself included.

        The smaller of the ladder's window and the layers' own one; None: there are no local layers.
        """
        if self.local_layers is None:
            return None
        own = self.local_layers.window
        if self.local_schedule is not None:
            own = self.local_schedule.window_at(self.step_at_samples(consumed_samples))
        return min(own, self.window_at_samples(consumed_samples))

    def values_at_samples(self, consumed_samples: int) -> StageValues:
        """Return what goes with that window: batch, factor on the learning rate, RoPE."""
        return self.schedule.values_at(self.step_at_samples(consumed_samples))

    def values_of_latest(
        self, consumed_samples: int, batches: BatchSizes | None = None
    ) -> StageValues:
        """Return the same for the batch that ended with ``consumed_samples``.

        Args:
            consumed_samples: at the end of the batch.
            batches: those that the trainer makes, where the schedule does not set them; None: all
                are a step.
        """
        sizes = self.batches or batches or BatchSizes(((0, self.step_samples),))
        return self.values_at_samples(sizes.latest_start(consumed_samples))

    @property
    def batches(self) -> BatchSizes | None:
        """The batches that the schedule sets, or None where it leaves them to the trainer.

        The first one lasts from sample 0, also where the schedule begins later.
        """
        stages = self.schedule.batches()
        if not stages:
            return None
        starts = [self.begin_samples + step * self.step_samples for step, _ in stages]
        sizes = [size for _, size in stages]
        return BatchSizes(tuple(zip([0, *starts[1:]], sizes, strict=True)))

    @property
    def fingerprint(self) -> str:
        """What decides the mask, as text: checkpoints carry it, and a resume compares it."""
        parts = [self.schedule.describe(), f"step of {self.step_samples} samples"]
        if self.begin_samples:
            parts.append(f"from sample {self.begin_samples}")
        if self.local_schedule is not None:
            parts.append(f"local layers {self.local_schedule.describe()}")
        parts.append(f"{self.mask} mask")
        parts.append("documents masked" if self.intra_document else "documents not masked")
        if self.recurrent_state:
            parts.append(f"recurrent state: {self.recurrent_state}")
        return "; ".join(parts)


# --- from settings --------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingRun:
    """What the ladder has to know of the run that it belongs to.

    Args:
        seq_length: tokens in a sequence.
        step_samples: samples in a global batch, once it has grown.
        train_samples: of the whole run; 0 for an evaluation.
        context_parallel_size: ranks that share a sequence.
        log_interval: iterations between log lines.
        first_batch: samples in the first global batch, where it is another one.
        local_layers: see `SkyLadderConfig`.
    """

    seq_length: int
    step_samples: int
    train_samples: int
    context_parallel_size: int = 1
    log_interval: int = 1
    first_batch: int = 0
    local_layers: LocalLayers | None = None

    def __post_init__(self) -> None:
        if not self.first_batch:
            object.__setattr__(self, "first_batch", self.step_samples)


def make_config(
    run: TrainingRun, settings: Mapping[str, Any], *, naming: Naming = str
) -> SkyLadderConfig:
    """Return the checked configuration for settings as people give them.

    Args:
        run: what the ladder belongs to.
        settings: ``preset``, ``schedule``, the settings of schedules and of a second ladder
            (`local_ladder.SETTINGS`) and the fields of `SkyLadderConfig` by name, as values or as
            the text of their flags; None is not given.
        naming: what log lines call a field.

    Raises:
        SettingError: a setting is wrong; it says which and what to do.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    _check_names(given)
    _warn_of_default(given.keys(), naming)
    name = given.pop("preset", None)
    preset = _preset(name)
    kind = kind_of(given.pop("schedule", None) or preset.settings.get("schedule", DEFAULT_SCHEDULE))
    own = {field: given.pop(field) for field in list(given) if schedules_with(field)}
    of_local = {field: given.pop(field) for field in local_ladder.SETTINGS if field in given}
    _warn_unused(own, kind, naming)
    for field in preset.assumes.keys() & kind.settings().keys() - own.keys():
        _warn_assumed(name, preset, field, naming)
    if preset.note and kind.schedule == preset.settings.get("schedule"):
        _warn(f"$preset={name}: {preset.note}", naming)
    window = _with_preset(own, preset, kind)
    for field in sorted(own.keys() & kind.without_effect(window)):
        _warn_without_effect(field, kind, naming)
    window = {name: window[name] for name in window.keys() - kind.without_effect(window)}
    # where the schedule sets batches, they are the steps, whatever the trainer was given so far
    final_batch = kind.final_batch(window, run.first_batch)
    run = replace(run, step_samples=final_batch or run.step_samples)
    steps = _steps_after(given.get("begin_samples", 0), run)
    schedule = _schedule(kind, window, run, max(1, steps), naming)
    local_schedule = local_ladder.local_ladder(
        of_local,
        run.local_layers,
        total_steps=max(1, steps),
        round_to=window.get("round_to"),  # as given: not what a schedule does by itself
        naming=naming,
    )
    if name and "final_window" not in own:
        _check_final_window(schedule.final_window, run.seq_length, f" (set by $preset={name})")
    _check_stats_interval(given.get("attention_stats_interval"), run.log_interval)
    # an evaluation has no end to get to
    given["allow_unfinished"] = bool(given.get("allow_unfinished")) or not steps
    return SkyLadderConfig(
        schedule=schedule,
        seq_length=run.seq_length,
        step_samples=run.step_samples,
        local_layers=run.local_layers,
        local_schedule=local_schedule,
        **given,
    )


def setting_names() -> list[str]:
    """Return the names of all settings that `make_config` takes."""
    from_the_run = ("schedule", "seq_length", "step_samples", "local_layers", "local_schedule")
    own = [field.name for field in fields(SkyLadderConfig) if field.name not in from_the_run]
    return ["preset", "schedule", *all_settings(), *local_ladder.SETTINGS, *own]


def _check_names(given: Iterable[str]) -> None:
    known = setting_names()
    for name in given:
        if name not in known:
            raise SettingError(f"{shown(name)} is no setting. There are: {', '.join(known)}.")


def _warn_of_default(given: Iterable[str], naming: Naming) -> None:
    """Say that windows grow, where whoever starts a baseline may have wanted figures alone."""
    names = sorted(given)
    if names and not set(names) - MEASURES:
        _warn(
            f"{' and '.join(f'${name}' for name in names)} alone: the window grows by the default "
            "schedule. For the whole context throughout, add $schedule=constant.",
            naming,
        )


def _preset(name: str | None) -> Preset:
    if name is None:
        return Preset({}, "", "")
    if name in RENAMED_PRESETS:
        raise SettingError(f"$preset={name} is no more: {RENAMED_PRESETS[name]}.")
    _check_choice("preset", name, tuple(SCHEDULE_PRESETS))
    return SCHEDULE_PRESETS[name]


def _with_preset(
    own: Mapping[str, Any], preset: Preset, kind: type[WindowSchedule]
) -> dict[str, Any]:
    """Return the settings that the schedule uses; what the preset sets, one of its own overrides.

    Settings of the preset that belong to another schedule go with it, and one rate replaces the
    other.
    """
    window = {name: value for name, value in preset.settings.items() if name != "schedule"}
    if own.keys() & {"alpha", "expand_fraction"}:
        window.pop("alpha", None)
        window.pop("expand_fraction", None)
    window |= own
    return {name: value for name, value in window.items() if name in kind.settings()}


def _schedule(
    kind: type[WindowSchedule],
    window: dict[str, Any],
    run: TrainingRun,
    total_steps: int,
    naming: Naming,
) -> WindowSchedule:
    window.setdefault("final_window", run.seq_length)
    if kind.has_rate() and not window.keys() & {"alpha", "expand_fraction"}:
        window["expand_fraction"] = DEFAULT_EXPAND_FRACTION
    if window.get("round_to") == ROUND_TO_AUTO:
        layout = run.seq_length, run.context_parallel_size
        window["round_to"] = aligned_multiple(*layout)
        logger.info("%s", explain_multiple(*layout, name=naming("round_to")))
    if kind.needs_run:
        window["of_run"] = run
    return kind(total_steps=total_steps, **window)


def _warn_unused(own: Mapping[str, Any], kind: type[WindowSchedule], naming: Naming) -> None:
    """Say which of the given settings the schedule has no use for.

    A setting that another schedule cannot do without was meant for that one: it is refused, except
    beside the baseline, which a ladder's command line becomes by one more flag.
    """
    for name in sorted(own.keys() - kind.settings().keys()):
        having = schedules_with(name)
        if not kind.is_baseline and any(name in SCHEDULES[other].required() for other in having):
            raise SettingError(not_for(name, kind.schedule))
        _warn_without_effect(name, kind, naming)


def _warn_without_effect(name: str, kind: type[WindowSchedule], naming: Naming) -> None:
    _warn(f"${name} has no effect with $schedule={kind.schedule}.", naming)


def _warn_assumed(name: str, preset: Preset, field: str, naming: Naming) -> None:
    _warn(
        f"$preset={name} takes ${field}={preset.settings[field]} for {preset.assumes[field]}. "
        "Give it where that is another number.",
        naming,
    )


def _warn(template: str, naming: Naming) -> None:
    logger.warning("%s", rename(template, naming), extra=SAME_ON_ALL_RANKS)


def _steps_after(begin_samples: int, run: TrainingRun) -> int:
    """Return the steps of the run that lie ahead of the schedule; 0 for an evaluation."""
    _check_count("begin_samples", begin_samples, 0, "consumed samples")
    if run.train_samples and begin_samples >= run.train_samples:
        raise SettingError(
            f"$begin_samples={begin_samples} is not before the end of the run, which "
            f"has {run.train_samples} samples. Give the samples that were consumed when the "
            "schedule is to start."
        )
    return max(0, run.train_samples - begin_samples) // run.step_samples


# --- checks ---------------------------------------------------------------------------------------


def _check_count(name: str, value: int, at_least: int, unit: str) -> None:
    if not isinstance(value, int) or not at_least <= value <= LARGEST:
        raise SettingError(
            f"${name}={shown(value)}: give {at_least} or more {unit}, a whole number up to 1e15."
        )


def _check_final_window(final_window: int, seq_length: int, source: str = "") -> None:
    if final_window > seq_length:
        raise SettingError(
            f"$final_window={final_window}{source} is above "
            f"$seq_length={seq_length}. A window cannot be longer than the sequence: lower it, or "
            "raise $seq_length."
        )


def _check_state(state: str, mask: str, *, documents: bool) -> None:
    if not state:
        return
    _check_choice("recurrent_state", state, RECURRENT_STATES)
    if state == "fragments" and mask == "sliding":
        raise SettingError(
            "$recurrent_state=fragments starts a state anew with each window, and the windows of "
            "$mask=sliding have no beginnings. Give $recurrent_state=documents or free, or "
            "$mask=local."
        )
    if state == "documents" and not documents:
        raise SettingError(
            "$recurrent_state=documents needs to know the documents. Add $intra_document, or give "
            "$recurrent_state=fragments or free."
        )


def _check_ends(schedule: WindowSchedule) -> None:
    """Refuse a run whose window never gets to the end."""
    total_steps = schedule.total_steps
    if total_steps is not None and schedule.ramp_steps > total_steps:
        raise SettingError(
            f"the schedule ({shown(schedule.describe())}) takes "
            f"{float(schedule.ramp_steps):,.0f} steps, but the run has {total_steps:,}: it would "
            f"end at a window of {schedule.window_at(total_steps - 1)}. Give a higher $alpha, or "
            "$expand_fraction=0.64, or accept it with $allow_unfinished."
        )


def _checked_lengths(given: Iterable[int] | str, seq_length: int) -> tuple[int, ...]:
    lengths = tuple(sorted(set(read_lengths(given))))
    outside = [length for length in lengths if not 1 <= length <= seq_length]
    if outside:
        raise SettingError(
            f"$eval_lengths has {outside[0]}, but context lengths lie between 1 and "
            f"$seq_length={seq_length}."
        )
    if lengths and lengths[0] == seq_length:
        raise SettingError(
            f"$eval_lengths={seq_length} is the whole sequence, which plain validation "
            f"reports already. Give shorter lengths, such as {max(1, seq_length // 4)}."
        )
    return lengths


def read_lengths(given: Iterable[int] | str) -> tuple[int, ...]:
    """Read 512,4096,8192.

    Raises:
        ValueError: it is not a list of lengths.
    """
    try:
        return tuple(
            whole(each) for each in (given.split(",") if isinstance(given, str) else given)
        )
    except ValueError:
        raise SettingError(
            f"{shown(repr(given))} is not a list of lengths such as 512,4096,8192"
        ) from None


def _check_stats_interval(given: int | None, log_interval: int) -> None:
    if given is not None and (given < 1 or given % log_interval):
        raise SettingError(
            f"$attention_stats_interval={given} has to be a multiple of "
            f"$log_interval={log_interval}, at least 1 of them: what is measured goes into the "
            "log line."
        )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise SettingError(
            f"${name}={shown(value)} is unknown. Choose one of: {', '.join(choices)}."
        )
