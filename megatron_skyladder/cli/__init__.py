"""The ``skyladder`` command. Each sub-command is a module here with ``add_parser`` and ``run``."""

from __future__ import annotations

import argparse
import importlib
import sys

# Listed by name and imported on use: --help must not wait for numpy, let alone for Megatron.
COMMANDS = {
    "demo": "pretrain a small model twice on this machine: constant window and SkyLadder",
    "plan": "what a schedule does to windows, work, time and cost, before you launch",
    "compare": "several schedules side by side, and the rate that fits a budget",
    "prepare": "text (JSON lines, Parquet, plain files) -> Megatron's .bin/.idx",
    "example": "Megatron's flags for the paper's runs, each with where it comes from",
    "slurm": "print or submit a run as SLURM jobs that survive time limits and preemption",
    "inspect": "what is in a .bin/.idx: documents, lengths, end-of-document tokens, a sample",
    "doctor": "what is installed, how SkyLadder would enter, what does not fit and what to do",
    "patch": "put SkyLadder into a Megatron-LM checkout, by lines that are only inserted",
    "report": "what runs did, from their logs: one HTML page and pictures",
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code: 0 done, 1 failed, 2 wrong usage."""
    arguments = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="skyladder",
        description="Context-window scheduling (SkyLadder) for Megatron-LM: plan a run, prepare "
        "its data, look at what came out.",
        epilog="Training itself: torchrun ... -m megatron_skyladder.pretrain_gpt "
        "<Megatron's flags> --skyladder-*",
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    named = next((word for word in arguments if not word.startswith("-")), None)
    for name, help_text in COMMANDS.items():
        if name == named:
            module = importlib.import_module(f"megatron_skyladder.cli.{name.replace('-', '_')}")
            subparser = module.add_parser(subparsers, help_text)
            subparser.set_defaults(run=module.run)
        else:
            subparsers.add_parser(name, help=help_text)
    parsed = parser.parse_args(arguments)
    try:
        return int(parsed.run(parsed) or 0)
    except (ValueError, OSError) as error:
        print(f"skyladder {parsed.command}: {error}", file=sys.stderr)
        return 1
