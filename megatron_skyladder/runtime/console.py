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


def is_first_rank() -> bool:
    """Return whether this process speaks for all of them."""
    return os.environ.get("RANK", "0") == "0"


def log_to_console() -> None:
    """Show it whatever level Megatron sets for the rest: warnings on every rank, all on rank 0."""
    package = logging.getLogger("megatron_skyladder")
    if package.handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("SkyLadder: %(message)s"))
    package.addHandler(handler)
    package.propagate = False
    package.setLevel(logging.INFO if is_first_rank() else logging.WARNING)
