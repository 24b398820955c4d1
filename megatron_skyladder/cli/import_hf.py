"""``skyladder import-hf``: a Hugging Face folder as a checkpoint for Megatron's --load."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from megatron_skyladder import hugging_face

DESCRIPTION = """\
Write a Llama, Qwen2 or Qwen3 of Hugging Face as a checkpoint that Megatron's --load --finetune
takes at any layout, and print Megatron's flags for it.

With --seq-length the flags are those of an extension: the longer context, a rotary base for it, and
a ladder (--skyladder-preset extend-context). Needs no Megatron and no GPU; a layer at a time.

OUT is made once: by the first of several nodes, for which the others wait, and not again by the
same command, which prints the same flags.
"""

EPILOG = """\
examples:
  skyladder import-hf /models/llama-1b checkpoints/llama-1b
  skyladder import-hf /models/llama-1b checkpoints/llama-1b --seq-length 32768
  flags=$(skyladder import-hf ... ) &&
    torchrun ... -m megatron_skyladder.pretrain_gpt $flags <data, batch, lr>

The flags go to the standard output, notes to the standard error.
"""


def add_parser(subparsers: Any, help_text: str) -> argparse.ArgumentParser:
    """Add the command to ``skyladder``."""
    parser = subparsers.add_parser(
        "import-hf",
        help=help_text,
        usage="skyladder import-hf HF_FOLDER OUT [options]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="HF_FOLDER", help="config.json, *.safetensors.")
    parser.add_argument("out", metavar="OUT", help="the folder to make, for --load.")
    parser.add_argument(
        "--tensor-model-parallel-size",
        type=int,
        default=1,
        metavar="N",
        help="of the training; it decides to what the vocabulary is padded. Default: 1.",
    )
    parser.add_argument(
        "--make-vocab-size-divisible-by",
        type=int,
        default=128,
        metavar="N",
        help="Megatron's, likewise. Default: 128.",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights. Default: the folder's.",
    )
    parser.add_argument(
        "--seq-length",
        type=int,
        metavar="TOKENS",
        help="the context to extend the model to. Default: its own.",
    )
    parser.add_argument(
        "--rotary-base",
        type=int,
        metavar="BASE",
        help="for the longer context. Default: NTK-aware, base * s**(d/(d-2)), s the ratio of the "
        "lengths and d the head dimension.",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command and return the exit code."""
    hugging_face.require()
    from megatron_skyladder.hugging_face.importing import import_model

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    done = import_model(
        Path(args.folder),
        Path(args.out),
        tensor_parallel=args.tensor_model_parallel_size,
        divisible_by=args.make_vocab_size_divisible_by,
        dtype=args.dtype,
        seq_length=args.seq_length,
        rotary_base=args.rotary_base,
    )
    if not done.is_new:
        print(f"{done.folder}: made by an earlier command", file=sys.stderr)
    for note in done.notes:
        print(f"note: {note}", file=sys.stderr)
    print("\n".join(done.flags))
    return 0
