"""What a checkpoint says about the schedule that it was trained under, Bridge's or Megatron-LM's.

Bridge writes its configuration beside each checkpoint, and ours lies in there as two variables; a
checkpoint of Megatron-LM carries its arguments.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from typing import Any

import torch

from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder.continuation import Checkpoint
from megatron_skyladder.ladder.settings import SAME_ON_A_NODE

_INTERIM = "non_persistent"  # Bridge's folder beside the iterations
_ITERATION = re.compile(r"iter_(\d+)")

logger = logging.getLogger(__name__)


def loaded(state: Any, *, may_be_unknown: bool) -> Checkpoint | None:
    """Return what is known of the checkpoint that Bridge has loaded; all ranks have to ask.

    Args:
        state: Bridge's GlobalState, after loading.
        may_be_unknown: whether the run goes on, with a warning, where the checkpoint cannot say.

    Returns:
        None where training begins, or where the checkpoint cannot say.

    Raises:
        UsageError: it cannot say, and the run was not to go on in that case.
    """
    consumed = state.train_state.consumed_train_samples
    if not state.train_state.step and not consumed:
        return None
    try:
        return _read(state, consumed)
    except Exception as error:  # whatever the readers of two trainers raise
        load, why = state.cfg.checkpoint.load, f"{type(error).__name__}: {error}"
    if may_be_unknown:
        logger.warning(
            "the schedule of the checkpoint in %s cannot be read (%s), so it is not compared with "
            "this run's, as allowed",
            load,
            why,
            extra=SAME_ON_A_NODE,
        )
        return None
    raise UsageError(
        f"the schedule of the checkpoint in {load} cannot be read ({why}), so nobody knows whether "
        "this run would go on under it. A run that was ended while it saved may leave no "
        "run_config.yaml, and local checkpoints have none. Load an earlier iteration "
        "(checkpoint.ckpt_step), or make sure that the settings are those of the run before and "
        "set skyladder.allow_schedule_change=true."
    )


def _read(state: Any, consumed: int) -> Checkpoint:
    from megatron.bridge.training.mlm_compat.arguments import _load_args_from_checkpoint
    from megatron.bridge.training.utils.checkpoint_utils import read_run_config

    folder, path = _of_first_rank(lambda: _found(state))
    if path is None:  # Megatron-LM's
        return Checkpoint.of(_load_args_from_checkpoint(folder))
    # which is read on the first rank and sent to all: they have to get here together
    return Checkpoint.of_variables(read_run_config(path).get("env_vars") or {}, consumed)


def _found(state: Any) -> tuple[str, str | None]:
    """Return the folder of the checkpoint, and its run_config.yaml where it is one of Bridge's."""
    from megatron.bridge.training.utils.checkpoint_utils import (
        file_exists,
        get_checkpoint_run_config_filename,
    )

    folders = _folders(state.cfg.checkpoint, state.train_state.step)
    folder = next((folder for folder in folders if file_exists(folder)), None)
    if folder is None:
        raise FileNotFoundError(
            f"no folder of iteration {state.train_state.step} where Bridge loads from: "
            f"{', '.join(folders) or 'nowhere'}"
        )
    path = get_checkpoint_run_config_filename(folder)
    return folder, path if file_exists(path) else None


def _of_first_rank(find: Callable[[], Any]) -> Any:
    """Return on all ranks what the first one finds, or raise what it raises; all have to call this.

    What lies in a folder may look otherwise on another node, for a while or for good.
    """
    if not torch.distributed.is_initialized():
        return find()
    answer: list[Any] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            answer[0] = find()
        except Exception as error:  # of whatever storage; a text can be sent in any case
            answer[0] = RuntimeError(f"{type(error).__name__}: {error}")
    torch.distributed.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], RuntimeError):
        raise answer[0]
    return answer[0]


def _folders(checkpoint: Any, step: int) -> list[str]:
    """Return where the checkpoint of a step may lie that was loaded, as Bridge looks for it.

    Args:
        checkpoint: that section of Bridge's configuration.
        step: which was loaded.
    """
    from megatron.bridge.training.utils.checkpoint_utils import (
        get_checkpoint_name,
        is_checkpoint_iteration_directory,
    )

    load, kind = checkpoint.load, checkpoint.non_persistent_ckpt_type
    if load and is_checkpoint_iteration_directory(load):
        return [load]
    given = [root for root in (checkpoint.save, load) if root]
    interim: list[str] = []
    if kind == "global":
        of_its_own = checkpoint.non_persistent_global_ckpt_dir
        interim = [of_its_own] if of_its_own else [os.path.join(root, _INTERIM) for root in given]
    folders = [get_checkpoint_name(root, step) for root in (*interim, load) if root]
    if kind == "local":  # which has no configuration: the same run's saved one before it has
        folders += [folder for root in reversed(given) for folder in _before(root, step)]
    return folders


def _before(root: str, step: int) -> list[str]:
    """Return the iterations that were saved up to a step, the latest first."""
    names = os.listdir(root) if os.path.isdir(root) else []
    numbers = {int(found[1]): name for name in names if (found := _ITERATION.fullmatch(name))}
    return [os.path.join(root, numbers[n]) for n in sorted(numbers, reverse=True) if n <= step]
