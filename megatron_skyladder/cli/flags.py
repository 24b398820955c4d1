"""``skyladder flags``: the training flags that SkyLadder adds to Megatron's, group by group."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from typing import Any

from megatron_skyladder.attention.limits import Effect
from megatron_skyladder.ladder.flags import add_arguments
from megatron_skyladder.megatron_lm import flag_rules

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
    parser.add_argument(
        "--megatron",
        action="store_true",
        help="print the flags of Megatron's that matter to SkyLadder instead: what cannot be "
        "combined, what has to change, what is harmless",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the sub-command."""
    text = megatrons(args.words) if args.megatron else to_text(args.words)
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


def megatrons(words: list[str]) -> str:
    """Return the rows of the table of Megatron's flags that have all of these words."""
    width = min(_MAX_WIDTH, shutil.get_terminal_size((_MAX_WIDTH, 24)).columns)
    parts = []
    for effect in Effect:
        lines = []
        for rule in flag_rules.RULES:
            text = f"{rule.why}. {rule.advice}".strip()
            if rule.effect is effect and all(w.lower() in f"{rule.flag} {text}" for w in words):
                lines.append(f"  {rule.flag}")
                lines += textwrap.wrap(
                    text, width, initial_indent="      ", subsequent_indent="      "
                )
        if lines:
            parts.append("\n".join([f"{effect.value[0].upper()}{effect.value[1:]}", *lines]))
    return "\n\n".join(parts)


def _has(action: argparse.Action, words: list[str]) -> bool:
    text = f"{' '.join(action.option_strings)} {action.help}".lower()
    return all(word.lower() in text for word in words)
