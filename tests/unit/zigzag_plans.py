"""The exchange plan for Megatron's zigzag alone, chunk by chunk: an oracle of plans for any pieces.

It is what the package had while zigzag was the only layout.
"""

from __future__ import annotations

import numpy as np

from megatron_skyladder.ladder.key_exchange import (
    RankPlan,
    Span,
    _LaunchBuilder,
    _plan_run,
    first_visible,
    merge_spans,
)


def held_runs(cp_size: int, rank: int) -> list[Span]:
    """Return the chunks that a rank holds, as spans of chunks without a gap, ascending."""
    last = 2 * cp_size - 1 - rank
    return [(rank, last + 1)] if last == rank + 1 else [(rank, rank + 1), (last, last + 1)]


def chunk_owner(chunk: int, cp_size: int) -> int:
    """Return the rank that holds a chunk."""
    return min(chunk, 2 * cp_size - 1 - chunk)


def needed_tails(
    cu_seqlens: np.ndarray, *, cp_size: int, seq_length: int, sliding_window: int | None = None
) -> np.ndarray:
    """Return how many tokens at the end of each chunk each rank needs from its owner.

    Args:
        cu_seqlens: int [num_fragments + 1], over all rows; no fragment crosses a row's end.
        cp_size: ranks of the group.
        seq_length: tokens of a sequence, a multiple of 2 * cp_size.
        sliding_window: see `first_visible`.

    Returns:
        int64 [cp_size, num_rows, 2 * cp_size], in 0..chunk length; 0 for chunks that the rank
        holds itself. The drawing in the module gives [[[0, 0, 0, 0]], [[4, 0, 0, 0]]].
    """
    chunk_length = seq_length // (2 * cp_size)
    row_starts = np.arange(int(cu_seqlens[-1]) // seq_length, dtype=np.int64) * seq_length
    chunk_ends = np.arange(1, 2 * cp_size + 1, dtype=np.int64) * chunk_length
    tails = np.zeros((cp_size, len(row_starts), 2 * cp_size), dtype=np.int64)
    for rank in range(cp_size):
        for first, _ in held_runs(cp_size, rank):
            starts = row_starts + first * chunk_length
            reach = first_visible(cu_seqlens, starts, sliding_window) - row_starts
            needed = np.clip(chunk_ends[:first] - reach[:, None], 0, chunk_length)
            tails[rank, :, :first] = np.maximum(tails[rank, :, :first], needed)
        tails[rank, :, [rank, 2 * cp_size - 1 - rank]] = 0
    return tails


def exchange_plan(
    cu_seqlens: np.ndarray,
    *,
    cp_size: int,
    rank: int,
    seq_length: int,
    sliding_window: int | None = None,
) -> RankPlan:
    """Return what one rank sends, receives and attends to.

    Args:
        cu_seqlens: int [num_fragments + 1], over all whole rows, the same on every rank.
        cp_size: ranks of the group.
        rank: in the group.
        seq_length: tokens in a whole row.
        sliding_window: see `first_visible`.
    """
    tails = needed_tails(
        cu_seqlens, cp_size=cp_size, seq_length=seq_length, sliding_window=sliding_window
    )
    holding = _Holding(cp_size, rank, seq_length, tails)
    own, joined = _LaunchBuilder(), _LaunchBuilder()
    for row in range(tails.shape[1]):
        for first, last in held_runs(cp_size, rank):
            start, stop = (row * seq_length + chunk * holding.chunk for chunk in (first, last))
            _plan_run(own, joined, holding, cu_seqlens, start, stop, sliding_window)
    return RankPlan(
        exchanges=bool(tails.any()),
        sends=tuple(holding.sends(tails[other]) for other in range(cp_size)),
        receives=tuple(holding.received_from),
        own=own.build(),
        joined=joined.build(),
    )


class _Holding:
    """Where a rank finds each position: among its own tokens, or behind them among the received."""

    def __init__(self, cp_size: int, rank: int, seq_length: int, tails: np.ndarray) -> None:
        self.cp_size, self.rank, self.seq_length = cp_size, rank, seq_length
        self.chunk = seq_length // (2 * cp_size)
        num_rows = tails.shape[1]
        self.num_rows = num_rows
        self._chunk_stops: dict[tuple[int, int], int] = {}  # (row, chunk): own or received index
        for row in range(num_rows):
            for place, chunk in enumerate(self._chunks_of(rank)):
                self._chunk_stops[row, chunk] = (2 * row + place + 1) * self.chunk
        received = 2 * num_rows * self.chunk
        self.received_from = []
        for other in range(cp_size):
            before = received
            for row in range(num_rows) if other != rank else ():
                for chunk in self._chunks_of(other):
                    received += int(tails[rank, row, chunk])
                    self._chunk_stops[row, chunk] = received
            self.received_from.append(received - before)

    def _chunks_of(self, rank: int) -> tuple[int, int]:
        return rank, 2 * self.cp_size - 1 - rank

    def spans(self, start: int, stop: int) -> list[Span]:
        """Return where the positions [start, stop) are; those of other ranks have to be tails."""
        spans = []
        while start < stop:
            row, within = divmod(start, self.seq_length)
            chunk = within // self.chunk
            chunk_stop = row * self.seq_length + (chunk + 1) * self.chunk
            end = self._chunk_stops[row, chunk]
            part = min(stop, chunk_stop)
            spans.append((end - (chunk_stop - start), end - (chunk_stop - part)))
            start = part
        return spans

    def sends(self, tails: np.ndarray) -> tuple[Span, ...]:
        """Return the own tokens that go to the rank with these tails, [num_rows, 2 * cp_size]."""
        spans = []
        for row in range(self.num_rows):
            for chunk in self._chunks_of(self.rank):
                end = self._chunk_stops[row, chunk]
                spans.append((end - int(tails[row, chunk]), end))
        return merge_spans(spans)
