"""Going on from a checkpoint of Megatron's: under the schedule it had, or with a clear refusal.

The guards of this module are there without any flag of ours: what they look for is just that the
flags are missing.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder import clock
from megatron_skyladder.ladder.config import SkyLadderConfig
from megatron_skyladder.ladder.continuation import Checkpoint, Flags, flags_that_keep, goes_on
from megatron_skyladder.ladder.flags import config_from_args
from megatron_skyladder.megatron_lm import compat

SPEC_MODULE = "megatron_skyladder.layer_specs"

logger = logging.getLogger(__name__)


def accept_old_checkpoints() -> None:
    """Let Megatron's loaders take checkpoints in which early versions left parsed numbers.

    They hold ``Fraction`` and `megatron_skyladder.schedules.Stage` among Megatron's arguments, and
    most releases load with ``weights_only``, which takes no class that it was not told of.
    """
    from torch.serialization import add_safe_globals

    from megatron_skyladder.schedules import Stage

    add_safe_globals([Fraction, Stage])


def config_of_run(options: Any) -> SkyLadderConfig | None:
    """Return `config_from_args`; where it refuses, say what would fit the run's checkpoint.

    Example: twice the global batch at the same rate is half the ladder, so the run may end before
    it; the message then has the rate that goes on as the checkpoint did.
    """
    try:
        return config_from_args(options)
    except UsageError as error:
        keeping = _flags_that_keep_the_checkpoint(options)
        if keeping is None:
            raise
        raise UsageError(
            f"{error}\nTo keep the windows of the checkpoint in {options.load}: "
            f"{_written(keeping, options)}."
        ) from None


def _flags_that_keep_the_checkpoint(options: Any) -> Flags | None:
    """Read the arguments of the checkpoint that a run is to go on from, if there is one."""
    if not getattr(options, "load", None) or getattr(options, "finetune", False):
        return None
    from megatron.training import checkpointing

    try:
        state, *_ = checkpointing._load_base_checkpoint(options.load, options, rank0=True)
        checkpoint = Checkpoint.of(state["args"])
    except (Exception, SystemExit) as error:  # it is only asked for a better message
        logger.info("the checkpoint in %s was not read: %r", options.load, error)
        return None
    return flags_that_keep(checkpoint, options) if checkpoint.fingerprint else None


def checking_the_schedule(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Megatron's check of a checkpoint's arguments: the schedule has to fit as well."""

    def check_checkpoint_args(checkpoint_args: Any, *args: Any, **kwargs: Any) -> Any:
        check(Checkpoint.of(checkpoint_args), compat.args())
        return original(checkpoint_args, *args, **kwargs)

    return check_checkpoint_args


def leaving_with_an_error(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap what loads checkpoints: Megatron leaves with exit code 0 where it cannot read one.

    A scheduler would take that for a finished run.
    """

    def load(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except SystemExit as leaving:
            if leaving.code:
                raise
            rank, code = os.environ.get("RANK", "0"), leaving.code or 0
            sys.exit(  # a text: exit code 1, and a job's status has the reason
                f"rank {rank}: Megatron could not read the checkpoint (it says why above) and left "
                f"with exit code {code}; it is made 1."
            )

    return load


def check(checkpoint: Checkpoint, options: Any) -> None:
    """Make sure that a resumed run goes on under the windows it began with.

    Args:
        checkpoint: where it goes on from.
        options: Megatron's arguments of the run that goes on.

    Raises:
        UsageError: it would go on under others, and no flag asks for that.
    """
    active = clock.installed()
    wanted = None if active is None else active.config
    saved = checkpoint.fingerprint
    if saved is None:
        if wanted is not None:
            logger.warning(
                "the checkpoint was trained without SkyLadder; from here on: %s. The schedule "
                "counts from sample 0 unless --skyladder-begin-samples says otherwise.",
                wanted.fingerprint,
            )
    elif wanted is None:
        _check_end(checkpoint, options)
    elif saved != wanted.fingerprint:
        _check_change(checkpoint, wanted, options)


def _check_end(checkpoint: Checkpoint, options: Any) -> None:
    """Let a run go on without SkyLadder where that is asked for, or where nothing is trained."""
    if getattr(options, "skip_train", False):
        return
    window = _window(checkpoint.config(), checkpoint)
    if getattr(options, "skyladder_end_ladder", None):
        logger.warning(
            "the ladder ends here, as --skyladder-end-ladder says: from %d samples on%s the window "
            "is the full %d tokens.\n  was: %s",
            checkpoint.consumed_samples,
            f", where it was {window},",
            options.seq_length,
            checkpoint.fingerprint,
        )
        return
    raise UsageError(
        "the checkpoint was trained with SkyLadder, but this run has none of its flags: from "
        f"{checkpoint.consumed_samples} samples on it would train at the full window of "
        f"{options.seq_length} tokens, where the checkpoint had {window}.\n"
        f"  checkpoint: {checkpoint.fingerprint}\n"
        f"To go on with the ladder: {_written(checkpoint.flags(), options)}.\n"
        "To end it here and go on at the full window: --skyladder-end-ladder."
    )


def _check_change(checkpoint: Checkpoint, wanted: Any, options: Any) -> None:
    saved = checkpoint.config()
    texts = f"\n  checkpoint: {checkpoint.fingerprint}\n  this run:   {wanted.fingerprint}\n"
    keeping = flags_that_keep(checkpoint, options)
    keep = _written(keeping, options) if keeping else "the checkpoint's flags and length of the run"
    if saved and goes_on(saved, wanted, options, checkpoint.consumed_samples):
        logger.warning(
            "the checkpoint was trained under another schedule, but from here on the windows are "
            "the same.%sAs with: %s.",
            texts,
            keep,
        )
        return
    before = _window(saved, checkpoint)
    at = checkpoint.consumed_samples
    change = f"at {at} samples the window goes from {before} to {wanted.window_at_samples(at)}"
    if getattr(options, "skyladder_allow_schedule_change", None):
        logger.warning("schedule changed on resume, as allowed: %s.%s", change, texts.rstrip())
        return
    raise UsageError(
        f"the checkpoint was trained under another schedule.{texts}"
        f"To keep the checkpoint's windows: {keep}.\n"
        f"To go on under this run's ({change}): --skyladder-allow-schedule-change."
    )


def _window(config: Any, checkpoint: Checkpoint) -> str:
    """Return the window at which a checkpoint was written."""
    return str(config.window_at_samples(checkpoint.consumed_samples)) if config else "another one"


def _written(flags: Flags, options: Any) -> str:
    """Write flags as they are given: on the command line, or as variables with ``--spec``.

    Example: --skyladder-alpha 175/12 instead of --skyladder-expand-fraction.
    """
    given, instead = [], []
    through_variables = SPEC_MODULE in (getattr(options, "spec", None) or ())
    for name, value in flags.items():
        present = getattr(options, f"skyladder_{name}", None)
        words = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        flag = f"skyladder-{name}".replace("_", "-")
        flag = flag.upper().replace("-", "_") if through_variables else f"--{flag}"
        if value is None:
            instead += [flag] if present is not None else []
        elif through_variables:
            given.append(f"{flag}=1" if value is True else f"{flag}='{words}'")
        else:
            given.append(flag if value is True else f"{flag} {words}")
    text = " ".join(given) or "the same flags"
    return f"{text} instead of {' '.join(instead)}" if instead else text
