"""What belongs to a run's first load alone, and is left out once it has a checkpoint of its own.

``--load IMPORTED --finetune --no-load-optim --no-load-rng`` begins a run with a model's weights.
With the run's own checkpoint behind ``--load``, the same flags would throw away iteration, consumed
samples, optimizer and random states, each time that a job comes back.
"""

from __future__ import annotations

from megatron_skyladder.slurm.attempts import RunFolder
from megatron_skyladder.slurm.flags import by_flag, overrides, without
from megatron_skyladder.slurm.settings import BRIDGE_ENTRY, Settings

FLAGS = (
    *("--finetune", "--ckpt-step", "--override-ckpt-iteration", "--moe-use-upcycling"),
    *("--no-load-optim", "--load-main-params-from-ckpt", "--no-load-rng"),
)
OVERRIDES = (
    *("checkpoint.finetune", "checkpoint.ckpt_step"),
    *("checkpoint.load_optim", "checkpoint.load_main_params_from_ckpt", "checkpoint.load_rng"),
)
# what is not saved cannot be loaded: these stay beside the flag that keeps it out of checkpoints
_OPTIMIZER = ("--no-load-optim", "--load-main-params-from-ckpt")
_OPTIMIZER_OF_BRIDGE = ("checkpoint.load_optim", "checkpoint.load_main_params_from_ckpt")


def words(run: RunFolder, settings: Settings) -> tuple[list[str], list[str]]:
    """Return the words of the latest attempt's command line, and those that were left out of it.

    Args:
        run: whose checkpoints say whether this is the first load.
        settings: of the run.
    """
    if not run.has_own_checkpoint:
        return list(settings.flags), []
    if settings.entry == BRIDGE_ENTRY:
        kept, left_out = without(settings.flags, _overrides_to_leave_out(settings))
        return [*kept, "checkpoint.finetune=false"], left_out  # a recipe may have it, too
    return without(settings.flags, _flags_to_leave_out(settings))


def _flags_to_leave_out(settings: Settings) -> set[str]:
    given = by_flag(settings.flags)
    stay: set[str] = set(_OPTIMIZER) if "--no-save-optim" in given else set()
    return set(FLAGS) - stay - ({"--no-load-rng"} if "--no-save-rng" in given else set())


def _overrides_to_leave_out(settings: Settings) -> set[str]:
    given = overrides(settings.flags)
    stay: set[str] = set()
    if given.get("checkpoint.save_optim", "").lower() == "false":
        stay.update(_OPTIMIZER_OF_BRIDGE)
    if given.get("checkpoint.save_rng", "").lower() == "false":
        stay.add("checkpoint.load_rng")
    return set(OVERRIDES) - stay
