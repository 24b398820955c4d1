"""``skyladder check-gpu``: does all of this hold on the GPU here, and which kernel is fastest."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder import measured
from megatron_skyladder.ladder.kernels import KERNELS

# of gpu_check.phases, which loads torch
PHASES = (
    *("facts", "numerics", "timings", "churn", "memory"),
    *("no-sync", "determinism", "exchange", "megatron", "smokes"),
)


def add_parser(subparsers: Any, help_text: str) -> argparse.ArgumentParser:
    """Add this command to the ``skyladder`` parser."""
    parser = subparsers.add_parser(
        "check-gpu",
        help=help_text,
        allow_abbrev=False,
        description="Check every installed attention kernel on the GPU here, and train Megatron's "
        "1B model for a few steps: numerics against float32, time against the window, plans, "
        "memory, hidden synchronisations, determinism, context-parallel launches. Writes "
        "check.json and check.html, and the table from which --skyladder-attention-backend auto "
        "then takes the fastest kernel. About half an hour on one H100, in phases of less than ten "
        "minutes; what is done is kept, so the same command goes on where it ended.",
        epilog="Exit code: 0 passed, 1 something failed or is not there, 2 wrong usage.",
    )
    parser.add_argument("--output", metavar="DIR", default="gpu-check", help="default: gpu-check")
    parser.add_argument(
        "--phase",
        action="append",
        choices=PHASES,
        metavar="NAME",
        help=f"run this one only (may be given again): {', '.join(PHASES)}",
    )
    parser.add_argument(
        "--backends",
        type=_backends,
        metavar="NAMES",
        help="kernels to try, such as te,fa4; default: all there are",
    )
    parser.add_argument("--fresh", action="store_true", help="do again what was done before")
    parser.add_argument(
        "--toy", action="store_true", help="the same phases at toy size on the CPU, in minutes"
    )
    return parser


def _backends(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in KERNELS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(KERNELS)}")
    return names


def run(arguments: argparse.Namespace) -> int:
    """Run the phases that are left, write what they found, and print the verdict."""
    import torch  # noqa: F401  first, so that its absence is what is said

    warnings.filterwarnings("ignore", module=r"megatron\.")  # what is not installed, every time
    from megatron_skyladder.cpu import engine as cpu_engine

    if arguments.toy:
        cpu_engine.install()
    from megatron_skyladder.gpu_check import page, phases
    from megatron_skyladder.gpu_check.bench import Bench

    names = arguments.phase or list(phases.PHASES)
    bench = Bench(toy=arguments.toy, backends=arguments.backends)
    folder = Path(arguments.output)
    print(f"skyladder check-gpu on {bench.name}: {', '.join(bench.backends)}")

    def tell(line: str) -> None:
        print(line, flush=True)

    report = phases.run(bench, folder, names, fresh=arguments.fresh, tell=tell)
    wrong, table = phases.failures(report), None
    try:
        table = phases.write_table(bench, report, folder)
    except (OSError, UsageError) as error:
        wrong.append(
            f"the table of measured times could not be written: {error}. Name a file that can be "
            f"with {measured.VARIABLE} and give the command again: what is done is kept."
        )
    for text in wrong:
        print(f"FAILED {text}")
    print(f"report: {page.write_page(report, folder)}, figures: {folder / phases.FILE}")
    if table is not None:
        print(f"measured times, for --skyladder-attention-backend auto: {table}")
    elif phases.without_table(report):
        print(phases.without_table(report))
    left = [name for name in phases.PHASES if name not in report["phases"]]
    more = f"; not done yet: {', '.join(left)}" if left else ""
    print(f"{f'{len(wrong)} failures' if wrong else 'passed'}{more}")
    return 1 if wrong else 0
