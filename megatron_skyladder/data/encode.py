"""A batch of raw input -> token arrays: what a worker process does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from megatron_skyladder.data.indexed import fit_tokens
from megatron_skyladder.data.sources import HEAD_BYTES, Batch, advice_on, compression_of
from megatron_skyladder.data.tokenizers import Tokenizer

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
EXCERPT = 60  # characters of a bad line that are shown
TOKENIZER_ERRORS = (ValueError, TypeError, OverflowError)  # texts a tokenizer cannot take


class Documents(NamedTuple):
    """Documents laid out one after the other, as `IndexedWriter.add_documents` takes them."""

    tokens: np.ndarray
    sequence_lengths: np.ndarray
    num_sequences: np.ndarray


class BadDocument(NamedTuple):
    """A line (row, file) that holds no document: which one of the batch, from 0, and why."""

    item: int
    reason: str


@dataclass(frozen=True)
class EncodedBatch:
    """One batch's documents for each key, and what could not be read."""

    documents: dict[str, Documents]
    bad: list[BadDocument] = field(default_factory=list)


class Encoder:
    """Turns batches into tokens.

    Args:
        tokenizer: see tokenizers.py.
        keys: the fields of a document that are encoded, each into an output of its own.
        append_eod: whether the end-of-document token follows each document that has tokens.
        dtype: type of the stored tokens.
    """

    def __init__(
        self, tokenizer: Tokenizer, keys: list[str], *, append_eod: bool, dtype: np.dtype
    ) -> None:
        self._tokenizer, self._keys = tokenizer, keys
        self._append_eod, self._dtype = append_eod, dtype

    def encode(self, batch: Batch) -> EncodedBatch:
        """Return the tokens of the batch's documents, in order, without those that are bad."""
        good: list[tuple[int, dict[str, list[str]]]] = []
        bad: list[BadDocument] = []
        for item, raw in _raw_documents(batch):
            try:
                good.append((item, self._texts(batch.format, raw)))
            except (ValueError, RecursionError) as error:
                bad.append(BadDocument(item, _reason(error, raw)))
        try:
            documents = self._tokenize([texts for _, texts in good])
        except TOKENIZER_ERRORS:
            good, refused = self._one_by_one(good)
            bad = sorted(bad + refused)
            documents = self._tokenize([texts for _, texts in good])
        return EncodedBatch(documents, bad)

    def _texts(self, batch_format: str, raw: Any) -> dict[str, list[str]]:
        """Return the strings of each key, or raise ValueError."""
        if batch_format in ("text", "lines"):
            return {self._keys[0]: [_decoded(raw)]}
        document = json.loads(raw.decode("utf-8")) if batch_format == "jsonl" else raw
        if not isinstance(document, dict):
            raise ValueError(f"a {type(document).__name__} where an object is needed")
        return {key: _strings(document, key) for key in self._keys}

    def _one_by_one(
        self, documents: list[tuple[int, dict[str, list[str]]]]
    ) -> tuple[list[tuple[int, dict[str, list[str]]]], list[BadDocument]]:
        """Split documents into those that the tokenizer takes and those that it refuses."""
        good, bad = [], []
        for item, texts in documents:
            try:
                self._tokenize([texts])
                good.append((item, texts))
            except TOKENIZER_ERRORS as error:
                excerpt = next(iter(texts.values()), [""])[:1]
                bad.append(BadDocument(item, _reason(error, repr(excerpt).encode())))
        return good, bad

    def _tokenize(self, documents: list[dict[str, list[str]]]) -> dict[str, Documents]:
        return {
            key: self._tokenize_key([document[key] for document in documents]) for key in self._keys
        }

    def _tokenize_key(self, documents: list[list[str]]) -> Documents:
        """Encode all strings in one call, then put those of a document together again.

        As in Megatron's tool, a string without tokens makes no sequence, and a document without
        tokens gets no end-of-document token.
        """
        encoded = iter(self._tokenizer.encode_batch(list(chain.from_iterable(documents))))
        sequences: list[list[int]] = []
        num_sequences = []
        for strings in documents:
            own = [ids for _ in strings if (ids := next(encoded))]
            if own and self._append_eod:
                own[-1].append(self._tokenizer.eod)
            sequences += own
            num_sequences.append(len(own))
        lengths = np.array([len(ids) for ids in sequences], dtype="<i4")
        tokens = np.fromiter(
            chain.from_iterable(sequences), dtype=np.int64, count=int(lengths.sum(dtype=np.int64))
        )
        return Documents(
            fit_tokens(tokens, self._dtype), lengths, np.array(num_sequences, dtype=np.int64)
        )


def _raw_documents(batch: Batch) -> Iterator[tuple[int, Any]]:
    """Yield (item, raw document); lines with nothing but white space hold none."""
    if batch.format in ("text", "parquet"):
        yield from enumerate(batch.payload)
        return
    assert isinstance(batch.payload, bytes)
    for item, line in enumerate(batch.payload.split(b"\n")):
        if not batch.first_line and not item:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if line.strip():
            yield item, line.removesuffix(b"\r")


def _decoded(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        compression = compression_of(raw[:HEAD_BYTES])
        if compression is None:
            raise
        raise ValueError(advice_on(compression)) from None


def _strings(document: dict[str, Any], key: str) -> list[str]:
    if key not in document:
        raise ValueError(f"no key {key!r}, it has {', '.join(map(str, document)) or 'none'}")
    text = document[key]
    strings = text if isinstance(text, list) else [text]
    if not all(isinstance(string, str) for string in strings):
        kinds = sorted({type(string).__name__ for string in strings})
        raise ValueError(f"{key!r} is no text but {', '.join(kinds)}")
    return strings


def _reason(error: Exception, raw: Any) -> str:
    shown = raw.decode("utf-8", "replace") if isinstance(raw, bytes) else str(raw)
    shown = shown[:EXCERPT] + ("..." if len(shown) > EXCERPT else "")
    return f"{type(error).__name__}: {error} in {shown!r}"
