"""Which tokens may see each other: hand-drawn rows, and the slow dense mask as the oracle."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_skyladder.ladder.fragments import (
    dense_mask,
    document_ends,
    fragment_cu_seqlens,
    rows_cu_seqlens,
    visible_pairs,
    window_pairs,
)

EOD = 2


@pytest.mark.parametrize(
    ("tokens", "ends"),
    [
        ([5, 5, EOD, 5, EOD, 5, 5], [3, 5, 7]),  # the last document is cut off by the row
        ([5, 5, EOD], [3]),  # ... or ends with it
        ([5, 5, 5], [3]),
        ([EOD], [1]),
        ([EOD, EOD, 5], [1, 2, 3]),  # a document may be nothing but its end
    ],
)
def test_documents_end_after_their_eod(tokens: list[int], ends: list[int]) -> None:
    found = document_ends(np.array(tokens), EOD)
    assert found.tolist() == ends
    assert found.dtype == np.int32


@pytest.mark.parametrize(
    ("ends", "window_len", "cu_seqlens"),
    [
        ([3, 8], 4, [0, 3, 4, 8]),  # the drawing in the docstring
        ([8], 4, [0, 4, 8]),
        ([], 4, [0, 4, 8]),
        ([], 8, [0, 8]),
        ([], 1, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ([], 3, [0, 3, 6, 8]),  # a short last window
        ([4, 8], 4, [0, 4, 8]),  # a document that ends with a window cuts once
        ([4], 4, [0, 4, 8]),
        ([1, 7], 8, [0, 1, 7, 8]),
        ([1, 2, 3, 4, 5, 6, 7, 8], 8, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ([5], 3, [0, 3, 5, 6, 8]),  # the grid does not restart at the document
    ],
)
def test_fragments_by_hand(ends: list[int], window_len: int, cu_seqlens: list[int]) -> None:
    found = fragment_cu_seqlens(np.array(ends, dtype=int), seq_length=8, window_len=window_len)
    assert found.tolist() == cu_seqlens
    assert found.dtype == np.int32


def test_dense_mask_by_hand() -> None:
    """Documents of 3 and 3 tokens, windows of 2: fragments of 2, 1, 1 and 2."""
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1, 1],
    ]
    mask = dense_mask(6, window_len=2, document_ends=np.array([3, 6]))
    assert mask.astype(int).tolist() == expected


def test_dense_sliding_mask_by_hand() -> None:
    """Two visible tokens, the query included; the documents are of 3 and 2 tokens."""
    expected = [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]
    mask = dense_mask(5, window_len=2, document_ends=np.array([3, 5]), sliding=True)
    assert mask.astype(int).tolist() == expected


# --- against the oracle, over random rows -------------------------------------------------------


@st.composite
def rows(draw: st.DrawFn, longest: int = 40) -> tuple[int, int, np.ndarray]:
    """A row length, a window and document ends in it."""
    seq_length = draw(st.integers(1, longest))
    window_len = draw(st.integers(1, seq_length))
    ends = sorted(draw(st.sets(st.integers(1, seq_length), max_size=12)))
    return seq_length, window_len, np.array(ends, dtype=np.int32)


def mask_of(cu_seqlens: np.ndarray) -> np.ndarray:
    """Return the dense causal mask within fragments."""
    fragment = np.repeat(np.arange(cu_seqlens.size - 1), np.diff(cu_seqlens))
    return np.tril(fragment[:, None] == fragment[None, :])


@given(rows())
def test_fragments_are_the_mask_of_the_definition(row: tuple[int, int, np.ndarray]) -> None:
    seq_length, window_len, ends = row
    cu_seqlens = fragment_cu_seqlens(ends, seq_length=seq_length, window_len=window_len)
    expected = dense_mask(seq_length, window_len=window_len, document_ends=ends)
    assert np.array_equal(mask_of(cu_seqlens), expected)


@given(rows(longest=5000))
def test_fragments_are_the_union_of_grid_and_documents(row: tuple[int, int, np.ndarray]) -> None:
    seq_length, window_len, ends = row
    cu_seqlens = fragment_cu_seqlens(ends, seq_length=seq_length, window_len=window_len)
    grid = range(0, seq_length, window_len)
    assert cu_seqlens.tolist() == sorted({*grid, seq_length, *ends.tolist()})
    steps = np.diff(cu_seqlens)
    assert steps.min() >= 1 and steps.max() <= window_len


@given(rows())
def test_visible_pairs_are_those_of_the_mask(row: tuple[int, int, np.ndarray]) -> None:
    seq_length, window_len, ends = row
    cu_seqlens = fragment_cu_seqlens(ends, seq_length=seq_length, window_len=window_len)
    mask = dense_mask(seq_length, window_len=window_len, document_ends=ends)
    assert visible_pairs(cu_seqlens) == mask.sum()


@given(rows())
def test_sliding_pairs_are_those_of_the_mask(row: tuple[int, int, np.ndarray]) -> None:
    """With a sliding window only documents cut."""
    seq_length, window_len, ends = row
    documents = fragment_cu_seqlens(ends, seq_length=seq_length, window_len=seq_length)
    mask = dense_mask(seq_length, window_len=window_len, document_ends=ends, sliding=True)
    assert visible_pairs(documents, window_len=window_len) == mask.sum()


@given(st.integers(1, 60), st.integers(1, 80), st.booleans())
def test_window_pairs_are_those_of_the_mask(
    seq_length: int, window_len: int, sliding: bool
) -> None:
    """Also for a window longer than the row, which is the whole row."""
    mask = dense_mask(seq_length, window_len=window_len, sliding=sliding)
    assert window_pairs(window_len, seq_length, sliding=sliding) == mask.sum()


def test_pairs_of_a_long_row_do_not_overflow() -> None:
    """2**20 tokens see 2**39 pairs: more than int32 holds."""
    length = 2**20
    assert visible_pairs(np.array([0, length], dtype=np.int32)) == length * (length + 1) // 2


@given(rows())
def test_documents_found_in_a_row_mask_what_was_packed(row: tuple[int, int, np.ndarray]) -> None:
    seq_length, window_len, ends = row
    tokens = np.full(seq_length, 7)
    tokens[ends - 1] = EOD
    found = fragment_cu_seqlens(
        document_ends(tokens, EOD), seq_length=seq_length, window_len=window_len
    )
    expected = fragment_cu_seqlens(ends, seq_length=seq_length, window_len=window_len)
    assert np.array_equal(found, expected)


def test_rows_are_joined_one_after_the_other() -> None:
    joined = rows_cu_seqlens(
        [np.array([0, 3, 8], np.int32), np.array([0, 8], np.int32), np.array([0, 1, 8], np.int32)]
    )
    assert joined.tolist() == [0, 3, 8, 16, 17, 24]
    assert joined.dtype == np.int32


def test_one_row_is_itself() -> None:
    row = np.array([0, 3, 8], np.int32)
    assert rows_cu_seqlens([row]).tolist() == row.tolist()


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("window_len", [0, -1, 9])
def test_a_window_outside_the_row_is_refused(window_len: int) -> None:
    with pytest.raises(
        ValueError, match=f"window_len={window_len} does not fit a sequence of 8 tokens. Give 1 <="
    ):
        fragment_cu_seqlens(np.array([8]), seq_length=8, window_len=window_len)


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ([0, 8], r"has to ascend within 1\.\.8, but it runs from 0 to 8\."),
        ([3, 9], r"has to ascend within 1\.\.8, but it runs from 3 to 9\."),
        ([3, 3, 8], r"but it runs from 3 to 8 with repeats or steps back\."),
        ([5, 3, 8], r"but it runs from 5 to 8 with repeats or steps back\."),
    ],
)
def test_document_ends_that_do_not_ascend_are_refused(ends: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fragment_cu_seqlens(np.array(ends), seq_length=8, window_len=4)
