"""``skyladder flags``: the training flags that SkyLadder adds to Megatron's, group by group."""

from __future__ import annotations

import argparse
import shutil
from typing import Any

from megatron_skyladder.ladder.flags import add_arguments

_HELP_COLUMN = 30
_MAX_WIDTH = 100


def add_parser(subparsers: Any, help_text: str) -> argparse.ArgumentParser:
    """Add the sub-command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "flags",
        help=help_text,
        description="Print the --skyladder-* flags of training with their meaning. Megatron's own "
        "stay as they are: torchrun ... -m megatron_skyladder.pretrain_gpt --help prints all.",
    )
    parser.add_argument(
        "words", nargs="*", metavar="WORD", help="only flags with these in their name, or help"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the sub-command."""
    text = to_text(args.words)
    if not text:
        raise ValueError(f"no flag has {' and '.join(args.words)} in its name or help.")
    print(text)
    return 0


def to_text(words: list[str]) -> str:
    """Return the flags that have all of these words in their name or help, as help text."""
    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser)
    width = min(_MAX_WIDTH, shutil.get_terminal_size((_MAX_WIDTH, 24)).columns)
    formatter = argparse.HelpFormatter("", max_help_position=_HELP_COLUMN, width=width)
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if _has(action, words)]
        if not actions:
            continue
        formatter.start_section(group.title)
        formatter.add_text(group.description)
        formatter.add_arguments(actions)
        formatter.end_section()
    return formatter.format_help().rstrip()


def _has(action: argparse.Action, words: list[str]) -> bool:
    text = f"{' '.join(action.option_strings)} {action.help}".lower()
    return all(word.lower() in text for word in words)
