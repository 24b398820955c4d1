"""``skyladder report``: one HTML page and PNG files about one or more runs, from their logs."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any, help_text: str) -> argparse.ArgumentParser:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "report",
        help=help_text,
        description="Read the console logs of runs and write one self-contained HTML page, and its "
        "pictures as PNG files: windows, losses against tokens, time and FLOPs, losses by context "
        "length, speed, stability, settings.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="[NAME=]RUN_DIR",
        help="a run's folder (its *.log, *.out, *.txt, *.err files and those below logs/) or a log "
        "file. The first is what the others are compared with.",
    )
    parser.add_argument(
        "--output",
        default="skyladder-report",
        metavar="DIR",
        help="where the page and the pictures go (default: %(default)s)",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Write the report and say where it is.

    Raises:
        ValueError: a log holds no training, or matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("report draws with matplotlib: pip install megatron-skyladder[plot].")
    from megatron_skyladder.report.curves import load_runs
    from megatron_skyladder.report.page import write_report

    files = write_report(load_runs(args.runs), Path(args.output))
    print(f"{files[0]} ({len(files) - 1} pictures beside it)")
    return 0
