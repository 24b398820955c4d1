"""A byte-level BPE tokenizer trained on the text at hand, where no model decides which one."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from megatron_skyladder.files import write_text

END_OF_DOCUMENT = "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], folder: Path, vocab_size: int) -> None:
    """Train a tokenizer and save it as Hugging Face's loaders expect it.

    Args:
        texts: documents.
        folder: made where it is not there; gets tokenizer.json last.
        vocab_size: entries, `END_OF_DOCUMENT` and the 256 bytes among them.

    Raises:
        ImportError: tokenizers is not installed.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_DOCUMENT,
        "clean_up_tokenization_spaces": False,
    }
    write_text(folder / "tokenizer_config.json", json.dumps(settings, indent=2))
    write_text(folder / "tokenizer.json", tokenizer.to_str())
