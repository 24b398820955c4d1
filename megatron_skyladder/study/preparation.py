"""The study's text as Megatron's files: corpus, tokenizer, .bin/.idx; what is made stays made."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_skyladder.data import tokenizer_flags
from megatron_skyladder.data.bpe import train_tokenizer
from megatron_skyladder.data.prepare import Request, prepare
from megatron_skyladder.data.progress import Progress
from megatron_skyladder.errors import UsageError
from megatron_skyladder.files import write_text
from megatron_skyladder.study import corpus
from megatron_skyladder.study.settings import Study

REQUEST = "request.json"
TOKENIZER_CHARACTERS = 20_000_000  # of the training text, which is in a random order


def make(
    study: Study,
    output: Path,
    report: Callable[[str], None],
    on_progress: Callable[[Progress], None] = lambda progress: None,
    workers: int = 1,
) -> dict[str, Any]:
    """Make what is not there yet.

    Args:
        study: names the packages and the vocabulary.
        output: the study's folder; all goes below its ``corpus``.
        report: called with lines about what is made.
        on_progress: called while documents are encoded.
        workers: processes that encode.

    Returns:
        The corpus' record, with tokens, and ``identity``: what a run goes on with.

    Raises:
        UsageError: a package cannot be had, or the folder's text was made by other settings.
    """
    folder = output / "corpus"
    _check_request(study, folder)
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
        request = Request([str(folder / name)], str(folder / part), workers=workers)
        (made,) = prepare(request, built, on_progress)
        tokens[part] = made["tokens"]
    digest = hashlib.sha256((folder / corpus.RECORD).read_bytes())
    digest.update((tokenizer / "tokenizer.json").read_bytes())
    return {**record, "tokens": tokens, "identity": digest.hexdigest()[:16]}


def _check_request(study: Study, folder: Path) -> None:
    """Note what the text is made of, and raise where other text is there already."""
    request = json.loads(
        json.dumps(
            {
                "packages": [asdict(package) for package in study.packages],
                "validation-share": study.validation_share,
                "vocab-size": study.vocab_size,
            }
        )
    )
    path = folder / REQUEST
    if path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name, value in request.items() if earlier.get(name) != value]
        if changed:
            raise UsageError(
                f"the text in {folder} was made with other {' and '.join(changed)} in [corpus], "
                "and its runs go on with it. Give another --output, or delete the folder of text "
                "and the runs."
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(request, indent=1) + "\n")
