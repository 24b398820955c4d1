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
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def tokenizer_hash(folder: Path) -> str:
    """Return the first 8 digits of the sha256 of a tokenizer's files.

    Raises:
        UsageError: the folder has none.
    """
    paths = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not paths:
        raise UsageError(
            f"{folder} has no tokenizer: needed is one of {', '.join(TOKENIZER_FILES)}, as "
            "skyladder export-hf writes them."
        )
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


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
