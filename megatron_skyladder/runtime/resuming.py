"""Whether a resumed run goes on under the windows it began with, whoever trains.

Messages speak of settings as of flags; a trainer that calls them otherwise translates.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder import clock
from megatron_skyladder.ladder.config import SkyLadderConfig
from megatron_skyladder.ladder.continuation import Checkpoint, Flags, flags_that_keep, goes_on
from megatron_skyladder.ladder.local_layers import LocalLayers
from megatron_skyladder.ladder.settings import SAME_ON_ALL_RANKS

SPEC_MODULE = "megatron_skyladder.layer_specs"

logger = logging.getLogger(__name__)


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
                extra=SAME_ON_ALL_RANKS,
            )
    elif wanted is None:
        _check_end(checkpoint, options)
    elif saved != wanted.fingerprint or _other_model(checkpoint, wanted, options):
        _check_change(checkpoint, wanted, options)


@dataclass(frozen=True)
class _Difference:
    """What decides masks and is Megatron's to set: no fingerprint has it.

    Args:
        before, after: it, as text.
        keep: what to give for what it was.
    """

    before: str
    after: str
    keep: str


def _other_model(
    checkpoint: Checkpoint, wanted: SkyLadderConfig, options: Any
) -> list[_Difference]:
    """Return how sequences and local layers differ from the checkpoint's, where it is known."""
    saved = checkpoint.config()
    if saved is None or getattr(options, "skip_train", False):
        return []
    found = []
    if saved.seq_length != wanted.seq_length:
        before, after = (f"sequences of {each.seq_length} tokens" for each in (saved, wanted))
        found.append(_Difference(before, after, f"--seq-length {saved.seq_length}"))
    if saved.local_layers != wanted.local_layers:
        before, after = (_local_text(each.local_layers) for each in (saved, wanted))
        keep = "--window-size and --window-attn-skip-freq as they were"
        found.append(_Difference(before, after, keep))
    return found


def _local_text(local: LocalLayers | None) -> str:
    if local is None:
        return "no local layers"
    return f"{local.num_local} of {local.num_layers} layers local, with {local.window} tokens"


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
            extra=SAME_ON_ALL_RANKS,
        )
        return
    raise UsageError(
        "the checkpoint was trained with SkyLadder, but this run has none of its flags: from "
        f"{checkpoint.consumed_samples} samples on it would train at the full window of "
        f"{options.seq_length} tokens, where the checkpoint had {window}.\n"
        f"  checkpoint: {checkpoint.fingerprint}\n"
        f"To go on with the ladder: {written(checkpoint.flags(), options)}.\n"
        "To end it here and go on at the full window: --skyladder-end-ladder."
    )


def _check_change(checkpoint: Checkpoint, wanted: Any, options: Any) -> None:
    saved = checkpoint.config()
    model = _other_model(checkpoint, wanted, options)
    before = "; ".join([checkpoint.fingerprint or "", *(each.before for each in model)])
    after = "; ".join([wanted.fingerprint, *(each.after for each in model)])
    texts = f"\n  checkpoint: {before}\n  this run:   {after}\n"
    keeping = flags_that_keep(checkpoint, options)
    keep = written(keeping, options) if keeping else "the checkpoint's flags and length of the run"
    if model:
        own = [] if checkpoint.fingerprint == wanted.fingerprint else [keep]
        keep = ", ".join([*(each.keep for each in model), *own])
    if saved and goes_on(saved, wanted, options, checkpoint.consumed_samples):
        logger.warning(
            "the checkpoint was trained under another schedule, but from here on the windows are "
            "the same.%sAs with: %s.",
            texts,
            keep,
            extra=SAME_ON_ALL_RANKS,
        )
        return
    moved = [f"{each.before} become {each.after}" for each in model]
    moved = moved or [_change(saved, wanted, checkpoint)]
    change = f"at {checkpoint.consumed_samples} samples {', '.join(moved)}"
    if getattr(options, "skyladder_allow_schedule_change", None):
        logger.warning(
            "schedule changed on resume, as allowed: %s.%s",
            change,
            texts.rstrip(),
            extra=SAME_ON_ALL_RANKS,
        )
        return
    raise UsageError(
        f"the checkpoint was trained under another schedule.{texts}"
        f"To keep the checkpoint's windows: {keep}.\n"
        f"To go on under this run's ({change}): --skyladder-allow-schedule-change."
    )


def _change(saved: Any, wanted: Any, checkpoint: Checkpoint) -> str:
    """Say what the windows are when a run goes on, and what they were."""
    at = checkpoint.consumed_samples
    before, after = _window(saved, checkpoint), str(wanted.window_at_samples(at))
    text = f"the window goes from {before} to {after}"
    if before == after and saved.local_window_at_samples(at) != wanted.local_window_at_samples(at):
        numbers = [config.local_window_at_samples(at) or "all" for config in (saved, wanted)]
        text = f"the window of local layers goes from {numbers[0]} to {numbers[1]} tokens"
    return text


def _window(config: Any, checkpoint: Checkpoint) -> str:
    """Return the window at which a checkpoint was written."""
    return str(config.window_at_samples(checkpoint.consumed_samples)) if config else "another one"


def written(flags: Flags, options: Any) -> str:
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
