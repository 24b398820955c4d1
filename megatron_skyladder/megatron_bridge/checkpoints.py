"""What a checkpoint says about the schedule that it was trained under, Bridge's or Megatron-LM's.

Bridge writes its configuration beside each checkpoint, and ours lies in there as two variables; a
checkpoint of Megatron-LM carries its arguments.
"""

from __future__ import annotations

import logging
from typing import Any

from megatron_skyladder.ladder.continuation import Checkpoint

logger = logging.getLogger(__name__)


def loaded(state: Any) -> Checkpoint | None:
    """Return what is known of the checkpoint that Bridge has loaded; all ranks have to ask.

    Args:
        state: Bridge's GlobalState, after loading.

    Returns:
        None where training begins, or where the checkpoint cannot say.
    """
    consumed = state.train_state.consumed_train_samples
    if not state.train_state.step and not consumed:
        return None
    try:
        return _read(state, consumed)
    except Exception as error:  # whatever the readers of two trainers raise
        logger.warning(
            "the schedule of the checkpoint in %s cannot be read (%s: %s), so it is not compared "
            "with this run's. A run that was ended while it saved may leave no run_config.yaml, "
            "and local checkpoints have none.",
            state.cfg.checkpoint.load,
            type(error).__name__,
            error,
        )
        return None


def _read(state: Any, consumed: int) -> Checkpoint:
    from megatron.bridge.training.mlm_compat.arguments import _load_args_from_checkpoint
    from megatron.bridge.training.utils.checkpoint_utils import (
        file_exists,
        get_checkpoint_name,
        get_checkpoint_run_config_filename,
        read_run_config,
    )

    folder = get_checkpoint_name(state.cfg.checkpoint.load, state.train_state.step)
    path = get_checkpoint_run_config_filename(folder)
    if not file_exists(path):  # Megatron-LM's
        return Checkpoint.of(_load_args_from_checkpoint(folder))
    return Checkpoint.of_variables(read_run_config(path).get("env_vars") or {}, consumed)
