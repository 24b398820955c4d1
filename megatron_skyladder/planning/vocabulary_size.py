"""How many tokens a launch's vocabulary has, from its tokenizer's files; no library is needed.

The sizes are those of Megatron's tokenizers, before Megatron pads them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

GPT2_VOCABULARY = 50_257  # of GPT-2's own files, whatever they are called
_SENTENCEPIECE = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")


class UnknownVocabularyError(Exception):
    """The size cannot be read; the message says why and what to give."""


def vocabulary_size(kind: str | None, model: str | None, vocab_file: str | None) -> int:
    """Return the tokens of a vocabulary.

    Args:
        kind: ``--tokenizer-type``.
        model: ``--tokenizer-model``.
        vocab_file: ``--vocab-file``.

    Raises:
        UnknownVocabularyError: the files are not here, or this kind is not read.
    """
    if kind == "GPT2BPETokenizer":
        if vocab_file and Path(vocab_file).is_file():
            return len(_json(Path(vocab_file)))
        return GPT2_VOCABULARY
    if kind == "HuggingFaceTokenizer" and model:
        return _huggingface(Path(model))
    if kind in _SENTENCEPIECE and model:
        return _pieces(_existing(Path(model)))
    given = f"--tokenizer-type {kind} does not tell it" if kind else "no tokenizer is named"
    raise UnknownVocabularyError(f"the vocabulary is not known ({given}): give --vocab-size")


def _huggingface(path: Path) -> int:
    file = path / "tokenizer.json" if path.is_dir() else path
    content = _json(_existing(file))
    vocabulary = content.get("model", {}).get("vocab", {})
    tokens = set(vocabulary) if isinstance(vocabulary, dict) else {pair[0] for pair in vocabulary}
    added = {entry["content"] for entry in content.get("added_tokens", ())}
    config = file.with_name("tokenizer_config.json")
    if config.is_file():  # what transformers adds on loading
        decoder = _json(config).get("added_tokens_decoder", {})
        added |= {entry["content"] for entry in decoder.values()}
    return len(tokens | added)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UnknownVocabularyError(
            f"the vocabulary is not known ({path} is not here): give --vocab-size"
        )
    return path


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UnknownVocabularyError(f"{path} is no JSON file: give --vocab-size") from None


def _pieces(path: Path) -> int:
    """Count the pieces of a SentencePiece model: field 1 of its protocol buffer, one for each."""
    try:
        return sum(field == 1 for field in _fields(path.read_bytes()))
    except (IndexError, ValueError):
        raise UnknownVocabularyError(
            f"{path} is no SentencePiece model: give --vocab-size"
        ) from None


def _fields(data: bytes) -> Iterator[int]:
    """Yield the number of each field of a protocol buffer message, skipping their content."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            _, at = _varint(data, at)
        elif kind == 2:
            length, at = _varint(data, at)
            at += length
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise ValueError("no such kind of field")
        if at > len(data):
            raise ValueError("a field ends behind the message")
        yield key >> 3


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return a number of 7 bits a byte, lowest first, and the index behind it."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
