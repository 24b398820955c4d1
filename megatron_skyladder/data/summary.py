"""What is in a .bin/.idx pair, counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from megatron_skyladder.data.indexed import IndexedReader

CHUNK = 1 << 24  # tokens that are looked at together
PERCENTILES = (50, 90, 99)


def summarize(
    reader: IndexedReader,
    *,
    eod: int | None,
    seq_length: int,
    report: Callable[[float], None] = lambda share: None,
) -> dict[str, Any]:
    """Count documents, tokens, lengths, end-of-document tokens and what sequences would hold.

    Args:
        reader: the pair; all of its tokens are read once.
        eod: the end-of-document token; None takes what most documents end in.
        seq_length: tokens in a training sequence.
        report: called with the share of the tokens that have been read.

    Returns:
        plain values, for JSON.

    Raises:
        ValueError: seq_length is below 1.
    """
    if seq_length < 1:
        raise ValueError(f"--seq-length={seq_length}: give 1 or more tokens.")
    lengths = reader.document_lengths
    return {
        "prefix": reader.prefix,
        "dtype": reader.dtype.name,
        "documents": len(reader),
        "empty_documents": int((lengths == 0).sum()),
        "sequences": len(reader.sequence_lengths),
        "tokens": reader.num_tokens,
        "lengths": length_statistics(lengths),
        "eod": eod_check(reader, common_last_token(reader) if eod is None else eod, report),
        "rows": row_statistics(reader.document_starts, seq_length),
    }


def length_statistics(lengths: np.ndarray) -> dict[str, Any]:
    """Describe the documents' lengths in tokens, with a histogram over powers of two.

    The histogram's entries are (low, high, documents, tokens) for low <= length <= high.
    """
    if not len(lengths):
        return {"histogram": []}
    # 0, 1, 2-3, 4-7, ...: the number of bits of a length is its bucket
    buckets = np.frexp(lengths.astype(np.float64))[1]
    histogram = []
    for bucket in range(int(buckets.min()), int(buckets.max()) + 1):
        inside = lengths[buckets == bucket]
        low, high = (1 << bucket) >> 1, (1 << bucket) - 1
        histogram.append((low, high, len(inside), int(inside.sum())))
    return {
        "min": int(lengths.min()),
        "mean": float(lengths.mean()),
        "max": int(lengths.max()),
        **{f"p{p}": float(np.percentile(lengths, p)) for p in PERCENTILES},
        "histogram": histogram,
    }


def common_last_token(reader: IndexedReader) -> int | None:
    """Return the token that most documents end in, None where there are no documents."""
    ends = _ends(reader)
    if not len(ends):
        return None
    values, counts = np.unique(reader.tokens[ends - 1], return_counts=True)
    return int(values[counts.argmax()])


def eod_check(
    reader: IndexedReader, eod: int | None, report: Callable[[float], None] = lambda share: None
) -> dict[str, Any]:
    """Count documents that do not end in the end-of-document token, or have one inside.

    Both show attention the wrong document ends: with intra-document masking, a document without
    one runs into the next, and one inside cuts it in two.
    """
    ends = _ends(reader)
    without = np.flatnonzero(reader.tokens[ends - 1] != eod)
    inside, first_inside, largest = 0, None, None
    for start in range(0, reader.num_tokens, CHUNK):
        chunk = reader.tokens[start : start + CHUNK]
        largest = max(int(chunk.max()), largest or 0)
        found = np.flatnonzero(chunk == eod) + start
        # in its place where a document ends right after it; no token is beyond the last end
        lost = found[ends[np.searchsorted(ends, found + 1)] != found + 1]
        inside += len(lost)
        if first_inside is None and len(lost):
            first_inside = _document_at(reader, int(lost[0]))
        report(min(1.0, (start + CHUNK) / reader.num_tokens))
    first_without = _document_at(reader, int(ends[without[0]]) - 1) if len(without) else None
    return {
        "id": eod,
        "documents_without": len(without),
        "first_without": first_without,
        "inside": inside,
        "first_inside": first_inside,
        "largest_token": largest,
    }


def row_statistics(document_starts: np.ndarray, seq_length: int) -> dict[str, Any]:
    """Count the sequences of seq_length tokens that hold parts of several documents, in file order.

    Megatron shuffles the documents before it packs them, which changes the sequences but hardly the
    share. As in Megatron a row counts where the label of its last token is there too, which is one
    token more: 16 tokens are three rows of 4, and 17 are four.

    Args:
        document_starts: int, [num_documents + 1], first token of each document and the total.
        seq_length: tokens of a sequence.
    """
    num_rows = max(0, int(document_starts[-1]) - 1) // seq_length
    boundaries = np.unique(document_starts)
    boundaries = boundaries[(boundaries < num_rows * seq_length) & (boundaries % seq_length > 0)]
    several = len(np.unique(boundaries // seq_length))
    return {
        "seq_length": seq_length,
        "rows": num_rows,
        "with_several_documents": several / num_rows if num_rows else None,
        "mean_documents": 1 + len(boundaries) / num_rows if num_rows else None,
    }


def _ends(reader: IndexedReader) -> np.ndarray:
    """Return the exclusive ends of the documents that have tokens, ascending."""
    starts = reader.document_starts
    return starts[1:][starts[1:] > starts[:-1]]


def _document_at(reader: IndexedReader, token: int) -> int:
    return int(np.searchsorted(reader.document_starts, token, side="right")) - 1
