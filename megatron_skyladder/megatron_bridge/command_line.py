"""What ``python -m megatron_skyladder.megatron_bridge`` takes. Standard library only."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from megatron_skyladder.errors import UsageError
from megatron_skyladder.megatron_bridge import overrides, settings


@dataclass(frozen=True)
class CommandLine:
    """A command line, read.

    Args:
        recipe: see `recipes.find`.
        config_file: a YAML file of Bridge's, or None.
        settings: ours, by name, checked one by one.
        overrides: Bridge's.
    """

    recipe: str
    config_file: str | None
    settings: dict[str, Any]
    overrides: list[str]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. --help shows what there is.")


def read(words: Sequence[str]) -> CommandLine:
    """Read a command line; --help is answered and ends the process.

    Raises:
        UsageError: a word is wrong, or would be lost.
    """
    arguments, rest = _parser().parse_known_args(words)
    given, others = overrides.split(rest)
    settings.read(given)
    flags = [word for word in others if word.startswith("-")]
    if flags:
        raise UsageError(
            f"{flags[0]} is unknown: Bridge takes overrides such as train.train_iters=1000 in the "
            "place of flags."
        )
    return CommandLine(arguments.recipe, arguments.config_file, given, others)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="torchrun ... -m megatron_skyladder.megatron_bridge",
        usage="%(prog)s --recipe NAME [--config-file YAML] [skyladder.NAME=VALUE ...] "
        "[section.name=value ...]",
        description="Pretrain a recipe of Megatron Bridge with SkyLadder.",
        epilog="Overrides are Bridge's own, such as train.train_iters=1000, and "
        f"skyladder.NAME=VALUE, NAME one of {', '.join(settings.names())}. skyladder flags says "
        "what they do.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--recipe",
        required=True,
        metavar="NAME",
        help="of megatron.bridge.recipes, such as llama32_1b_pretrain_config; or module:function, "
        "or file.py:function, for one of your own.",
    )
    parser.add_argument(
        "--config-file", metavar="YAML", help="of Bridge's, merged before the overrides."
    )
    return parser
