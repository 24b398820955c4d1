"""Which tokens may see each other: documents and the window grid, as offsets on the host.

Everything here is arithmetic on one packed sequence of ``seq_length`` tokens and needs only numpy.
The rule (arXiv:2503.15450, A.5): windows lie on a fixed grid over the sequence, documents end after
their end-of-document token, and attention crosses neither.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np

Tokens = TypeVar("Tokens", int, np.ndarray)


def document_ends(tokens: np.ndarray, eod: int) -> np.ndarray:
    """Return the exclusive end of each document in a row, int32 [num_documents], ascending.

    A document ends after its end-of-document token; what follows the last one is a document
    that the sequence cut off, so the last entry is always ``len(tokens)``.
    """
    ends = np.flatnonzero(tokens == eod).astype(np.int32) + 1
    if ends.size == 0 or ends[-1] != tokens.shape[0]:
        ends = np.append(ends, np.int32(tokens.shape[0]))
    return ends


def fragment_cu_seqlens(
    document_ends: np.ndarray, *, seq_length: int, window_len: int
) -> np.ndarray:
    """Return the offsets that attention may not cross.

    Windows sit on a fixed grid over the sequence (0, w, 2w, ...); they do not restart at each
    document. A fragment is one document cut by that grid (arXiv:2503.15450, A.5). Example,
    seq_length=8, window_len=4, documents of 3 and 5 tokens:

        document   a a a b b b b b
        window     0 0 0 0 1 1 1 1
        fragment   0 0 0 1 2 2 2 2      -> cu_seqlens = [0, 3, 4, 8]

    Args:
        document_ends: int, [num_documents], exclusive end of each document in tokens, ascending;
            the last document may be cut off by the sequence, and an empty array is one document.
        seq_length: tokens in the sequence.
        window_len: tokens, 1 <= window_len <= seq_length.

    Returns:
        int32, [num_fragments + 1], on the host. Steps are in 1..window_len.

    Raises:
        ValueError: window_len is outside its range, or document_ends is not ascending within it.
    """
    if not 1 <= window_len <= seq_length:
        raise ValueError(
            f"window_len={window_len} does not fit a sequence of {seq_length} tokens. "
            f"Give 1 <= window_len <= {seq_length}."
        )
    ends = np.asarray(document_ends, dtype=np.int32)
    if ends.size and (ends[0] < 1 or ends[-1] > seq_length or np.any(ends[1:] <= ends[:-1])):
        raise ValueError(
            f"document_ends has to ascend within 1..{seq_length}, but it runs from {ends[0]} to "
            f"{ends[-1]}{' with repeats or steps back' if np.any(np.diff(ends) <= 0) else ''}."
        )
    grid = np.arange(0, seq_length + window_len, window_len, dtype=np.int32)
    grid[-1] = seq_length
    if ends.size == 0:
        return grid
    merged = np.concatenate((grid, ends))
    merged.sort(kind="stable")  # two sorted runs: timsort merges them in one pass
    keep = np.empty(merged.shape, dtype=bool)
    keep[0] = True
    np.not_equal(merged[1:], merged[:-1], out=keep[1:])
    return merged[keep]


def rows_cu_seqlens(rows: list[np.ndarray]) -> np.ndarray:
    """Join the cu_seqlens of several sequences that are laid out one after the other.

    Args:
        rows: int32 [num_fragments_i + 1] each, from 0 to that sequence's length.

    Returns:
        int32, [sum(num_fragments_i) + 1], from 0 to the token total.
    """
    parts = [rows[0][:1]]
    offset = 0
    for row in rows:
        parts.append(row[1:] + np.int32(offset))
        offset += int(row[-1])
    return np.concatenate(parts)


def visible_pairs(cu_seqlens: np.ndarray, *, window_len: int | None = None) -> int:
    """Count the (query, key) pairs that causal attention computes within the fragments.

    Args:
        cu_seqlens: int, [num_fragments + 1].
        window_len: tokens each query sees at most, itself included, as in sliding attention;
            None for all of the fragment before it.
    """
    lengths = np.diff(cu_seqlens).astype(np.int64)
    full = lengths * (lengths + 1) // 2
    if window_len is None:
        return int(full.sum())
    beyond = np.maximum(lengths - window_len, 0)
    return int((full - beyond * (beyond + 1) // 2).sum())


def window_pairs(
    window_len: Tokens, seq_length: int, *, sliding: bool = False, own_window: Tokens | None = None
) -> Tokens:
    """Count the (query, key) pairs of one sequence without documents, in closed form.

    Args:
        window_len: tokens, an int or an int64 array; the result is the like.
        seq_length: tokens in the sequence.
        sliding: whether the window slides.
        own_window: tokens that a query of a local layer sees at most (see `local_layers`), also
            one for each window; None: of a global layer.
    """
    if sliding:
        if own_window is not None:
            window_len = window_len - (window_len - own_window) * (window_len > own_window)
        slid: Tokens = _seen(seq_length, window_len)
        return slid
    limit = window_len if own_window is None else own_window
    whole, rest = divmod(seq_length, window_len)
    pairs: Tokens = whole * _seen(window_len, limit) + _seen(rest, limit)
    return pairs


def _seen(length: Any, at_most: Any) -> Any:
    """Count the pairs of a fragment whose queries see so many tokens at most."""
    beyond = (length - at_most) * (length > at_most)
    return length * (length + 1) // 2 - beyond * (beyond + 1) // 2


def dense_mask(
    seq_length: int,
    *,
    window_len: int,
    document_ends: np.ndarray | None = None,
    sliding: bool = False,
    own_window: int | None = None,
) -> np.ndarray:
    """Return the whole mask, bool [seq_length, seq_length], True where query i sees key j.

    The oracle of the tests, written pair by pair from the definition. Slow on purpose.
    """
    ends = [] if document_ends is None else [int(end) for end in document_ends]
    mask = np.zeros((seq_length, seq_length), dtype=bool)
    for query in range(seq_length):
        for key in range(query + 1):
            same_document = not any(key < end <= query for end in ends)
            if sliding:
                in_window = key > query - window_len
            else:
                in_window = key // window_len == query // window_len
            in_own_window = own_window is None or query - key < own_window
            mask[query, key] = same_document and in_window and in_own_window
    return mask
