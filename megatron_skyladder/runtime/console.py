"""What SkyLadder says, on the console of rank 0."""

from __future__ import annotations

import logging
import os


def log_to_console() -> None:
    """Show it whatever level Megatron sets for the rest: warnings on every rank, all on rank 0."""
    package = logging.getLogger("megatron_skyladder")
    if package.handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("SkyLadder: %(message)s"))
    package.addHandler(handler)
    package.propagate = False
    package.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
