"""SkyLadder without a flag: ``--spec megatron_skyladder.layer_specs skyladder`` on any script.

An untouched ``pretrain_gpt.py`` has no ``--skyladder-*`` flags, so they come from the environment,
under their names in capitals, or from a file that holds them as on a command line:

    --skyladder-start-window 8        SKYLADDER_START_WINDOW=8
    --skyladder-preset 1b-8k          SKYLADDER_PRESET=1b-8k
    --skyladder-no-probe              SKYLADDER_NO_PROBE=1
    all of them, in a file            SKYLADDER_CONFIG=/path/to/flags.txt

A variable overrides the file. Documents cannot be masked this way: their ends have to reach every
pipeline stage, and Megatron's own ``get_batch`` does not bring them there.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
from collections.abc import Mapping
from typing import Any, NoReturn

from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder.config import DEFAULT_SCHEDULE
from megatron_skyladder.ladder.flags import add_arguments, is_requested
from megatron_skyladder.ladder.settings import SAME_ON_ALL_RANKS
from megatron_skyladder.runtime.console import log_to_console

logger = logging.getLogger(__name__)

PREFIX = "SKYLADDER_"
CONFIG_VARIABLE = "SKYLADDER_CONFIG"
OTHER_VARIABLES = (  # read elsewhere: by the engine, the entry point, job scripts and tests
    *("DEVICE", "TRACEBACK", "ALLOW_UNTESTED_MEGATRON", "RUN_DIR", "ATTEMPT_DIR", "MEASURED"),
    *("MEGATRON_CHECKOUT", "MEGATRON_CHECKOUTS", "MEGATRON_WHEELS"),
    *("FINGERPRINT", "SETTINGS"),  # Bridge's environment, from what its checkpoints carry
)
_YES, _NO = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")


class _Parser(argparse.ArgumentParser):
    """A parser that raises what a user can fix, instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(
            f"{message}. The flags come from {PREFIX}* variables and {CONFIG_VARIABLE}, see the "
            "help of megatron_skyladder.pretrain_gpt."
        )


def flags(environment: Mapping[str, str]) -> argparse.Namespace:
    """Return the ``skyladder_*`` values that an environment sets.

    Raises:
        UsageError: a value is wrong, or the file cannot be read or holds an unknown flag.
    """
    parser = _Parser(prog="SkyLadder", allow_abbrev=False)
    add_arguments(parser)
    words = _words_of_file(environment.get(CONFIG_VARIABLE))
    known = {CONFIG_VARIABLE, *(PREFIX + name for name in OTHER_VARIABLES)}
    for action in parser._actions:
        if not action.dest.startswith("skyladder_"):
            continue
        variable = action.dest.upper()
        known.add(variable)
        words += _words(action, variable, environment.get(variable))
    for variable in sorted(set(environment) - known):
        if variable.startswith(PREFIX):
            logger.warning(
                "%s is set, but there is no such flag; it has no effect.",
                variable,
                extra=SAME_ON_ALL_RANKS,
            )
    return parser.parse_args(words)


def _words_of_file(path: str | None) -> list[str]:
    if not path:
        return []
    try:
        with open(path, encoding="utf-8-sig") as file:
            return shlex.split(file.read(), comments=True)
    except OSError as error:
        raise UsageError(f"{CONFIG_VARIABLE}={path} cannot be read: {error.strerror}.") from None


def _words(action: argparse.Action, variable: str, value: str | None) -> list[str]:
    """Return a variable as it would stand on a command line."""
    if value is None:
        return []
    flag = action.option_strings[0]
    if action.nargs == 0:
        if value.lower() not in _YES + _NO:
            raise UsageError(f"{variable}={value}: set it to 1, or leave it unset.")
        return [flag] if value.lower() in _YES else []
    return [flag, *(value.split() if action.nargs == "+" else [value])]


def switch_on(options: Any) -> None:
    """Install the hooks as the environment says, unless flags have switched SkyLadder on already.

    Args:
        options: Megatron's validated arguments.

    Raises:
        UsageError: a setting is wrong, or asks for documents to be masked.
    """
    from megatron_skyladder.megatron_lm import hooks, resume

    if hasattr(options, hooks.FINGERPRINT):
        return
    log_to_console()
    given = flags(os.environ)
    if not (is_requested(given) or given.skyladder_end_ladder):
        given.skyladder_schedule = DEFAULT_SCHEDULE  # naming the spec asks for it
    for name, value in vars(given).items():
        setattr(options, name, value)
    config = resume.config_of_run(options)
    if config is None:  # SKYLADDER_END_LADDER
        hooks.install_ended()
        return
    if config.intra_document:
        raise UsageError(
            "SKYLADDER_INTRA_DOCUMENT: documents cannot be masked through --spec alone, because "
            "their ends do not reach the attention. Patch the checkout (skyladder patch apply DIR)"
            ", or train with -m megatron_skyladder.pretrain_gpt."
        )
    logger.warning(
        "documents are not masked: --spec brings the window alone. To keep documents apart, patch "
        "the checkout (skyladder patch apply DIR) and add --skyladder-intra-document.",
        extra=SAME_ON_ALL_RANKS,
    )
    hooks.install(config, options)
