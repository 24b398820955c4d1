"""Which keys each rank needs under context parallelism, and who sends them: arithmetic on the host.

Megatron cuts a row of S tokens into 2 * cp_size chunks and gives rank r the chunks r and
2 * cp_size - 1 - r (zigzag). Everything here follows from that, from the fragments of the rows and
from the sliding window, needs only numpy, and comes out the same on every rank:

    cp_size=2, S=16, windows of 6    queries of a chunk see keys back to its first fragment's start

        position   0  1  2  3| 4  5  6  7| 8  9 10 11|12 13 14 15
        chunk          0     |     1     |     2     |     3
        rank           0     |     1     |     1     |     0
        window     0  0  0  0  0  0  1  1  1  1  1  1  2  2  2  2

    rank 1 holds 4..11 and needs 0..3 from rank 0; rank 0 needs nothing, for a window starts at 12.

Words used: a *run* is a stretch of chunks that a rank holds without a gap (two of one chunk, but
one of two chunks on the last rank); *positions* count over all rows of a micro-batch, row after
row; *own tokens* are those that a rank holds, in the order in which it holds them.

The part of a chunk that another rank needs always reaches to the chunk's end, because the needing
run starts at a chunk's start and sees everything from some position up to there. So one number per
(rank, row, chunk), the length of that *tail*, is the whole exchange.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_skyladder.errors import UsageError

Span = tuple[int, int]  # tokens [start, stop)


@dataclass(frozen=True, eq=False)
class KernelCall:
    """One attention call on some of a rank's queries, causal, aligned at the bottom right.

    Args:
        queries: which own tokens, in order.
        keys: which of the own tokens and, counting on after them, the received ones, in order.
        cu_seqlens_q: int32 [N + 1], offsets into these queries.
        cu_seqlens_k: int32 [N + 1], offsets into these keys; the same array where the segments
            have as many keys as queries.
    """

    queries: tuple[Span, ...]
    keys: tuple[Span, ...]
    cu_seqlens_q: np.ndarray
    cu_seqlens_k: np.ndarray


@dataclass(frozen=True, eq=False)
class RankPlan:
    """What one rank does for one micro-batch.

    Args:
        exchanges: whether any rank of the group needs a key of another; then all take part.
        sends: for each rank of the group, the own tokens whose keys and values it gets.
        receives: from each rank of the group, how many tokens; they arrive in this order, each
            rank's by row and position.
        own: the attention that needs no other rank's keys, or None where there is none.
        joined: the attention that does: the first queries of the runs.
    """

    exchanges: bool
    sends: tuple[tuple[Span, ...], ...]
    receives: tuple[int, ...]
    own: KernelCall | None
    joined: KernelCall | None


def chunk_length_of(cp_size: int, seq_length: int) -> int:
    """Return the tokens of a chunk.

    Raises:
        UsageError: the row does not divide into 2 * cp_size chunks.
    """
    if seq_length % (2 * cp_size):
        raise UsageError(
            f"--seq-length={seq_length} does not divide into {2 * cp_size} chunks, two for each of "
            f"{cp_size} context-parallel ranks. Give a multiple of {2 * cp_size}, or another "
            "--context-parallel-size."
        )
    return seq_length // (2 * cp_size)


def held_runs(cp_size: int, rank: int) -> list[Span]:
    """Return the chunks that a rank holds, as spans of chunks without a gap, ascending."""
    last = 2 * cp_size - 1 - rank
    return [(rank, last + 1)] if last == rank + 1 else [(rank, rank + 1), (last, last + 1)]


def chunk_owner(chunk: int, cp_size: int) -> int:
    """Return the rank that holds a chunk."""
    return min(chunk, 2 * cp_size - 1 - chunk)


def first_visible(
    cu_seqlens: np.ndarray, positions: np.ndarray, sliding_window: int | None = None
) -> np.ndarray:
    """Return the position of the first key that the query at each position sees.

    Args:
        cu_seqlens: int [num_fragments + 1], over all rows.
        positions: int [n], of the queries.
        sliding_window: tokens a query sees at most, itself included; None: all of its fragment.
    """
    starts = cu_seqlens[np.searchsorted(cu_seqlens, positions, side="right") - 1].astype(np.int64)
    return starts if sliding_window is None else np.maximum(starts, positions - sliding_window + 1)


def needed_tails(
    cu_seqlens: np.ndarray, *, cp_size: int, seq_length: int, sliding_window: int | None = None
) -> np.ndarray:
    """Return how many tokens at the end of each chunk each rank needs from its owner.

    Args:
        cu_seqlens: int [num_fragments + 1], over all rows; no fragment crosses a row's end.
        cp_size: ranks of the group.
        seq_length: tokens in a row, a multiple of 2 * cp_size.
        sliding_window: see `first_visible`.

    Returns:
        int64 [cp_size, num_rows, 2 * cp_size], in 0..chunk length; 0 for chunks that the rank
        holds itself. The drawing in the module gives [[[0, 0, 0, 0]], [[4, 0, 0, 0]]].

    Raises:
        UsageError: the row does not divide into 2 * cp_size chunks.
    """
    chunk_length = chunk_length_of(cp_size, seq_length)
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

    Raises:
        UsageError: the row does not divide into 2 * cp_size chunks.
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


def _plan_run(
    own: _LaunchBuilder,
    joined: _LaunchBuilder,
    holding: _Holding,
    cu_seqlens: np.ndarray,
    start: int,
    stop: int,
    sliding_window: int | None,
) -> None:
    """Add the segments of one run, positions [start, stop), to the two calls.

    With documents or windows the fragment that the run's start cuts needs remote keys as a whole;
    with the sliding window only the first queries do, and the others of that fragment see keys back
    to the run's start:

        keys      . . . .|a a a a a a
        queries          |x x x y y y     sliding_window=4: x joined, y own with 3 + 3 keys
    """
    reach = int(first_visible(cu_seqlens, np.array([start]), sliding_window)[0])
    head_stop = own_keys = start
    if reach < start:
        fragment_stop = min(int(cu_seqlens[np.searchsorted(cu_seqlens, start, "right")]), stop)
        head_stop = own_keys = fragment_stop
        if sliding_window is not None and start + sliding_window - 1 < fragment_stop:
            head_stop, own_keys = start + sliding_window - 1, start
        keys = [*holding.spans(reach, start), *holding.spans(start, head_stop)]
        joined.add(holding.spans(start, head_stop), keys, np.array([head_stop]), start, reach)
    if head_stop < stop:
        first = np.searchsorted(cu_seqlens, head_stop, side="right")
        ends = np.append(cu_seqlens[first : np.searchsorted(cu_seqlens, stop)], stop)
        spans = holding.spans(head_stop, stop), holding.spans(own_keys, stop)
        own.add(*spans, ends, head_stop, own_keys)


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


class _LaunchBuilder:
    """Collects segments one run after the other."""

    def __init__(self) -> None:
        self._queries: list[Span] = []
        self._keys: list[Span] = []
        self._lengths_q: list[np.ndarray] = []
        self._lengths_k: list[np.ndarray] = []

    def add(
        self, queries: list[Span], keys: list[Span], ends: np.ndarray, q_start: int, k_start: int
    ) -> None:
        """Add segments that end at the positions ``ends``; the first begins at the two starts."""
        self._queries += queries
        self._keys += keys
        lengths = np.diff(ends, prepend=q_start)
        self._lengths_q.append(lengths)
        if k_start != q_start:
            lengths = lengths.copy()
            lengths[0] += q_start - k_start
        self._lengths_k.append(lengths)

    def build(self) -> KernelCall | None:
        """Return the call of what was added, or None."""
        if not self._queries:
            return None
        cu_seqlens_q = cu_seqlens_k = _offsets(self._lengths_q)
        if any(q is not k for q, k in zip(self._lengths_q, self._lengths_k, strict=True)):
            cu_seqlens_k = _offsets(self._lengths_k)
        return KernelCall(
            merge_spans(self._queries), merge_spans(self._keys), cu_seqlens_q, cu_seqlens_k
        )


def _offsets(lengths: list[np.ndarray]) -> np.ndarray:
    joined = np.concatenate(lengths)
    return np.concatenate(([0], np.cumsum(joined))).astype(np.int32)


def merge_spans(spans: list[Span]) -> tuple[Span, ...]:
    """Join spans that follow on each other without a gap, and drop empty ones."""
    merged: list[Span] = []
    for start, stop in spans:
        if start == stop:
            continue
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return tuple(merged)
