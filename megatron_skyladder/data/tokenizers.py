"""Megatron's ``--tokenizer-type`` names -> one small interface that encodes texts in batches.

The ids, the end-of-document token and the vocabulary size are those of Megatron 0.19, so that what
is prepared here fits a training run with the same flags. Each tokenizer is a value that pickles,
so that it is built once and handed to the worker processes.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol


class Tokenizer(Protocol):
    """What the rest of the package asks of a tokenizer."""

    eod: int
    vocab_size: int

    @property
    def identity(self) -> bytes:
        """Everything that decides the ids, for telling two tokenizers apart."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, without an end-of-document token."""

    def decode(self, ids: list[int]) -> str:
        """Return the text of these ids, special tokens included where the library can."""


def fingerprint(tokenizer: Tokenizer) -> str:
    """Return a short text that is equal for tokenizers that give the same ids."""
    parts = f"{type(tokenizer).__name__} {tokenizer.vocab_size} {tokenizer.eod} ".encode()
    return hashlib.sha256(parts + tokenizer.identity).hexdigest()[:16]


class FastTokenizer:
    """The Rust tokenizer of a Hugging Face folder."""

    def __init__(
        self, backend: Any, *, eod: int, vocab_size: int, special: bool, split_special: bool = False
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.json = backend.to_str()
        self.eod, self.vocab_size = eod, vocab_size
        self.special, self.split_special = special, split_special

    @cached_property
    def _backend(self) -> Any:
        from tokenizers import Tokenizer as Backend

        backend = Backend.from_str(self.json)
        backend.encode_special_tokens = self.split_special
        return backend

    @property
    def identity(self) -> bytes:
        return f"{self.special} {self.split_special} {self.json}".encode()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=self.special)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_backend"}


class SlowTokenizer:
    """A Hugging Face tokenizer as transformers runs it; each process loads it for itself."""

    def __init__(
        self, path: str, *, special: bool, trust_remote_code: bool, local_only: bool = False
    ) -> None:
        self.path, self.special, self.trust_remote_code = path, special, trust_remote_code
        self.local_only = local_only
        self.eod = checked_eod(self.wrapped.eos_token_id, path)
        self.vocab_size = len(self.wrapped)

    @cached_property
    def wrapped(self) -> Any:
        """What AutoTokenizer returns, with the special tokens that Megatron's wrapper adds."""
        from transformers import AutoTokenizer

        try:
            wrapped = AutoTokenizer.from_pretrained(
                self.path,
                trust_remote_code=self.trust_remote_code,
                local_files_only=self.local_only,
            )
        except Exception as error:
            where = "" if Path(self.path).exists() else " (not here, so taken for a hub name)"
            raise ValueError(
                f"--tokenizer-model={self.path}{where} could not be loaded by transformers: {error}"
            ) from error
        _fill_in_special_tokens(wrapped)
        return wrapped

    @property
    def identity(self) -> bytes:
        vocab = sorted(self.wrapped.get_vocab().items())
        return repr((type(self.wrapped).__name__, self.special, vocab)).encode()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self._encode(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return self.wrapped.decode(ids)

    def _encode(self, text: str) -> list[int]:
        if self.special:
            return self.wrapped(text).input_ids
        return self.wrapped.convert_tokens_to_ids(self.wrapped.tokenize(text))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "wrapped"}


class SentencePiece:
    """A SentencePiece model; no token is put in front, as in Megatron 0.17 and later."""

    def __init__(self, path: Path) -> None:
        self.model = path.read_bytes()
        self.vocab_size = self._processor.get_piece_size()
        self.eod = checked_eod(self._processor.eos_id(), str(path))

    @cached_property
    def _processor(self) -> Any:
        from sentencepiece import SentencePieceProcessor

        return SentencePieceProcessor(model_proto=self.model)

    @property
    def identity(self) -> bytes:
        return self.model

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._processor.encode(texts, out_type=int, num_threads=1)

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_processor"}


class TikToken:
    """A tiktoken vocabulary in Megatron's JSON form."""

    def __init__(self, encoding: Any, *, eod: int, vocab_size: int) -> None:
        self.encoding, self.eod, self.vocab_size = encoding, eod, vocab_size

    @property
    def identity(self) -> bytes:
        state = self.encoding.__getstate__()
        return repr(
            [state[name] for name in ("pat_str", "mergeable_ranks", "special_tokens")]
        ).encode()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encoding.encode(text, allowed_special="all") for text in texts]

    def decode(self, ids: list[int]) -> str:
        return self.encoding.decode(ids)


class NullTokenizer:
    """Numbers written out, separated by single spaces; for synthetic data."""

    def __init__(self, *, eod: int, vocab_size: int) -> None:
        self.eod, self.vocab_size = eod, vocab_size

    @property
    def identity(self) -> bytes:
        return b""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [[int(word) for word in text.split(" ")] for text in texts]

    def decode(self, ids: list[int]) -> str:
        return " ".join(str(token) for token in ids)


def checked_eod(eod: int | None, model: str) -> int:
    if eod is None or eod < 0:
        raise ValueError(
            f"--tokenizer-model={model} has no end-of-document token: Megatron takes eos_token "
            "(Hugging Face) or the model's eos_id (SentencePiece). Set eos_token in "
            "tokenizer_config.json, or train the model with one."
        )
    return eod


def _fill_in_special_tokens(wrapped: Any) -> None:
    """Let eos and sep, bos and cls stand in for each other, as Megatron's wrapper does."""
    pairs = (("eos_token", "sep_token"), ("sep_token", "eos_token"), ("bos_token", "cls_token"))
    missing = {
        name: getattr(wrapped, other)
        for name, other in (*pairs, ("cls_token", "bos_token"))
        if getattr(wrapped, name, None) is None and getattr(wrapped, other, None)
    }
    wrapped.add_special_tokens(missing)
