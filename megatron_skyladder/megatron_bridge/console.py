"""What SkyLadder says in a run of Bridge: seen, and in Bridge's words."""

from __future__ import annotations

import logging

from megatron_skyladder.megatron_bridge.spelling import Translation
from megatron_skyladder.runtime.console import log_to_console

_PACKAGE = "megatron_skyladder"


def open_console() -> None:
    """Show what SkyLadder says on the console of rank 0, warnings on every rank."""
    log_to_console()
    for handler in logging.getLogger(_PACKAGE).handlers:
        if not any(isinstance(each, Translation) for each in handler.filters):
            handler.addFilter(Translation())


def show_warnings() -> None:
    """Take Bridge's filter off our loggers: it drops the warnings of all that exist.

    ``logger.filter_warnings`` is on by default, for the sake of other packages' noise. Ours are
    about this run, such as a schedule that changed.
    """
    from megatron.training.utils.log_utils import warning_filter

    for name in list(logging.root.manager.loggerDict):
        if name == _PACKAGE or name.startswith(f"{_PACKAGE}."):
            logging.getLogger(name).removeFilter(warning_filter)
