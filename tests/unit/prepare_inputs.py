"""Tiny tokenizers and texts that the tests of `skyladder prepare` share."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from typing import Any

import pytest

WORDS = ["the", "cat", "sat", "on", "a", "mat,", "Été", "überall", "日本語", "🙂", "f(x):", "12"]
ODD_TEXTS = ["", " ", "\n", "a </s> b<s>", "x  y   z  ", "e\u0301 ﬁ \u0000 null", "\tdef f():\r\n"]


def make_texts(number: int, seed: int = 0) -> list[str]:
    """Return texts of words, a few odd ones among them, the same for the same seed."""
    chance = random.Random(seed)
    texts = [" ".join(chance.choices(WORDS, k=chance.randint(1, 60))) for _ in range(number)]
    for text in ODD_TEXTS:
        texts.insert(chance.randrange(len(texts)), text)
    return texts


def write_json_lines(path: Path, texts: list[Any]) -> Path:
    lines = (
        json.dumps({"id": i, "text": text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)
    )
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def make_hf_folder(folder: Path, *, bos: bool = False, **settings: Any) -> Path:
    """Train a byte-level BPE and save it as a Hugging Face folder."""
    tokenizers = pytest.importorskip("tokenizers")
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = byte_level(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(make_texts(200), trainer)
    if bos:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    backend.enable_truncation(4)  # Megatron never truncates, whatever the file says
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def make_sentencepiece(path: Path, **options: Any) -> Path:
    """Train a SentencePiece model."""
    sentencepiece = pytest.importorskip("sentencepiece")
    with open(path, "wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text for text in make_texts(300) if text.isprintable()),
            model_writer=model,
            minloglevel=2,
            **{
                "vocab_size": 330,
                "model_type": "bpe",
                "byte_fallback": True,
                "remove_extra_whitespaces": False,
                **options,
            },
        )
    return path


def make_tiktoken(path: Path) -> tuple[Path, int]:
    """Write a vocabulary in Megatron's JSON form; return it with its --vocab-size."""
    tokens = [bytes([i]) for i in range(256)] + [b"th", b"the", b" the", b"at", b" cat"]
    entries = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": ""}
        for rank, token in enumerate(tokens)
    ]
    path.write_text(json.dumps(entries))
    return path, len(tokens) + 1000
