"""``skyladder patch``: SkyLadder in a Megatron-LM checkout, by lines that are only inserted."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from megatron_skyladder.megatron_lm.patching import checkout, definitions
from megatron_skyladder.megatron_lm.patching.checkout import FileState
from megatron_skyladder.megatron_lm.patching.places import MARK
from megatron_skyladder.megatron_lm.releases import RELEASES, Megatron


def add_parser(subparsers: Any, help_text: str) -> argparse.ArgumentParser:
    """Add this command to the ``skyladder`` parser."""
    parser = subparsers.add_parser(
        "patch",
        help=help_text,
        description="Insert the lines that give a Megatron-LM checkout the --skyladder-* flags. "
        "No line is changed or deleted; without one of the flags training is bit-identical to "
        f"before. Each inserted line ends in '{MARK}'. The patched scripts need this package "
        "to be importable.",
    )
    parser.add_argument(
        "action",
        choices=("check", "apply", "revert"),
        help="check: does the patch fit, is it applied (exit code 0: fits; 1: does not). "
        "apply: insert the lines; again does nothing more. revert: take out the marked lines.",
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="the checkout")
    parser.add_argument("--dry-run", action="store_true", help="show the diff, write nothing")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write the diff to a file, not to the screen"
    )
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Check, apply or revert; a `PatchError` says what does not fit."""
    actions = {"check": _check, "apply": _apply, "revert": _revert}
    actions[arguments.action](arguments)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    found = checkout.version_of(arguments.folder)
    states, fits = checkout.examine(arguments.folder, definitions.load())
    todo = [state.name for state in states if state.current != state.patched]
    if not todo:
        word = "is applied"
    elif all(state.current == state.stock for state in states):
        word = "fits and is not applied"
    else:
        word = f"is applied in part or in another version; apply completes {', '.join(todo)}"
    print(f"{arguments.folder}: Megatron {found.version}{_tested(found)}; the patch {word}.")
    for fit in fits:
        print(f"  {fit}: {fit.place.reason}")
    if arguments.output:
        _show([(state.name, state.stock, state.patched) for state in states], arguments.output)


def _tested(found: Megatron) -> str:
    known = RELEASES.get(found.line)
    return f", tested with {known.checkout}" if known else ", which is not a tested release"


def _apply(arguments: argparse.Namespace) -> None:
    found = checkout.version_of(arguments.folder)
    states, _ = checkout.examine(arguments.folder, definitions.load())
    changes = [(state, state.patched) for state in states if state.current != state.patched]
    if not changes:
        print(f"{arguments.folder}: the patch is applied already.")
        return
    _change(changes, arguments, f"the patch (Megatron {found.version}{_tested(found)})", "applied")


def _revert(arguments: argparse.Namespace) -> None:
    if not arguments.folder.is_dir():
        raise ValueError(f"{arguments.folder} is not a folder. Give the patched checkout.")
    changes = [(state, state.stock) for state in checkout.marked_files(arguments.folder)]
    if not changes:
        print(f"{arguments.folder}: nothing to revert, no line ends in '{MARK}'.")
        return
    _change(changes, arguments, "the patch", "reverted")


def _change(
    changes: list[tuple[FileState, bytes]], arguments: argparse.Namespace, what: str, done: str
) -> None:
    _show([(state.name, state.current, after) for state, after in changes], arguments.output)
    names = ", ".join(state.name for state, _ in changes)
    if arguments.dry_run:
        print(f"{arguments.folder}: dry run, {what} was not {done}. Files: {names}.")
        return
    checkout.write([(state.path, after) for state, after in changes])
    print(f"{arguments.folder}: {what} is {done}. Files: {names}.")


def _show(changes: list[tuple[str, bytes, bytes]], output: Path | None) -> None:
    text = checkout.diff(changes)
    if output is None:
        sys.stdout.write(text)
    else:
        output.write_bytes(text.encode())
        print(f"diff written to {output}")
