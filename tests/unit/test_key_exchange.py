"""Who needs which keys: hand-drawn rows, and the dense mask as the oracle of every rank's plan."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import zigzag_plans
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_skyladder.ladder.exchange_costs import gathered_tokens, key_value_bytes, rank_costs
from megatron_skyladder.ladder.fragments import dense_mask, fragment_cu_seqlens, rows_cu_seqlens
from megatron_skyladder.ladder.key_exchange import (
    KernelCall,
    RankPlan,
    exchange_plan,
    first_visible,
    merge_spans,
    needed_tails,
)
from megatron_skyladder.ladder.sequence_layout import (
    Layout,
    Piece,
    by_fragments,
    by_positions,
    by_window,
    zigzag,
)


def offsets(window_len: int, ends: tuple[int, ...] = (), seq_length: int = 16) -> np.ndarray:
    return fragment_cu_seqlens(
        np.array(ends, np.int32), seq_length=seq_length, window_len=window_len
    )


ZIGZAG = [zigzag(16, 2)]


@pytest.mark.parametrize(
    ("cu_seqlens", "sliding_window", "tails"),
    [
        # chunks of 4: rank 0 holds 0..3 and 12..15, rank 1 holds 4..11
        (offsets(6), None, [[0, 0, 0, 0], [4, 0, 0, 0]]),  # the drawing in the module
        (offsets(4), None, [[0, 0, 0, 0], [0, 0, 0, 0]]),  # windows end with chunks: nothing
        (offsets(2), None, [[0, 0, 0, 0], [0, 0, 0, 0]]),
        (offsets(8), None, [[0, 0, 4, 0], [4, 0, 0, 0]]),
        (offsets(16), None, [[0, 4, 4, 0], [4, 0, 0, 0]]),  # the whole row: everything before
        (offsets(5), None, [[0, 0, 2, 0], [4, 0, 0, 0]]),  # windows start at 0, 5, 10, 15
        (offsets(16, (3, 10)), None, [[0, 0, 2, 0], [1, 0, 0, 0]]),  # documents start at 3, 10
        (offsets(16, (4, 12)), None, [[0, 0, 0, 0], [0, 0, 0, 0]]),
        (offsets(16), 3, [[0, 0, 2, 0], [2, 0, 0, 0]]),  # two keys before the query
        (offsets(16), 1, [[0, 0, 0, 0], [0, 0, 0, 0]]),
        (offsets(16), 8, [[0, 3, 4, 0], [4, 0, 0, 0]]),  # 12 sees 5..12, 4 sees 0..4
        (offsets(16, (3, 10)), 8, [[0, 0, 2, 0], [1, 0, 0, 0]]),  # the nearer of the two
    ],
)
def test_tails_by_hand(
    cu_seqlens: np.ndarray, sliding_window: int | None, tails: list[list[int]]
) -> None:
    (found,) = needed_tails(cu_seqlens, ZIGZAG, sliding_window=sliding_window)
    assert found.tolist() == tails


def test_the_plan_of_the_drawing() -> None:
    ranks = [exchange_plan(offsets(6), ZIGZAG, rank=rank) for rank in (0, 1)]
    assert all(plan.exchanges for plan in ranks)
    assert [plan.sends for plan in ranks] == [((), ((0, 4),)), ((), ())]
    assert [plan.receives for plan in ranks] == [(0, 0), (4, 0)]
    assert ranks[0].joined is None
    # rank 1: positions 4, 5 with the keys 0..5; then 6..11 by themselves
    joined, own = ranks[1].joined, ranks[1].own
    assert joined is not None and own is not None
    assert (joined.queries, joined.keys) == (((0, 2),), ((8, 12), (0, 2)))
    assert (joined.cu_seqlens_q.tolist(), joined.cu_seqlens_k.tolist()) == ([0, 2], [0, 6])
    assert (own.queries, own.keys, own.cu_seqlens_q.tolist()) == (((2, 8),), ((2, 8),), [0, 6])
    assert own.cu_seqlens_k is own.cu_seqlens_q


def test_only_the_first_queries_of_a_sliding_window_wait() -> None:
    plan = exchange_plan(offsets(16), ZIGZAG, rank=1, sliding_window=3)
    joined, own = plan.joined, plan.own
    assert joined is not None and own is not None
    assert (joined.queries, joined.keys) == (((0, 2),), ((8, 10), (0, 2)))
    assert (own.queries, own.keys) == (((2, 8),), ((0, 8),))
    assert (own.cu_seqlens_q.tolist(), own.cu_seqlens_k.tolist()) == ([0, 6], [0, 8])


def test_a_rank_without_remote_keys_knows_that_others_have_some() -> None:
    plan = exchange_plan(offsets(6), ZIGZAG, rank=0)
    assert plan.exchanges and plan.joined is None and sum(plan.receives) == 0
    quiet = exchange_plan(offsets(4), ZIGZAG, rank=0)
    assert not quiet.exchanges
    assert quiet.own is not None and quiet.own.queries == ((0, 8),)


def test_spans_that_touch_are_joined() -> None:
    assert merge_spans([(0, 2), (2, 5), (5, 5), (7, 8), (0, 1)]) == ((0, 5), (7, 8), (0, 1))


@dataclass(frozen=True)
class Case:
    """A random micro-batch: what cuts it, who holds it, and the dense mask over all sequences."""

    layouts: list[Layout]
    cu_seqlens: np.ndarray
    sliding_window: int | None
    mask: np.ndarray
    is_zigzag: bool

    @property
    def cp_size(self) -> int:
        return self.layouts[0].cp_size

    def plans(self) -> list[RankPlan]:
        return [
            exchange_plan(
                self.cu_seqlens, self.layouts, rank=rank, sliding_window=self.sliding_window
            )
            for rank in range(self.cp_size)
        ]

    def own_positions(self, rank: int) -> np.ndarray:
        """Positions of a rank's tokens over all sequences, in the order in which it has them."""
        parts = [
            layout.positions(rank) + index * layout.seq_length
            for index, layout in enumerate(self.layouts)
        ]
        return np.concatenate(parts)


@st.composite
def any_pieces(draw: st.DrawFn, seq_length: int, cp_size: int) -> Layout:
    """Equal numbers of tokens anywhere."""
    ranks = draw(st.permutations([r for r in range(cp_size) for _ in range(seq_length // cp_size)]))
    return Layout(cp_size, tuple(Piece(i, i + 1, rank) for i, rank in enumerate(ranks)))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    cp_size = draw(st.integers(1, 5))
    seq_length = 2 * cp_size * draw(st.integers(1, 6))
    window_len = draw(st.integers(1, seq_length))
    sliding = draw(st.booleans())
    kind = draw(st.sampled_from(["zigzag", "window", "positions", "fragments", "any", "mixed"]))
    num_rows = draw(st.integers(1, 2))
    rows, mask = [], np.zeros((num_rows * seq_length,) * 2, dtype=bool)
    layouts = []
    for row in range(num_rows):
        ends = np.array(sorted(draw(st.sets(st.integers(1, seq_length), max_size=6))), np.int32)
        cut = seq_length if sliding else window_len
        rows.append(fragment_cu_seqlens(ends, seq_length=seq_length, window_len=cut))
        block = slice(row * seq_length, (row + 1) * seq_length)
        mask[block, block] = dense_mask(
            seq_length, window_len=window_len, document_ends=ends, sliding=sliding
        )
        if kind == "zigzag" or (kind == "mixed" and row == 0):
            layouts.append(zigzag(seq_length, cp_size))
        elif kind == "window":
            layouts.append(by_window(seq_length, cp_size, window_len))
        elif kind == "positions":
            layouts.append(by_positions(seq_length, cp_size, window_len))
        elif kind == "any":
            layouts.append(draw(any_pieces(seq_length, cp_size)))
        else:
            align = draw(st.sampled_from([1, 4]))
            layouts.append(by_fragments(np.diff(rows[-1]).tolist(), cp_size, align=align))
    window = window_len if sliding else None
    return Case(layouts, rows_cu_seqlens(rows), window, mask, kind == "zigzag")


def visible_in(
    call: KernelCall, own: np.ndarray, received: np.ndarray, sliding_window: int | None
) -> list[tuple[int, list[int]]]:
    """(query position, key positions) of a call, by the definition of the bottom-right mask."""
    keys_at_hand = np.concatenate((own, received))
    queries = np.concatenate([own[slice(*span)] for span in call.queries])
    keys = np.concatenate([keys_at_hand[slice(*span)] for span in call.keys])
    assert (len(queries), len(keys)) == (call.cu_seqlens_q[-1], call.cu_seqlens_k[-1])
    seen = []
    for (q_start, q_stop), (k_start, k_stop) in zip(
        pairwise(call.cu_seqlens_q), pairwise(call.cu_seqlens_k), strict=True
    ):
        for query in range(q_start, q_stop):
            last = k_stop - (q_stop - query)
            first = k_start if sliding_window is None else max(k_start, last - sliding_window + 1)
            seen.append((int(queries[query]), keys[first : last + 1].tolist()))
    return seen


@settings(max_examples=500, deadline=None)
@given(cases())
def test_every_rank_sees_what_the_dense_mask_says_and_fetches_no_more(case: Case) -> None:
    plans, mask = case.plans(), case.mask
    own = [case.own_positions(rank) for rank in range(case.cp_size)]
    for rank, plan in enumerate(plans):
        # what arrives is what the others send, in the order of the ranks
        messages = [
            np.concatenate([own[other][slice(*span)] for span in plans[other].sends[rank]] or [[]])  # type: ignore[list-item]
            for other in range(case.cp_size)
        ]
        assert tuple(len(message) for message in messages) == plan.receives
        received = np.concatenate(messages).astype(int)
        needed = np.flatnonzero(mask[own[rank]].any(axis=0))
        assert sorted(received) == sorted(set(needed) - set(own[rank]))
        seen = []
        for call in (plan.own, plan.joined):
            if call is not None:
                seen += visible_in(call, own[rank], received, case.sliding_window)
        assert sorted(query for query, _ in seen) == sorted(own[rank])
        for query, keys in seen:
            assert keys == np.flatnonzero(mask[query]).tolist()
        if plan.own is not None:  # nothing of it waits
            assert all(stop <= len(own[rank]) for _, stop in plan.own.keys)
    assert {plan.exchanges for plan in plans} == {any(sum(plan.receives) for plan in plans)}


def assert_same_call(call: KernelCall | None, other: KernelCall | None) -> None:
    assert (call is None) == (other is None)
    if call is None or other is None:
        return
    assert (call.queries, call.keys) == (other.queries, other.keys)
    assert call.cu_seqlens_q.tolist() == other.cu_seqlens_q.tolist()
    assert call.cu_seqlens_k.tolist() == other.cu_seqlens_k.tolist()
    assert (call.cu_seqlens_q is call.cu_seqlens_k) == (other.cu_seqlens_q is other.cu_seqlens_k)


@settings(max_examples=300, deadline=None)
@given(cases().filter(lambda case: case.is_zigzag))
def test_zigzags_pieces_give_zigzags_plan(case: Case) -> None:
    """Field by field, as it was planned chunk by chunk."""
    for rank, plan in enumerate(case.plans()):
        expected = zigzag_plans.exchange_plan(
            case.cu_seqlens,
            cp_size=case.cp_size,
            rank=rank,
            seq_length=case.layouts[0].seq_length,
            sliding_window=case.sliding_window,
        )
        assert plan.exchanges == expected.exchanges
        assert plan.sends == expected.sends
        assert plan.receives == expected.receives
        assert_same_call(plan.own, expected.own)
        assert_same_call(plan.joined, expected.joined)


@pytest.mark.parametrize("cp_size", [2, 3, 4])
def test_windows_that_fill_a_rank_send_nothing(cp_size: int) -> None:
    seq_length = 24 * cp_size
    for window_len in (1, 2, 3, 4, 6, 8, 12, 24):
        cut = offsets(window_len, seq_length=seq_length)
        plan = exchange_plan(cut, [by_window(seq_length, cp_size, window_len)], rank=0)
        assert not plan.exchanges, window_len
    # under zigzag a window of a rank's whole part already needs keys of another
    assert exchange_plan(cut, [zigzag(seq_length, cp_size)], rank=0).exchanges


@settings(max_examples=200, deadline=None)
@given(cases())
def test_costs_are_those_of_the_dense_mask(case: Case) -> None:
    mask = case.mask
    assert (
        first_visible(case.cu_seqlens, np.arange(len(mask)), case.sliding_window).tolist()
        == mask.argmax(axis=1).tolist()
    )
    costs = rank_costs(case.cu_seqlens, case.layouts, sliding_window=case.sliding_window)
    for rank, plan in enumerate(case.plans()):
        own = case.own_positions(rank)
        assert costs.pairs[rank] == mask[own].sum()
        waiting = [] if plan.joined is None else plan.joined.queries
        assert costs.waiting_pairs[rank] == sum(mask[own[slice(*span)]].sum() for span in waiting)
        assert costs.received[rank] == sum(plan.receives)
        assert costs.sent[rank] == sum(
            stop - start for spans in plan.sends for start, stop in spans
        )


def test_zigzag_balances_the_full_window_and_not_documents() -> None:
    full = rank_costs(offsets(16), ZIGZAG)
    assert full.pairs.tolist() == [68, 68]
    assert full.imbalance == 1.0
    # rank 0 computes chunk 0 (10 pairs) meanwhile; rank 1's chunks both need keys of chunk 0
    assert full.waiting_pairs.tolist() == [58, 68]
    # documents of 12 and 4 tokens: chunks of 4 tokens with 1 + 2 + 3 + 4 = 10, 26, 42 and 10 pairs
    documents = rank_costs(offsets(16, (12,)), ZIGZAG)
    assert documents.pairs.tolist() == [20, 68]
    assert documents.imbalance == pytest.approx(68 / 44)


@pytest.mark.parametrize("cp_size", [2, 4])
def test_the_full_window_fetches_what_lies_before_the_last_chunk(cp_size: int) -> None:
    """Less than an all-gather, which also brings keys that come after every query."""
    length = 16 * cp_size  # chunks of 8
    costs = rank_costs(offsets(length, (), length), [zigzag(length, cp_size)])
    for rank in range(cp_size - 1):  # all before the last chunk, but for the rank's first one
        assert costs.received[rank] == length - (rank + 1) * 8 - 8
    assert costs.received[-1] == (cp_size - 1) * 8
    assert max(costs.received) <= gathered_tokens(cp_size, length) == length - 16


def test_bytes_of_keys_and_values() -> None:
    # 100 tokens, K and V of 8 heads of 128 numbers of 2 bytes
    assert key_value_bytes(100, num_groups=8, head_dim=128, num_bytes=2) == 100 * 2 * 8 * 128 * 2
