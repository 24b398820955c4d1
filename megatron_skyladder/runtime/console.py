"""What SkyLadder says, on the console of rank 0."""

from __future__ import annotations

import logging
import os


class _Formatter(logging.Formatter):
    """Lets warnings stand out among plain messages."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        if record.levelno == logging.WARNING:
            return f"SkyLadder: WARNING: {record.message}"
        return super().formatMessage(record)


def rank() -> int:
    """Return this process's number: torchrun's, or Slurm's where srun alone starts the ranks."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)


def is_first_rank() -> bool:
    """Return whether this process speaks for all of them."""
    return rank() == 0


def is_first_of_node() -> bool:
    """Return whether this process speaks for its node; where no launcher counts, each one does."""
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0) == 0


def _is_for_this_rank(record: logging.LogRecord) -> bool:
    if getattr(record, "same_on_all_ranks", False):
        return is_first_rank()
    return is_first_of_node() or not getattr(record, "same_on_a_node", False)


def log_to_console() -> None:
    """Show it whatever level Megatron sets for the rest: all on rank 0, warnings on every rank.

    But for those that are the same on all of them (`settings.SAME_ON_ALL_RANKS`), which rank 0 has,
    and for those of a node (`settings.SAME_ON_A_NODE`), which its first rank has.
    """
    package = logging.getLogger("megatron_skyladder")
    if package.handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("SkyLadder: %(message)s"))
    handler.addFilter(_is_for_this_rank)
    package.addHandler(handler)
    package.propagate = False
    package.setLevel(logging.INFO if is_first_rank() else logging.WARNING)
