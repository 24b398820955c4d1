"""The ``--skyladder-*`` flags: added to a parser, and turned into a checked configuration.

What a flag means is written where it is used: those of a schedule come from the schedule's class.
This layer gives fields their flags, in the help and in errors, and knows Megatron's names.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, NoReturn

from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder.batch_sizes import batch_sizes
from megatron_skyladder.ladder.config import (
    BACKENDS,
    DEFAULT_SCHEDULE,
    SkyLadderConfig,
    TrainingRun,
    make_config,
    read_lengths,
    setting_names,
)
from megatron_skyladder.ladder.local_layers import local_layers
from megatron_skyladder.ladder.numbers import argument, exact, whole
from megatron_skyladder.ladder.presets import SCHEDULE_PRESETS
from megatron_skyladder.ladder.schedules import (
    DEFAULT_EXPAND_FRACTION,
    SCHEDULES,
    Staged,
    WindowSchedule,
    all_settings,
    schedules_with,
)
from megatron_skyladder.ladder.settings import SettingError

PREFIX = "skyladder_"  # of our names in Megatron's arguments
FINGERPRINT = "skyladder_fingerprint"  # among them, noted by us: checkpoints carry it
END_LADDER = "--skyladder-end-ladder"
STEP_BATCHES = "--step-batch-size-schedule"
_MEGATRONS = {
    "seq_length": "--seq-length",
    "step_samples": "--global-batch-size",
    "total_steps": "--train-samples or --train-iters",
    "log_interval": "--log-interval",
    "window_size": "--window-size",
}


def flag_of(field: str) -> str:
    """Return the flag that sets a field."""
    return _MEGATRONS.get(field) or f"--{name_of(field).replace('_', '-')}"


def name_of(field: str) -> str:
    """Return the name in Megatron's arguments of what sets a field."""
    described = all_settings().get(field)
    if described and described.flag:
        field = described.flag.replace("-", "_")
    return PREFIX + ("no_probe" if field == "probe" else field)


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
    shared = {field.name for field in fields(WindowSchedule)}
    for name, described in all_settings().items():
        used_by = "" if name in shared else f"for {' and '.join(schedules_with(name))}: "
        group.add_argument(
            flag_of(name),
            type=_checked(described.read),
            nargs="+" if described.several else None,
            metavar=described.metavar,
            help=used_by + described.help,
        )
    group.add_argument(
        "--skyladder-begin-samples",
        type=_checked(whole),
        metavar="SAMPLES",
        help="consumed samples at which the schedule starts, to continue a run that began without "
        "it. Default: 0.",
    )
    group.add_argument(
        "--skyladder-local-start-window",
        type=_checked(whole),
        metavar="TOKENS",
        help="a second ladder, for layers that are local (--window-size L,0): their own window at "
        "the first step, from which it grows to L + 1 tokens. They see no more than the ladder's "
        "window either. Default: it is L + 1 from the start.",
    )
    group.add_argument(
        "--skyladder-local-expand-fraction",
        type=_checked(exact),
        metavar="SHARE",
        help="share of all training samples over which the local layers' own window grows. "
        f"Default: {DEFAULT_EXPAND_FRACTION}.",
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
        "--skyladder-context-parallel-layout",
        metavar="NAME",
        help="which tokens a context-parallel rank holds in training. balanced: chosen by the "
        "window (and the documents), so that all ranks have the same attention work. zigzag: "
        "Megatron's. Default: balanced, where the forward step can reorder sequences.",
    )
    group.add_argument(
        "--skyladder-eval-lengths",
        type=_checked(read_lengths),
        metavar="TOKENS,...",
        help="report validation loss at these context lengths too, such as 512,4096,8192: blocked "
        "windows, and bands of positions, on a part of the validation sequences.",
    )
    group.add_argument(
        "--skyladder-recurrent-state",
        metavar="NAME",
        help="where the state of M and G layers (--hybrid-layer-pattern) starts anew. fragments: "
        "at every window and document, so that a token sees what attention shows it. documents: at "
        "documents only. free: never within a sequence. No default: such layers need an answer.",
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
        type=_checked(whole),
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
        END_LADDER,
        action="store_const",
        const=True,
        help="end the ladder of the checkpoint here: the run goes on at the full window, as stock "
        "Megatron. The one flag that does not switch SkyLadder on; it stands alone.",
    )
    group.add_argument(
        "--skyladder-require-documents",
        action="store_const",
        const=True,
        help="with --skyladder-intra-document: stop, rather than warn, where the documents of the "
        "data do not end in the tokenizer's end-of-document token, or the first global batch has "
        "none.",
    )
    group.add_argument(
        "--skyladder-no-probe",
        action="store_const",
        const=True,
        help="skip the start-up check that the mask is really applied.",
    )


def _checked(read: Callable[[str], Any]) -> Callable[[str], str | int]:
    """Return an argparse type that checks a flag's text and keeps it as text or as a plain number.

    Megatron's arguments go into every checkpoint, and its loaders take text and plain numbers only
    (``torch.load(weights_only=True)``). `make_config` turns the text into values.
    """

    def keep(text: str) -> str | int:
        value = read(text)
        return value if type(value) is int else text

    return argument(keep)


@contextmanager
def nothing_logged() -> Iterator[None]:
    """Keep quiet about flags that nobody has given, or that are read once more."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def is_requested(args: Any) -> bool:
    """Return whether any ``--skyladder-*`` flag was given that switches SkyLadder on."""
    return bool(_given_flags(args))


def _given_flags(args: Any) -> list[str]:
    given = [name for name, value in vars(args).items() if value is not None]
    off = {PREFIX + "end_ladder", FINGERPRINT}
    return [name for name in given if name.startswith(PREFIX) and name not in off]


def _check_end_ladder(args: Any) -> None:
    given = [f"--{name.replace('_', '-')}" for name in _given_flags(args)]
    if given and getattr(args, PREFIX + "end_ladder", None):
        raise UsageError(
            f"{END_LADDER} goes on without SkyLadder, so it cannot stand beside "
            f"{', '.join(given)}. Drop the others; or, to keep documents masked at the full window,"
            " give --skyladder-schedule constant with --skyladder-allow-schedule-change instead."
        )


def config_from_args(args: Any, megatron: str = "this Megatron") -> SkyLadderConfig | None:
    """Build the checked configuration from Megatron's parsed and validated arguments.

    Args:
        args: a namespace with ``skyladder_*`` and Megatron's ``seq_length``,
            ``global_batch_size`` (or ``step_batch_size_schedule``) and ``train_samples`` or
            ``train_iters``.
        megatron: what to call the Megatron whose arguments they are, in an error.

    Returns:
        The configuration, or None where no ``--skyladder-*`` flag was given.

    Raises:
        UsageError: a flag is wrong; the message says which and what to do.
    """
    _check_end_ladder(args)
    if not is_requested(args):
        return None
    config = _config(args)
    check_batches(args, config, megatron)
    check_yarn(args, config)
    return config


def _config(args: Any) -> SkyLadderConfig:
    """Build the configuration, whatever Megatron's own flags say of the batches in between."""
    sizes = batch_sizes(args)
    train_samples = getattr(args, "train_samples", None)
    if train_samples is None:
        train_samples = sizes.samples_in(args.train_iters or 0)
    run = TrainingRun(
        seq_length=args.seq_length,
        step_samples=sizes.final,
        train_samples=train_samples,
        context_parallel_size=getattr(args, "context_parallel_size", 1),
        log_interval=getattr(args, "log_interval", None) or 1,
        first_batch=sizes.stages[0][1],
        local_layers=local_layers(args),
    )
    try:
        return make_config(run, settings_of(args), naming=flag_of)
    except SettingError as error:
        raise UsageError(error.renamed(flag_of)) from None


def keep_stages(args: Any, config: SkyLadderConfig) -> None:
    """Put the stages of a file among the arguments themselves: a checkpoint carries those.

    Args:
        args: as for `config_from_args`; changed.
        config: made of them.
    """
    given = getattr(args, name_of("stages"), None) or ()
    if isinstance(config.schedule, Staged) and any(word.endswith(".ini") for word in given):
        setattr(args, name_of("stages"), [str(stage) for stage in config.schedule.stages])


# --- stages that set batches ----------------------------------------------------------------------


def batch_schedule(args: Any) -> str | None:
    """Return the value of ``--step-batch-size-schedule`` that stages ask for, or None.

    Args:
        args: as for `config_from_args`; of ``global_batch_size`` the first batch is taken, where
            stages are relative to it.

    Raises:
        UsageError: stages set batches, and the run's length is not given in samples.
    """
    if not is_requested(args):
        return None
    with nothing_logged():  # it is said where the configuration is made to be used
        batches = _config(args).batches
    if batches is None:
        return None
    _need_train_samples(args)
    return batches.flag(args.seq_length)


def check_batches(args: Any, config: SkyLadderConfig, megatron: str) -> None:
    """Refuse a run whose batches are not those of its stages: Megatron is who makes them.

    Raises:
        UsageError: the message has the flag that fits.
    """
    wanted = config.batches
    if wanted is None:
        return
    _need_train_samples(args)
    if batch_sizes(args) == wanted:
        return
    flag = f"{STEP_BATCHES} {wanted.flag(args.seq_length)!r}"
    if not hasattr(args, STEP_BATCHES[2:].replace("-", "_")):
        raise UsageError(
            f"{flag_of('stages')} sets batches, which takes {STEP_BATCHES}, and {megatron} has no "
            f"such flag: releases have it from 0.18 on. Take a newer release (with {flag}), or "
            "leave batch out of the stages."
        )
    given = "the flag is not there"
    if getattr(args, "step_batch_size_schedule", None) is not None:
        given = f"the flag says {args.step_batch_size_schedule!r}"
    refuse_batches(given, wanted.flag(args.seq_length))


def refuse_batches(given: str, wanted: str) -> NoReturn:
    """Refuse a launch whose batches are not those of its stages.

    Args:
        given: what it says of them.
        wanted: the value of ``--step-batch-size-schedule`` that fits.

    Raises:
        UsageError: always.
    """
    raise UsageError(
        f"{flag_of('stages')} sets batches, and {given}: Megatron makes the batches, and has to "
        f"make these. Give {STEP_BATCHES} {wanted!r}, without --global-batch-size; skyladder plan "
        "prints it."
    )


def _need_train_samples(args: Any) -> None:
    if getattr(args, "train_samples", None) is None:
        raise UsageError(
            f"{flag_of('stages')} sets batches, so the run's length has to be given in samples: "
            "with --train-iters Megatron decays the learning rate over iterations times micro-batch"
            " size times data-parallel size, which is not what such a run has. Give "
            "--train-samples (and --lr-warmup-samples, --lr-decay-samples)."
        )


def check_yarn(args: Any, config: SkyLadderConfig) -> None:
    """Refuse stages that set YaRN's factor where the model has none that could follow.

    Raises:
        UsageError: the message has the flag that fits, or the reason.
    """
    if "yarn" not in config.schedule.moves():
        return
    if getattr(args, "multi_latent_attention", False):
        raise UsageError(
            f"{flag_of('stages')} sets yarn, but in --multi-latent-attention the softmax's scale is"
            " made of YaRN's factor when a layer is built. Leave yarn out of the stages."
        )
    positions = getattr(args, "position_embedding_type", "yarn")
    if positions != "yarn":
        raise UsageError(
            f"{flag_of('stages')} sets yarn, but --position-embedding-type={positions} has no "
            "factor. Give --position-embedding-type yarn, which Megatron has from 0.19 on, or leave"
            " yarn out of the stages."
        )


def settings_of(args: Any) -> dict[str, Any]:
    """Return what the flags set, by the names of `make_config`; what was not given is None."""
    settings = {name: getattr(args, name_of(name), None) for name in setting_names()}
    settings["probe"] = False if settings["probe"] else None  # --skyladder-no-probe
    return settings
