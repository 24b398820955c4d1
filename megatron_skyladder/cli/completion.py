"""``skyladder completion``: the line that switches on tab completion in a shell."""

from __future__ import annotations

import argparse
import os
from typing import Any

EXAMPLES = """\
examples:
  eval "$(skyladder completion bash)"                         this shell; in ~/.bashrc: every one
  eval "$(skyladder completion zsh)"                          in ~/.zshrc, after compinit
  skyladder completion fish > ~/.config/fish/completions/skyladder.fish
"""


def add_parser(subparsers: Any, help_text: str) -> argparse.ArgumentParser:
    """Add the sub-command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "completion",
        help=help_text,
        description="Print the code that makes a shell complete the commands and flags of "
        "skyladder. It asks skyladder\nitself at each tab, so it does not age.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell to print it for")
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the sub-command."""
    import argcomplete

    shell = "bash" if args.shell == "zsh" else args.shell  # one text serves both
    print(argcomplete.shellcode(["skyladder"], shell=shell))
    return 0


def words_before_cursor() -> list[str]:
    """Return the whole words on the shell's line before the cursor, without the command's name.

    A shell that completes passes no arguments: the line is in COMP_LINE, the cursor in COMP_POINT.
    """
    import argcomplete

    line, cursor = os.environ["COMP_LINE"], int(os.environ["COMP_POINT"])
    _, _, _, words, _ = argcomplete.split_line(line, cursor)
    return list(words[int(os.environ["_ARGCOMPLETE"]) :])


def answer(parser: argparse.ArgumentParser) -> None:
    """Write what may follow the cursor for the shell that asked, and leave the process."""
    import argcomplete

    argcomplete.autocomplete(parser)
