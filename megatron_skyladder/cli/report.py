"""``skyladder report``: one HTML page about one or more runs, from their logs."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Read the console logs of runs and write one HTML page that needs no other file and no network: a
sentence for each run, then windows, losses against tokens, time and FLOPs, losses by context
length, speed, attention, stability, schedules and flags. Pictures can be zoomed, read at a point
and saved. It needs the logs only; runs may still be going on, a requeued run's attempts are put
together, and runs that differ in --seed alone are drawn as one band.

examples:
  skyladder report runs/1b-8k-constant runs/1b-8k --output report
  skyladder report before=old/slurm-17.out after=old/slurm-18.out
  skyladder report runs/1b-8k-constant runs/1b-8k --evaluation scores
  skyladder report runs/1b-8k --json | jq '.[0].validations[-1].by_length'
"""


def add_parser(subparsers: Any, help_text: str) -> argparse.ArgumentParser:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "report",
        help=help_text,
        usage="skyladder report [NAME=]RUN_DIR ... [--output DIR] [--evaluation OUT] [--json]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="[NAME=]RUN_DIR",
        help="a run's folder, also one of skyladder slurm (its *.log, *.out, *.txt, *.err files, "
        "those below logs/ and those of its attempts), or a log file. The first is what the others "
        "are compared with.",
    )
    parser.add_argument(
        "--output",
        default="skyladder-report",
        metavar="DIR",
        help="where the page goes (default: %(default)s)",
    )
    parser.add_argument(
        "--evaluation",
        type=Path,
        metavar="OUT",
        help="what skyladder evaluate wrote with --out: its table and picture get a section.",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the figures as JSON and draw nothing"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Write the report and say where it is.

    Raises:
        ValueError: a log holds no training, or bokeh or jinja2 is missing.
    """
    if args.json:
        from megatron_skyladder.report.curves import load_runs
        from megatron_skyladder.report.tables import to_json

        print(json.dumps(to_json(load_runs(args.runs)), indent=2, allow_nan=False))
        return 0
    missing = [name for name in ("bokeh", "jinja2") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"the page needs {' and '.join(missing)}, not installed here: pip install "
            "'megatron-skyladder[plot]'. Without: --json."
        )
    from megatron_skyladder.report.curves import load_runs
    from megatron_skyladder.report.page import write_report

    print(write_report(load_runs(args.runs), Path(args.output), args.evaluation))
    return 0
