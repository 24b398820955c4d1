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
from megatron_skyladder.ladder.config import SkyLadderConfig
from megatron_skyladder.ladder.continuation import Checkpoint, Flags, flags_that_keep
from megatron_skyladder.ladder.flags import config_from_args
from megatron_skyladder.megatron_lm import compat, releases
from megatron_skyladder.runtime import console
from megatron_skyladder.runtime.resuming import check, written

BRIDGES_CONFIG = "run_config.yaml"  # which Megatron Bridge writes into each checkpoint

logger = logging.getLogger(__name__)


def accept_old_checkpoints() -> None:
    """Let Megatron's loaders take checkpoints in which early versions left parsed numbers.

    They hold ``Fraction`` and `megatron_skyladder.schedules.Stage` among Megatron's arguments, and
    most releases load with ``weights_only``, which takes no class that is not on its list.
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
        return config_from_args(options, f"Megatron {releases.installed().version}")
    except UsageError as error:
        keeping = _flags_that_keep_the_checkpoint(options)
        if keeping is None:
            raise
        raise UsageError(
            f"{error}\nTo keep the windows of the checkpoint in {options.load}: "
            f"{written(keeping, options)}."
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
            code = leaving.code or 0
            sys.exit(  # a text: exit code 1, and a job's status has the reason
                f"rank {console.rank()}: Megatron could not read the checkpoint (it says why "
                f"above) and left with exit code {code}; it is made 1."
            )

    return load


def loading(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Megatron's ``load_checkpoint``: errors end the run, Bridge's checkpoints are compared.

    Those have no arguments, so Megatron's own check of them is not called.
    """
    load = leaving_with_an_error(original)

    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        result = load(*args, **kwargs)
        options = compat.args()
        checkpoint = _of_bridge(options, result[0])
        if checkpoint is not None:
            check(checkpoint, options)
        return result

    return load_checkpoint


def _of_bridge(options: Any, iteration: int) -> Checkpoint | None:
    """Return what the checkpoint says that was loaded, where it is one of Megatron Bridge's."""
    if not iteration or getattr(options, "finetune", False) or not options.load:
        return None
    path = os.path.join(options.load, f"iter_{iteration:07d}", BRIDGES_CONFIG)
    if not os.path.exists(path):
        return None
    import yaml

    with open(path, encoding="utf-8") as file:
        variables = (yaml.safe_load(file) or {}).get("env_vars") or {}
    consumed = options.consumed_train_samples or iteration * options.global_batch_size
    return Checkpoint.of_variables(variables, consumed)
