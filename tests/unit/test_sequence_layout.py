"""Which tokens each rank holds: equal tokens, equal work, by counting every query's keys."""

from __future__ import annotations

from itertools import chain, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_skyladder.ladder.fragments import fragment_cu_seqlens
from megatron_skyladder.ladder.sequence_layout import (
    Kind,
    Layout,
    LayoutRule,
    Piece,
    _shells,
    by_fragments,
    by_positions,
    by_window,
    zigzag,
)

LENGTH = 32_768
RAMP = [int(32 + (LENGTH - 32) * (2 * step + 1) / 80) // 128 * 128 for step in range(40)]


def keys_seen(lengths: list[int]) -> np.ndarray:
    """How many keys each query sees within its fragment, by counting."""
    return np.concatenate([np.arange(1, length + 1) for length in lengths])


def grid(seq_length: int, window_len: int) -> list[int]:
    no_documents = np.empty(0, np.int32)
    offsets = fragment_cu_seqlens(no_documents, seq_length=seq_length, window_len=window_len)
    return np.diff(offsets).tolist()


def imbalance(layout: Layout, seen: np.ndarray) -> float:
    """The busiest rank's work over the mean."""
    work = [seen[layout.positions(rank)].sum() for rank in range(layout.cp_size)]
    return float(max(work) / np.mean(work))


def owners(layout: Layout) -> np.ndarray:
    owner = np.full(layout.seq_length, -1)
    for rank in range(layout.cp_size):
        owner[layout.positions(rank)] = rank
    return owner


def test_the_drawing() -> None:
    layout = by_window(16, 2, 6)
    assert "".join(map(str, owners(layout))) == "0000001111110110"
    seen = keys_seen(grid(16, 6))
    assert [int(seen[layout.positions(rank)].sum()) for rank in (0, 1)] == [26, 26]
    assert layout.runs == (((0, 6), (12, 13), (15, 16)), ((6, 12), (13, 15)))


def test_three_shells_of_one_fragment() -> None:
    """The other drawing: shares of 4, 2 and 2 tokens, the largest outermost."""
    pieces = _shells(0, 8, [(1, 2), (0, 4), (2, 2)], 1)
    rank_of = np.repeat([piece.rank for piece in pieces], [p.stop - p.start for p in pieces])
    assert "".join(map(str, rank_of)) == "00122100"
    assert np.bincount(rank_of, weights=keys_seen([8])).tolist() == [18, 9, 9]


@pytest.mark.parametrize("cp_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("seq_length", [48, 480])
def test_the_full_window_is_megatrons_zigzag(seq_length: int, cp_size: int) -> None:
    chunks = np.arange(seq_length).reshape(2 * cp_size, -1)
    for layout in (
        zigzag(seq_length, cp_size),
        by_window(seq_length, cp_size, seq_length),
        by_fragments([seq_length], cp_size),
        by_positions(seq_length, cp_size, seq_length),
    ):
        assert layout.is_zigzag
        for rank in range(cp_size):
            expected = chunks[[rank, 2 * cp_size - 1 - rank]].ravel()
            assert layout.positions(rank).tolist() == expected.tolist()
        assert layout.order.tolist() == list(range(seq_length))
    if cp_size > 1:
        assert not by_window(seq_length, cp_size, seq_length // 2 + 1).is_zigzag


@pytest.mark.parametrize("cp_size", [2, 3, 4, 8])
def test_ranks_hold_whole_windows_where_windows_fill_a_rank(cp_size: int) -> None:
    seq_length = 48 * cp_size
    for window_len in (1, 2, 3, 8, 16, 24, 48):
        owner = owners(by_window(seq_length, cp_size, window_len)).reshape(-1, window_len)
        assert (owner == owner[:, :1]).all(), window_len


@st.composite
def fragments(draw: st.DrawFn) -> tuple[list[int], int]:
    """Lengths of fragments, and cp_size."""
    cp_size = draw(st.integers(1, 8))
    seq_length = 2 * cp_size * draw(st.integers(1, 40))
    ends = draw(st.sets(st.integers(1, seq_length - 1), max_size=20))
    return np.diff([0, *sorted(ends), seq_length]).tolist(), cp_size


@settings(max_examples=300, deadline=None)
@given(fragments(), st.sampled_from([1, 4, 16]))
def test_every_token_is_held_once_and_few_fragments_are_shared(
    case: tuple[list[int], int], align: int
) -> None:
    lengths, cp_size = case
    seq_length = sum(lengths)
    layout = by_fragments(lengths, cp_size, align=align)
    positions = np.concatenate([layout.positions(rank) for rank in range(cp_size)])
    assert sorted(positions) == list(range(seq_length))
    for rank in range(cp_size):
        held = layout.positions(rank)
        assert len(held) == seq_length // cp_size
        assert (np.diff(held) > 0).all()
    owner = owners(layout)
    edges = np.cumsum([0, *lengths])
    shared = [len(set(owner[a:b])) > 1 for a, b in pairwise(edges)]
    assert sum(shared) <= 2 * (cp_size - 1)
    if align == 1:  # cuts lie between tokens; an odd share's head is one token longer
        seen = keys_seen(lengths)
        work = [int(seen[layout.positions(rank)].sum()) for rank in range(cp_size)]
        off = max(abs(each - np.mean(work)) for each in work)
        assert off <= cp_size * max(lengths), (work, layout.pieces)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 8), st.integers(1, 40), st.data())
def test_megatrons_cut_of_the_reordered_sequence_yields_the_pieces(
    cp_size: int, chunk: int, data: st.DataObject
) -> None:
    seq_length = 2 * cp_size * chunk
    window_len = data.draw(st.integers(1, seq_length))
    make = data.draw(st.sampled_from([by_window, by_positions]))
    layout = make(seq_length, cp_size, window_len)
    chunks = np.arange(seq_length)[layout.order].reshape(2 * cp_size, chunk)
    for rank in range(cp_size):
        cut = chunks[[rank, 2 * cp_size - 1 - rank]].ravel()
        assert cut.tolist() == layout.positions(rank).tolist()


@pytest.mark.parametrize("cp_size", [2, 3, 4, 8, 16])
def test_every_window_of_a_ramp_is_balanced(cp_size: int) -> None:
    length = LENGTH - LENGTH % (2 * cp_size)
    for window_len in RAMP:
        layout, slides = (make(length, cp_size, window_len) for make in (by_window, by_positions))
        tolerance = 1.05 if length // cp_size >= 8192 else 1.001
        assert imbalance(layout, keys_seen(grid(length, window_len))) <= tolerance, window_len
        sees = np.minimum(np.arange(length) + 1, window_len)
        assert imbalance(slides, sees) <= 1.001, window_len
        uneven = window_len - 1  # no multiple of a tile
        seen = keys_seen(grid(length, uneven))
        assert imbalance(by_window(length, cp_size, uneven), seen) <= 1.001, uneven


def test_cuts_on_tiles_cost_little_over_a_ramp() -> None:
    found = [imbalance(by_window(LENGTH, 4, w), keys_seen(grid(LENGTH, w))) for w in RAMP]
    assert np.mean(found) <= 1.01 and max(found) <= 1.03
    zigzags = [imbalance(zigzag(LENGTH, 4), keys_seen(grid(LENGTH, w))) for w in RAMP]
    assert np.mean(zigzags) > 1.3  # what it is for


@pytest.mark.parametrize("cp_size", [2, 4])
def test_windows_of_whole_tiles_are_cut_on_tiles(cp_size: int) -> None:
    """Where kernels compute tiles of 128 x 128; a short sequence is cut where work is equal."""
    for window_len in RAMP:
        starts = [piece.start for piece in by_window(LENGTH, cp_size, window_len).pieces]
        assert not any(start % window_len % 128 for start in starts), window_len
    pieces = by_window(1024, cp_size, 384).pieces
    assert any(piece.start % 384 % 128 for piece in pieces)


@pytest.mark.parametrize("cp_size", [2, 3])
def test_a_rule_answers_for_each_sequence(cp_size: int) -> None:
    """Three sequences of 48 tokens, windows of 20: documents end at 7, 30; nowhere; at 1 and 47."""
    lengths = [[7, 13, 10, 10, 8], [20, 20, 8], [1, 19, 20, 7, 1]]
    cu_seqlens = np.cumsum([0, *chain.from_iterable(lengths)])

    def pieces(kind: Kind, offsets: np.ndarray | None, *, sliding: bool = False) -> list[Any]:
        layouts = LayoutRule(kind, 48, cp_size, 20, sliding).layouts(3, offsets)
        return [layout.pieces for layout in layouts]

    of_documents = [by_fragments(each, cp_size).pieces for each in lengths]
    assert len(set(of_documents)) == 3
    assert pieces(Kind.SEQUENCE, cu_seqlens) == of_documents
    of_windows = [by_window(48, cp_size, 20).pieces] * 3
    assert pieces(Kind.SEQUENCE, None) == pieces(Kind.WINDOW, cu_seqlens) == of_windows
    for kind in (Kind.SEQUENCE, Kind.WINDOW):
        slid = pieces(kind, cu_seqlens, sliding=True)
        assert slid == [by_positions(48, cp_size, 20).pieces] * 3
    for sliding in (False, True):
        found = pieces(Kind.ZIGZAG, cu_seqlens, sliding=sliding)
        assert found == [zigzag(48, cp_size).pieces] * 3


@pytest.mark.parametrize("mean", [300, 1200, 6000])
@pytest.mark.parametrize("cp_size", [2, 4, 8, 16])
def test_documents_of_any_lengths_are_balanced(cp_size: int, mean: int) -> None:
    generator = np.random.default_rng(cp_size * mean)
    for window_len in (1000, 4096, LENGTH):
        sizes = np.maximum(1, generator.lognormal(np.log(mean) - 0.72, 1.2, LENGTH)).astype(int)
        ends = np.cumsum(sizes)
        ends = ends[ends < LENGTH].astype(np.int32)
        cut = fragment_cu_seqlens(ends, seq_length=LENGTH, window_len=window_len)
        lengths = np.diff(cut).tolist()
        assert imbalance(by_fragments(lengths, cp_size), keys_seen(lengths)) <= 1.002


def test_a_sequence_that_does_not_divide() -> None:
    for make in (
        lambda: zigzag(16, 3),
        lambda: by_window(16, 3, 4),
        lambda: by_positions(16, 3, 4),
    ):
        with pytest.raises(ValueError, match=r"--seq-length=16 does not divide into 6 chunks"):
            make()


def test_pieces_have_to_be_a_layout() -> None:
    with pytest.raises(AssertionError, match="do not follow on each other"):
        Layout(2, (Piece(0, 4, 0), Piece(5, 9, 1)))
    with pytest.raises(AssertionError, match="hold"):
        Layout(2, (Piece(0, 4, 0), Piece(4, 6, 1)))
