"""RULER's three needle tasks that the paper's Long average uses, by lm-eval's own generators.

Rows depend on a tokenizer and a length, so they are generated once for each and kept: two models of
one tokenizer read the same prompts.
"""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

from megatron_skyladder.errors import UsageError
from megatron_skyladder.evaluation.data import Prompt

SEED = 42
ASKED = 100  # of the 500 that are generated, as HELMET does
_TEXTS = (
    "One of the special magic numbers for long-context is: 7346021.",
    "def window(step: int) -> int:\n\treturn min(8192, 32 + step // 8)\n",
    "Pretraining schedules grow from 0.125 to 1,024; naïve façades, 北京, Ωμέγα, emoji 🙂.",
    "    the quick brown fox jumps over the lazy dog; THE QUICK BROWN FOX 1234567890 f81d4fae-7dec",
)


def tokenizer_hash(folder: Path) -> str:
    """Return 8 digits that tell tokenizers apart: of what it makes of some texts.

    Files differ between a tokenizer and its converted copy in an exported model, which encode
    alike and share their rows.

    Raises:
        UsageError: transformers loads none from the folder.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        ids = [tokenizer(text, add_special_tokens=False).input_ids for text in _TEXTS]
    except (OSError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"{folder} has no tokenizer that transformers loads: {first}") from None
    return hashlib.sha256(repr(ids).encode()).hexdigest()[:8]


def file_name(task: str, length: int, tokenizer: str) -> str:
    """Return the name of the file with a task's rows, in the data folder."""
    return f"long/{task}.{length}.{tokenizer}.jsonl"


def prompts(task: str, length: int, tokenizer: Path) -> list[Prompt]:
    """Generate a task's rows.

    Args:
        task: a name in `tasks.RULER`.
        length: tokens of a row, answer included.
        tokenizer: a folder that transformers loads.

    Raises:
        UsageError: its source texts cannot be had, or nothing fits the length.
    """
    try:
        from lm_eval.tasks.ruler import niah_utils
    except ImportError as error:
        raise UsageError(f"RULER needs lm-eval: pip install '.[evaluate]' ({error}).") from None
    random.seed(SEED)
    try:
        rows: list[dict[str, Any]] = list(
            getattr(niah_utils, task)(max_seq_lengths=[length], tokenizer=str(tokenizer))["test"]
        )
    except Exception as error:  # the hub, a token limit, a missing package: all its own types
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UsageError(f"{task} at {length} tokens could not be generated: {first}") from None
    if not rows:
        raise UsageError(
            f"{task} has no row that fits {length} tokens, answer included. Give a longer --length."
        )
    return [
        Prompt(str(number), f"{row['input']} {row['gen_prefix']}", tuple(row["outputs"]))
        for number, row in enumerate(rows)
    ]
