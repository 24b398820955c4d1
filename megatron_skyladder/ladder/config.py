"""What the user asked for: the ``--skyladder-*`` flags, their checks, one frozen value."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder.batch_sizes import batch_sizes
from megatron_skyladder.ladder.kernels import AUTO, KERNELS
from megatron_skyladder.ladder.presets import SCHEDULE_PRESETS
from megatron_skyladder.ladder.schedules import (
    DEFAULT_NUM_CYCLES,
    FINAL_WINDOW,
    SCHEDULES,
    Stage,
    WindowSchedule,
    aligned_multiple,
    exact,
    explain_multiple,
)

DEFAULT_SCHEDULE = "linear"
DEFAULT_START_WINDOW = 32  # the paper's 8K setting
DEFAULT_EXPAND_FRACTION = Fraction(64, 100)  # its best share under every budget
MASKS = ("local", "sliding")
BACKENDS = (AUTO, *KERNELS)
ROUND_TO_AUTO = "auto"
INITS = ("megatron", "reference")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SkyLadderConfig:
    """Everything the rest of the package needs to know, checked.

    Args:
        schedule: the window as a function of the step.
        seq_length: tokens in a row.
        step_samples: training samples that make one step of the schedule: the (final) global
            batch size.
        begin_samples: consumed samples at which the schedule's step 0 lies.
        intra_document: whether attention also ends at documents.
        mask: ``local`` (fixed grid of windows) or ``sliding``.
        attention_backend: a key of the backend table, or ``auto``.
        probe: whether the mask is tried out on the real model at start-up.
        eval_lengths: context lengths at which validation is reported, ascending; empty: not.
        attention_stats_interval: iterations between measurements of attention; 0: none.
        init: how weights are drawn: Megatron's way, or that of the paper's code.
    """

    schedule: WindowSchedule
    seq_length: int
    step_samples: int
    begin_samples: int = 0
    intra_document: bool = False
    mask: str = "local"
    attention_backend: str = "auto"
    probe: bool = True
    eval_lengths: tuple[int, ...] = ()
    attention_stats_interval: int = 0
    init: str = "megatron"

    def window_at_samples(self, consumed_samples: int) -> int:
        """Return the window of the global batch that starts after ``consumed_samples``."""
        step = max(0, consumed_samples - self.begin_samples) // self.step_samples
        return self.schedule.window_at(step)

    @property
    def fingerprint(self) -> str:
        """What decides the mask, as text: checkpoints carry it, and a resume compares it."""
        parts = [self.schedule.describe(), f"step of {self.step_samples} samples"]
        if self.begin_samples:
            parts.append(f"from sample {self.begin_samples}")
        parts.append(f"{self.mask} mask")
        parts.append("documents masked" if self.intra_document else "documents not masked")
        return "; ".join(parts)


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the ``--skyladder-*`` flags; Megatron's ``extra_args_provider``."""
    schedule = parser.add_argument_group(
        "SkyLadder: the window over the run",
        "Attention sees windows that grow over the run (arXiv:2503.15450). Any one of these flags "
        "switches it on; what is left out has the default named here.",
    )
    _add_schedule(schedule)
    _add_attention(parser.add_argument_group("SkyLadder: attention, weights and evaluation"))
    _add_checks(parser.add_argument_group("SkyLadder: checks, and how to go past them"))
    return parser


def _add_schedule(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--skyladder-preset",
        metavar="NAME",
        help="schedule and window of a published run, not its model; other flags override it. "
        f"One of: {', '.join(SCHEDULE_PRESETS)}.",
    )
    group.add_argument(
        "--skyladder-schedule",
        metavar="NAME",
        help=f"how the window grows: {', '.join(SCHEDULES)}. Default: {DEFAULT_SCHEDULE}.",
    )
    group.add_argument(
        "--skyladder-start-window",
        type=int,
        metavar="TOKENS",
        help=f"window at the first step. Default: {DEFAULT_START_WINDOW}; the paper recommends 8.",
    )
    group.add_argument(
        "--skyladder-final-window",
        type=int,
        metavar="TOKENS",
        help="window once the schedule has ended. Default: --seq-length.",
    )
    group.add_argument(
        "--skyladder-alpha",
        type=_checked(_number),
        metavar="RATE",
        help="growth in tokens per step of one global batch, such as 0.125 or 1/8. "
        "Instead of --skyladder-expand-fraction.",
    )
    group.add_argument(
        "--skyladder-expand-fraction",
        type=_checked(_number),
        metavar="SHARE",
        help="share of all training samples over which the window grows. "
        f"Default: {float(DEFAULT_EXPAND_FRACTION)}.",
    )
    group.add_argument(
        "--skyladder-round-to",
        type=_checked(_multiple),
        metavar="TOKENS",
        help="round growing windows down to a multiple of this; auto: one that fits kernel tiles "
        "and context-parallel chunks, 128 in most runs. Default: no rounding (stepwise: 1024).",
    )
    group.add_argument(
        "--skyladder-stages",
        type=_checked(_stage),
        nargs="+",
        metavar="WINDOW:SHARE",
        help="for --skyladder-schedule=staged: windows with their shares of the run, such as "
        "128:0.5 final:0.5.",
    )
    group.add_argument(
        "--skyladder-cycles",
        type=int,
        metavar="N",
        help="for the cyclic schedules: how often the window grows. "
        f"Default: {DEFAULT_NUM_CYCLES}.",
    )
    group.add_argument(
        "--skyladder-begin-samples",
        type=int,
        metavar="SAMPLES",
        help="consumed samples at which the schedule starts, to continue a run that began without "
        "it. Default: 0.",
    )


def _add_attention(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--skyladder-intra-document",
        action="store_const",
        const=True,
        help="attention also ends where a document does (after its end-of-document token).",
    )
    group.add_argument(
        "--skyladder-mask",
        metavar="NAME",
        help="local: windows lie on a fixed grid, attention does not cross it (the paper's). "
        "sliding: each token sees the window before it. Default: local.",
    )
    group.add_argument(
        "--skyladder-attention-backend",
        metavar="NAME",
        help=f"one of {', '.join(BACKENDS)}. Default: auto, which says what it picked and why.",
    )
    group.add_argument(
        "--skyladder-eval-lengths",
        type=_checked(_lengths),
        metavar="TOKENS,...",
        help="report validation loss at these context lengths too, such as 512,4096,8192: blocked "
        "windows, and bands of positions, on a part of the validation rows.",
    )
    group.add_argument(
        "--skyladder-init",
        metavar="NAME",
        help="reference: draw weights as the paper's code does, normal with std sqrt(2/(5 hidden)),"
        " output projections of attention and MLP with std 1/sqrt(hidden)/layers. Default: "
        "megatron, which is --init-method-std and its like.",
    )
    group.add_argument(
        "--skyladder-attention-stats-interval",
        type=int,
        metavar="ITERATIONS",
        help="every so many iterations log the largest attention logit, the entropy of attention "
        "and the share of heads that attend to the first token, layer by layer. Default: never.",
    )


def _add_checks(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--skyladder-allow-unfinished",
        action="store_const",
        const=True,
        help="accept a schedule that does not reach its final window within the run.",
    )
    group.add_argument(
        "--skyladder-allow-schedule-change",
        action="store_const",
        const=True,
        help="resume from a checkpoint that was trained under another schedule.",
    )
    group.add_argument(
        "--skyladder-no-probe",
        action="store_const",
        const=True,
        help="skip the start-up check that the mask is really applied.",
    )


def is_requested(args: Any) -> bool:
    """Return whether any ``--skyladder-*`` flag was given."""
    return any(
        value is not None for name, value in vars(args).items() if name.startswith("skyladder_")
    )


def config_from_args(args: Any) -> SkyLadderConfig | None:
    """Build the checked configuration from Megatron's parsed and validated arguments.

    Args:
        args: a namespace with ``skyladder_*`` and Megatron's ``seq_length``,
            ``global_batch_size`` (or ``step_batch_size_schedule``) and ``train_samples`` or
            ``train_iters``.

    Returns:
        The configuration, or None where no ``--skyladder-*`` flag was given.

    Raises:
        UsageError: a flag is wrong; the message says which and what to do.
    """
    if not is_requested(args):
        return None
    flags = _flags_with_preset(args)
    seq_length = args.seq_length
    schedule = _schedule(flags, args)
    if schedule.final_window > seq_length:
        given = getattr(args, "skyladder_final_window", None) is not None
        source = "" if given else f" (set by --skyladder-preset={flags['preset']})"
        raise UsageError(
            f"--skyladder-final-window={schedule.final_window}{source} is above "
            f"--seq-length={seq_length}. A window cannot be longer than the row: lower it, or "
            "raise --seq-length."
        )
    begin = flags.get("begin_samples") or 0
    _check_begin(begin, args)
    _check_ends(schedule, args, begin)
    return SkyLadderConfig(
        schedule=schedule,
        seq_length=seq_length,
        step_samples=batch_sizes(args).final,
        begin_samples=begin,
        intra_document=bool(flags.get("intra_document")),
        mask=_choice("mask", flags.get("mask") or "local", MASKS),
        attention_backend=_choice(
            "attention-backend", flags.get("attention_backend") or "auto", BACKENDS
        ),
        probe=not flags.get("no_probe"),
        eval_lengths=_eval_lengths(flags.get("eval_lengths", ()), seq_length),
        attention_stats_interval=_stats_interval(flags.get("attention_stats_interval"), args),
        init=_choice("init", flags.get("init") or "megatron", INITS),
    )


def _flags_with_preset(args: Any) -> dict[str, Any]:
    """Return the flags without their prefix; what the preset sets, a flag of its own overrides."""
    given = {
        name.removeprefix("skyladder_"): value
        for name, value in vars(args).items()
        if name.startswith("skyladder_") and value is not None
    }
    for name in given.keys() & _READERS.keys():
        given[name] = _READERS[name](given[name])
    name = given.get("preset")
    if name is None:
        return given
    preset = dict(SCHEDULE_PRESETS[_choice("preset", name, tuple(SCHEDULE_PRESETS))])
    if given.keys() & {"alpha", "expand_fraction"}:  # one rate replaces the other
        preset.pop("alpha", None)
        preset.pop("expand_fraction", None)
    if given.get("schedule", preset["schedule"]) != preset["schedule"]:
        preset.pop("stages", None)  # they belong to the preset's own schedule
    return {**preset, **given}


def _schedule(flags: dict[str, Any], args: Any) -> WindowSchedule:
    name = _choice("schedule", flags.get("schedule") or DEFAULT_SCHEDULE, tuple(SCHEDULES))
    final_window = flags.get("final_window")
    if final_window is None:
        final_window = args.seq_length
    total_steps = _total_steps(args, flags.get("begin_samples") or 0)
    _warn_unused(name, args)
    if name == "constant":
        return WindowSchedule(schedule=name, start_window=final_window, final_window=final_window)
    alpha, fraction = flags.get("alpha"), flags.get("expand_fraction")
    if name != "staged" and alpha is None and fraction is None:
        fraction = DEFAULT_EXPAND_FRACTION
    stages = tuple(
        replace(stage, window=final_window) if stage.window == FINAL_WINDOW else stage
        for stage in flags.get("stages", ())
    )
    return WindowSchedule(
        schedule=name,
        start_window=flags.get("start_window", DEFAULT_START_WINDOW),
        final_window=final_window,
        alpha=alpha,
        expand_fraction=fraction,
        total_steps=max(1, total_steps),
        round_to=_round_to(name, flags, args),
        stages=stages,
        num_cycles=flags.get("cycles", DEFAULT_NUM_CYCLES),
    )


def _round_to(schedule: str, flags: dict[str, Any], args: Any) -> int | None:
    """Return the multiple; ``auto`` is worked out from the layout and explained."""
    if flags.get("round_to") != ROUND_TO_AUTO:
        return flags.get("round_to")
    if schedule == "staged":  # its windows are given, not rounded
        return None
    cp_size = getattr(args, "context_parallel_size", 1)
    logger.info("%s", explain_multiple(args.seq_length, cp_size))
    return aligned_multiple(args.seq_length, cp_size)


def _warn_unused(schedule: str, args: Any) -> None:
    """Say which of the given flags the schedule has no use for."""
    unused = {"cycles"} if not schedule.startswith("cyclic") else set()
    if schedule in ("constant", "staged"):
        unused |= {"start_window", "alpha", "expand_fraction", "round_to"}
    if schedule == "constant":
        unused |= {"stages"}
    for name in sorted(unused):
        if getattr(args, f"skyladder_{name}", None) is not None:
            logger.warning(
                "--skyladder-%s has no effect with --skyladder-schedule=%s.",
                name.replace("_", "-"),
                schedule,
            )


def _total_samples(args: Any, begin_samples: int) -> int:
    train_samples = getattr(args, "train_samples", None)
    if train_samples is None:
        train_samples = batch_sizes(args).samples_in(args.train_iters or 0)
    return max(0, train_samples - begin_samples)


def _total_steps(args: Any, begin_samples: int) -> int:
    return _total_samples(args, begin_samples) // batch_sizes(args).final


def _check_begin(begin_samples: int, args: Any) -> None:
    if begin_samples < 0:
        raise UsageError(
            f"--skyladder-begin-samples={begin_samples}: give 0 or more consumed samples."
        )
    train_samples = _total_samples(args, 0)
    if train_samples and begin_samples >= train_samples:
        raise UsageError(
            f"--skyladder-begin-samples={begin_samples} is not before the end of the run, which "
            f"has {train_samples} samples. Give the samples that were consumed when the schedule "
            "is to start."
        )


def _check_ends(schedule: WindowSchedule, args: Any, begin_samples: int) -> None:
    """Refuse a run whose window never gets to the end; an evaluation has no end to get to."""
    total_steps = _total_steps(args, begin_samples)
    unfinished = schedule.ramp_steps > total_steps
    if unfinished and total_steps and not getattr(args, "skyladder_allow_unfinished", None):
        raise UsageError(
            f"the schedule ({schedule.describe()}) takes {float(schedule.ramp_steps):,.0f} steps, "
            f"but the run has {total_steps:,}: it would end at a window of "
            f"{schedule.window_at(total_steps - 1)}. Give a higher --skyladder-alpha, or "
            "--skyladder-expand-fraction=0.64, or accept it with --skyladder-allow-unfinished."
        )


def _eval_lengths(given: tuple[int, ...], seq_length: int) -> tuple[int, ...]:
    lengths = tuple(sorted(set(given)))
    outside = [length for length in lengths if not 1 <= length <= seq_length]
    if outside:
        raise UsageError(
            f"--skyladder-eval-lengths has {outside[0]}, but context lengths lie between 1 and "
            f"--seq-length={seq_length}."
        )
    if lengths and lengths[0] == seq_length:
        raise UsageError(
            f"--skyladder-eval-lengths={seq_length} is the whole row, which plain validation "
            f"reports already. Give shorter lengths, such as {max(1, seq_length // 4)}."
        )
    return lengths


def _stats_interval(given: int | None, args: Any) -> int:
    if given is None:
        return 0
    log_interval = getattr(args, "log_interval", None) or 1
    if given < 1 or given % log_interval:
        raise UsageError(
            f"--skyladder-attention-stats-interval={given} has to be a multiple of "
            f"--log-interval={log_interval}, at least 1 of them: what is measured goes into the "
            "log line."
        )
    return given


def _choice(flag: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise UsageError(
            f"--skyladder-{flag}={value} is unknown. Choose one of: {', '.join(choices)}."
        )
    return value


def _checked(read: Callable[[str], Any]) -> Callable[[str], str]:
    """Return an argparse type that checks a flag's text and keeps it as text.

    Megatron's arguments go into every checkpoint, and its loaders take text and plain numbers only
    (``torch.load(weights_only=True)``). `_flags_with_preset` turns the text into values.
    """

    def keep_text(text: str) -> str:
        try:
            read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return text

    return keep_text


def _number(text: str) -> Fraction:
    """Read 0.125 or 1/8 exactly.

    Raises:
        UsageError: it is not a number.
    """
    try:
        return exact(text)
    except (ValueError, ZeroDivisionError):
        raise UsageError(f"{text!r} is not a number such as 0.125 or 1/8") from None


def _lengths(text: str) -> tuple[int, ...]:
    """Read 512,4096,8192.

    Raises:
        UsageError: it is not a list of lengths.
    """
    try:
        return tuple(int(length) for length in text.split(","))
    except ValueError:
        raise UsageError(f"{text!r} is not a list of lengths such as 512,4096,8192") from None


def _multiple(text: str) -> int | str:
    """Read a number of tokens or auto.

    Raises:
        UsageError: it is neither.
    """
    try:
        return text if text == ROUND_TO_AUTO else int(text)
    except ValueError:
        raise UsageError(f"{text!r} is neither a number nor auto") from None


def _stage(text: str) -> Stage:
    """Read WINDOW:SHARE.

    Raises:
        UsageError: it is not that, or the window is below 1.
    """
    window, _, share = text.partition(":")
    try:
        stage = Stage(FINAL_WINDOW if window == "final" else int(window), exact(share))
    except (ValueError, ZeroDivisionError):
        stage = None
    if stage is None or (window != "final" and stage.window < 1):
        raise UsageError(f"{text!r} is not WINDOW:SHARE, such as 128:0.5")
    return stage


def _stages(texts: Sequence[str]) -> tuple[Stage, ...]:
    return tuple(_stage(text) for text in texts)


# The flags whose text is not their value: how it is read, once, in `_flags_with_preset`.
_READERS: dict[str, Callable[[Any], Any]] = {
    "alpha": _number,
    "expand_fraction": _number,
    "round_to": _multiple,
    "stages": _stages,
    "eval_lengths": _lengths,
}
