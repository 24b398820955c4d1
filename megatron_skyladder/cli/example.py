"""``skyladder example``: the command line of one of the paper's runs."""

from __future__ import annotations

import argparse
import json
from typing import Any

from megatron_skyladder.ladder.presets import PAPER_RUNS
from megatron_skyladder.planning import examples
from megatron_skyladder.planning.layouts import GPU_MEMORY_GIB

DESCRIPTION = """\
Print Megatron's flags for one of the paper's runs, one a line, each with the table or the reason it
comes from. Without RUN: the runs and the variants. Missing are only your data and folders:
--data-path, --tokenizer-model, --save and --load.
"""

EPILOG = """\
examples:
  skyladder example 1b-8k --variant skyladder
  torchrun --nproc-per-node 8 -m megatron_skyladder.pretrain_gpt \\
      $(skyladder example 1b-8k --variant skyladder --flags-only) \\
      --data-path data/cc_text_document --tokenizer-model tokenizer.model --save ckpt --load ckpt
  examples/pretrain.sh 1b-8k skyladder --shrink          # a few steps on the CPU
  skyladder slurm examples/slurm/1b-8k.ini --nodes 4     # on a cluster
"""


def add_parser(subparsers: Any, help_text: str) -> argparse.ArgumentParser:
    """Add the command to ``skyladder``."""
    parser = subparsers.add_parser(
        "example",
        help=help_text,
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="RUN", nargs="?", help=f"one of {', '.join(PAPER_RUNS)}.")
    parser.add_argument(
        "--variant",
        default="skyladder",
        metavar="NAME",
        help=f"one of {', '.join(examples.VARIANTS)}. Default: skyladder.",
    )
    parser.add_argument(
        "--gpu",
        default=examples.DEFAULT_GPU,
        metavar="NAME",
        help=f"decides the layout: {', '.join(GPU_MEMORY_GIB)}. Default: {examples.DEFAULT_GPU}.",
    )
    parser.add_argument(
        "--shrink",
        action="store_true",
        help="the same run at the size of a test, on data that Megatron makes up.",
    )
    parser.add_argument(
        "--flags-only", action="store_true", help="one line without comments, for scripts."
    )
    parser.add_argument("--json", action="store_true", help="flags and reasons as one object.")
    parser.add_argument(
        "--gpus-per-replica",
        action="store_true",
        help="print how many processes the layout needs at least, for scripts.",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command and return the exit code."""
    if args.name is None:
        print("\n".join(_overview()))
        return 0
    found = examples.example(args.name, args.variant, gpu=args.gpu, shrink=args.shrink)
    if args.gpus_per_replica:
        print(found.layout.gpus_per_replica)
        return 0
    if args.json:
        print(json.dumps(examples.to_json(found), indent=2))
        return 0
    print(" ".join(found.words) if args.flags_only else "\n".join(examples.to_text(found)))
    return 0


def _overview() -> list[str]:
    lines = ["runs (arXiv:2503.15450):"]
    for name, run in PAPER_RUNS.items():
        model = run.model
        lines.append(
            f"  {name:<8} {model.num_layers} layers of {model.hidden_size}, sequences of "
            f"{run.seq_length:,} tokens, {run.train_steps:,} steps of {run.global_batch_size} rows"
        )
    lines += ["", "variants:"]
    for name, variant in examples.VARIANTS.items():
        lines.append(f"  {name:<27} {variant.summary}")
        if not variant.of_paper:
            lines.append(f"  {'':<27} (the paper's advice, 60 to 64 %, not one of its runs)")
    return [*lines, "", "skyladder example RUN --variant VARIANT prints the flags."]
