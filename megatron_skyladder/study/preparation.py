"""The study's text as Megatron's files: corpus, tokenizer, .bin/.idx; what is made stays made."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_skyladder.data import tokenizer_flags
from megatron_skyladder.data.bpe import train_tokenizer
from megatron_skyladder.data.prepare import Request, prepare
from megatron_skyladder.data.progress import Progress
from megatron_skyladder.study import corpus
from megatron_skyladder.study.settings import Study

TOKENIZER_CHARACTERS = 20_000_000  # of the training text, which is in a random order


def make(
    study: Study,
    output: Path,
    report: Callable[[str], None],
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Make what is not there yet.

    Args:
        study: names the packages and the vocabulary.
        output: the study's folder; all goes below its ``corpus``.
        report: called with lines about what is made.
        on_progress: called while documents are encoded.

    Returns:
        The corpus' record, with tokens, and ``identity``: what a run goes on with.

    Raises:
        UsageError: a package cannot be had.
    """
    folder = output / "corpus"
    record = corpus.build(study.packages, folder, study.validation_share, report)
    tokenizer = folder / "tokenizer"
    if not (tokenizer / "tokenizer.json").exists():
        report(f"tokenizer: byte-level BPE with {study.vocab_size:,} entries")
        texts = corpus.texts(folder / corpus.TRAIN, TOKENIZER_CHARACTERS)
        train_tokenizer(texts, tokenizer, study.vocab_size)
    parser = argparse.ArgumentParser()
    tokenizer_flags.add_arguments(parser)
    given = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer)]
    built = tokenizer_flags.build_tokenizer(parser.parse_args(given))
    tokens = {}
    for part, name in (("train", corpus.TRAIN), ("validation", corpus.VALIDATION)):
        request = Request([str(folder / name)], str(folder / part))
        (made,) = prepare(request, built, on_progress)
        tokens[part] = made["tokens"]
    digest = hashlib.sha256((folder / corpus.RECORD).read_bytes())
    digest.update((tokenizer / "tokenizer.json").read_bytes())
    return {**record, "tokens": tokens, "identity": digest.hexdigest()[:16]}
