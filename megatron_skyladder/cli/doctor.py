"""``skyladder doctor``: what is installed, how SkyLadder would enter, what does not fit."""

from __future__ import annotations

import argparse
import json
import os
import textwrap
from dataclasses import asdict
from typing import Any

from megatron_skyladder.ladder.config import add_arguments
from megatron_skyladder.planning import doctor
from megatron_skyladder.planning.doctor import Report

_WIDTH = 100
_INTEGERS = (  # what the schedule is made of, beside our own flags
    *("--seq-length", "--global-batch-size", "--train-iters", "--train-samples"),
    *("--context-parallel-size", "--log-interval"),
)


def add_parser(subparsers: Any, help_text: str) -> argparse.ArgumentParser:
    """Add this command to the ``skyladder`` parser."""
    parser = subparsers.add_parser(
        "doctor",
        help=help_text,
        usage="skyladder doctor [--json] [the flags of your launch]",
        allow_abbrev=False,
        description="Say what is installed, which attention backend and which way into Megatron "
        "will be used, what does not fit and what to do. With the flags of a launch, also its "
        "schedule. Under torchrun (torchrun ... -m megatron_skyladder doctor <flags>) all ranks "
        "compare versions, flags and schedule.",
        epilog="Exit code: 0 nothing is wrong, 1 something is, 2 wrong usage.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    megatron = parser.add_argument_group(
        "Megatron's flags",
        "These decide the schedule; all others are compared, and looked up in the table of flags "
        "that matter.",
    )
    for flag in _INTEGERS:
        megatron.add_argument(flag, type=int, metavar="N")
    parser.set_defaults(context_parallel_size=1)
    megatron.add_argument("--step-batch-size-schedule", metavar="TOKENS:SAMPLES ...")
    add_arguments(parser)
    _keep_launch_flags(parser)
    return parser


def _keep_launch_flags(parser: argparse.ArgumentParser) -> None:
    """Make the parser keep all words but ``--json``, known to it or not, as ``launch_flags``."""
    parse_known = parser.parse_known_args

    def parse_known_args(args: Any = None, namespace: Any = None) -> Any:
        result, rest = parse_known(args, namespace)
        misspelt = [word for word in rest if word.startswith("--skyladder-")]
        if misspelt:
            parser.error(f"there is no flag {misspelt[0].partition('=')[0]}")
        result.launch_flags = [word for word in args if word != "--json"]
        return result, []

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign]


def run(arguments: argparse.Namespace) -> int:
    """Examine, compare with the other ranks where there are any, and print on rank 0."""
    report = doctor.examine(arguments, arguments.launch_flags)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and doctor.has_torch(report):
        problems = report.problems
        others = doctor.compare_ranks(report)
        report.problems = problems + others
        report.run["ranks"] = "disagree" if others else f"{os.environ['WORLD_SIZE']}, all alike"
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(asdict(report), indent=2) if arguments.json else _page(report))
    return 1 if report.problems else 0


def _page(report: Report) -> str:
    parts = [
        ("Installed", report.installed),
        ("A run here", report.run),
        ("Ways in", report.ways),
        ("Problems", {str(n): text for n, text in enumerate(report.problems, 1)}),
    ]
    lines = []
    for title, entries in parts:
        if not entries:
            continue
        margin = max(len(name) for name in entries) + 4
        lines.append(title)
        for name, text in entries.items():
            label = f"  {name}".ljust(margin)
            lines += textwrap.wrap(
                text,
                _WIDTH,
                initial_indent=label,
                subsequent_indent=" " * margin,
                break_on_hyphens=False,
                break_long_words=False,
            )
        lines.append("")
    return "\n".join(lines if report.problems else [*lines, "Nothing is wrong."]).rstrip()
