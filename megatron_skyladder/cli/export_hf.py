"""``skyladder export-hf``: a Megatron checkpoint as a folder that transformers loads."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from megatron_skyladder import hugging_face
from megatron_skyladder.data import tokenizer_flags
from megatron_skyladder.terminal import Progress

DESCRIPTION = """\
Write a checkpoint as a Hugging Face folder: Llama, Qwen2 (--add-qkv-bias) or Qwen3
(--qk-layernorm), with its tokenizer, generation settings and a model card.

Reads what Megatron-LM and Megatron Bridge write (--ckpt-format torch_dist or torch), trained with
any layout. Runs in one process on the CPU, without Megatron, a layer at a time. The tokenizer is
converted and compared on sample texts before anything is written. OUT appears when it is whole;
the same command goes on where an earlier one was stopped.
"""

EPILOG = """\
examples:
  skyladder export-hf runs/ladder/checkpoints exported/ladder
  skyladder export-hf runs/ladder/checkpoints exported/ladder-20k --iteration 20000 --check
  skyladder export-hf checkpoints out --tokenizer-model /data/llama2/tokenizer.model

Then: AutoModelForCausalLM.from_pretrained("exported/ladder").
"""


def add_parser(subparsers: Any, help_text: str) -> argparse.ArgumentParser:
    """Add the command to ``skyladder``."""
    parser = subparsers.add_parser(
        "export-hf",
        help=help_text,
        usage="skyladder export-hf CHECKPOINT OUT [options]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a run's --save folder, or one iteration's in it."
    )
    parser.add_argument("out", metavar="OUT", help="the folder to make.")
    parser.add_argument(
        "--iteration", type=int, metavar="N", help="which checkpoint. Default: the latest."
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights. Default: what they were trained in.",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="let Megatron load the checkpoint into its own model as well and compare logits; "
        "needs Megatron, and memory for the model in fp32, twice.",
    )
    parser.add_argument(
        "--without-tokenizer",
        action="store_true",
        help="leave the tokenizer out; --vocab-size says how many tokens there are.",
    )
    parser.add_argument(
        "--rope-scaling-factor",
        type=float,
        metavar="FACTOR",
        help="what --use-rope-scaling or --rotary-seq-len-interpolation-factor was trained with, "
        "where the checkpoint leaves it open; the export says so.",
    )
    parser.add_argument(
        "--trust-checkpoint",
        action="store_true",
        help="unpickle types that checkpoints do not need. They run code that the file chooses: "
        "only where you know who wrote it.",
    )
    tokenizer_flags.add_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command and return the exit code."""
    hugging_face.require()
    from megatron_skyladder.hugging_face.exporting import export

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with Progress("export", every=None) as progress:

        def on_part(part: int, parts: int) -> None:
            progress.show(part / parts, f"part {part} of {parts}")

        done = export(
            Path(args.checkpoint),
            Path(args.out),
            iteration=args.iteration,
            tokenizer=args,
            without_tokenizer=args.without_tokenizer,
            vocab_size=args.vocab_size,
            dtype=args.dtype,
            rope_scaling_factor=args.rope_scaling_factor,
            trust=args.trust_checkpoint,
            check=args.check,
            on_part=on_part,
        )
    made = "" if done.is_new else " (made by an earlier run)"
    print(
        f"{done.folder}: {done.model.family}, iteration {done.checkpoint.iteration:,}, "
        f"{done.model.vocab_size:,} tokens, {done.dtype}{made}"
    )
    for note in done.notes:
        print(f"note: {note}", file=sys.stderr)
    if done.comparison is not None:
        print(done.comparison)
    return 0
