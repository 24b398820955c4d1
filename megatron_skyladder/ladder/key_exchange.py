"""Which keys each rank needs under context parallelism, and who sends them: arithmetic on the host.

Each rank holds some pieces of every sequence (`sequence_layout`). Everything here follows from
them, from the fragments and from the sliding window, needs only numpy, and comes out the same on
every rank:

    cp_size=2, S=16, windows of 6    queries of a piece see keys back to its first fragment's start

    position   0  1  2  3| 4  5  6  7| 8  9 10 11|12 13 14 15
    piece          0     |     1     |     2     |     3          Megatron's zigzag
    rank           0     |     1     |     1     |     0
    window     0  0  0  0  0  0  1  1  1  1  1  1  2  2  2  2

    rank 1 holds 4..11 and needs 0..3 from rank 0; rank 0 needs nothing, for a window starts at 12.

Words used: a *run* is a stretch of pieces that a rank holds without a gap (above, rank 0 has two of
one piece and rank 1 has one of two); *positions* count over all sequences of a micro-batch, one
after the other; *own tokens* are those that a rank holds, in the order in which it holds them.

The part of a piece that another rank needs always reaches to the piece's end, because the needing
run starts where a piece ends and sees everything from some position up to there. So one number per
(rank, sequence, piece), the length of that *tail*, is the whole exchange.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_skyladder.ladder.sequence_layout import Layout, Span


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
            rank's by sequence and position.
        own: the attention that needs no other rank's keys, or None where there is none.
        joined: the attention that does: the first queries of the runs.
    """

    exchanges: bool
    sends: tuple[tuple[Span, ...], ...]
    receives: tuple[int, ...]
    own: KernelCall | None
    joined: KernelCall | None


def first_visible(
    cu_seqlens: np.ndarray, positions: np.ndarray, sliding_window: int | None = None
) -> np.ndarray:
    """Return the position of the first key that the query at each position sees.

    Args:
        cu_seqlens: int [num_fragments + 1], over all sequences.
        positions: int [n], of the queries.
        sliding_window: tokens a query sees at most, itself included; None: all of its fragment.
    """
    starts = cu_seqlens[np.searchsorted(cu_seqlens, positions, side="right") - 1].astype(np.int64)
    return starts if sliding_window is None else np.maximum(starts, positions - sliding_window + 1)


def needed_tails(
    cu_seqlens: np.ndarray, layouts: Sequence[Layout], *, sliding_window: int | None = None
) -> list[np.ndarray]:
    """Return how many tokens at the end of each piece each rank needs from its owner.

    Args:
        cu_seqlens: int [num_fragments + 1], over all sequences; no fragment crosses the end of one.
        layouts: of each sequence; all are equally long and for equally many ranks.
        sliding_window: see `first_visible`.

    Returns:
        For each sequence int64 [cp_size, num_pieces], in 0..the piece's length; 0 for pieces that
        the rank holds itself. The drawing in the module gives [[[0, 0, 0, 0], [4, 0, 0, 0]]].
    """
    seq_length = layouts[0].seq_length
    assert int(cu_seqlens[-1]) == len(layouts) * seq_length
    tails = [np.empty(0, dtype=np.int64)] * len(layouts)
    for layout in {id(layout): layout for layout in layouts}.values():
        sequences = [index for index, each in enumerate(layouts) if each is layout]
        found = _tails_of_one_layout(cu_seqlens, layout, np.array(sequences), sliding_window)
        for index, sequence in enumerate(sequences):
            tails[sequence] = found[index]
    return tails


def _tails_of_one_layout(
    cu_seqlens: np.ndarray, layout: Layout, sequences: np.ndarray, sliding_window: int | None
) -> np.ndarray:
    """Return the tails in the sequences of a layout, [num_sequences, cp_size, num_pieces]."""
    starts, stops, owners = np.array(layout.pieces, dtype=np.int64).T
    begins = sequences[:, None] * layout.seq_length
    tails = np.zeros((len(sequences), layout.cp_size, len(starts)), dtype=np.int64)
    for rank, runs in enumerate(layout.runs):
        run_starts = np.array([start for start, _ in runs], dtype=np.int64)
        queries = begins + run_starts
        reach = first_visible(cu_seqlens, queries.ravel(), sliding_window).reshape(queries.shape)
        # [num_sequences, runs, pieces]; a run sees pieces before it only
        needed = np.clip(stops - (reach - begins)[:, :, None], 0, stops - starts)
        needed *= starts < run_starts[:, None]
        tails[:, rank] = needed.max(axis=1) * (owners != rank)
    return tails


def exchange_plan(
    cu_seqlens: np.ndarray,
    layouts: Sequence[Layout],
    *,
    rank: int,
    sliding_window: int | None = None,
) -> RankPlan:
    """Return what one rank sends, receives and attends to.

    Args:
        cu_seqlens: int [num_fragments + 1], over all whole sequences, the same on every rank.
        layouts: of each sequence, the same on every rank; see `needed_tails`.
        rank: in the group.
        sliding_window: see `first_visible`.
    """
    tails = needed_tails(cu_seqlens, layouts, sliding_window=sliding_window)
    holding = _Holding(layouts, rank, tails)
    own, joined = _LaunchBuilder(), _LaunchBuilder()
    for index, layout in enumerate(layouts):
        begin = index * layout.seq_length
        for start, stop in layout.runs[rank]:
            args = cu_seqlens, begin + start, begin + stop, sliding_window
            _plan_run(own, joined, holding, *args)
    return RankPlan(
        exchanges=any(bool(each.any()) for each in tails),
        sends=tuple(holding.sends(other) for other in range(layouts[0].cp_size)),
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
    """Where a rank finds each position: among its own tokens, or behind them among the received.

    Args:
        layouts: of each sequence.
        rank: in the group.
        tails: of `needed_tails`.
    """

    def __init__(self, layouts: Sequence[Layout], rank: int, tails: list[np.ndarray]) -> None:
        self.rank = rank
        self.seq_length = layouts[0].seq_length
        self._layouts = layouts
        self._tails = tails
        self._piece_starts = [[piece.start for piece in layout.pieces] for layout in layouts]
        self._ends: list[list[int]] = [[0] * len(layout.pieces) for layout in layouts]
        self.received_from = []
        offset = 0
        for index, layout in enumerate(layouts):
            for number, (start, stop, owner) in enumerate(layout.pieces):
                if owner == rank:
                    offset += stop - start
                    self._ends[index][number] = offset
        for other in range(layouts[0].cp_size):
            before = offset
            for index, layout in enumerate(layouts) if other != rank else ():
                needed = tails[index][rank].tolist()
                for number, piece in enumerate(layout.pieces):
                    if piece.rank == other:
                        offset += needed[number]
                        self._ends[index][number] = offset
            self.received_from.append(offset - before)

    def spans(self, start: int, stop: int) -> list[Span]:
        """Return where the positions [start, stop) are; those of other ranks have to be tails."""
        spans = []
        while start < stop:
            index, within = divmod(start, self.seq_length)
            number = bisect_right(self._piece_starts[index], within) - 1
            piece_stop = index * self.seq_length + self._layouts[index].pieces[number].stop
            end = self._ends[index][number]
            part = min(stop, piece_stop)
            spans.append((end - (piece_stop - start), end - (piece_stop - part)))
            start = part
        return spans

    def sends(self, other: int) -> tuple[Span, ...]:
        """Return the own tokens that go to another rank."""
        spans = []
        for index, layout in enumerate(self._layouts):
            needed = self._tails[index][other].tolist()
            for number, piece in enumerate(layout.pieces):
                if piece.rank == self.rank:
                    end = self._ends[index][number]
                    spans.append((end - needed[number], end))
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
