"""Which tokens of a sequence each context-parallel rank holds: pure arithmetic on the host.

The sequence is cut before it reaches a device, so which tokens a rank holds costs no message. A
layout gives every rank S / cp_size tokens and the same attention work: as many (query, key) pairs
that see each other. It is a function of the sequence's length, the number of ranks and what cuts
attention (the window, or the window and the documents), and the same on every rank, because it is
made of integers only.

*Shells.* A fragment of n tokens, within which attention is causal, is cut into nested shells: a
head and a tail of equal length. Queries of any shell see (n + 1) / 2 keys on average, so within a
fragment work is proportional to tokens, however the fragment is shared:

    position       0  1  2  3  4  5  6  7     one fragment of 8, three shells: work 18, 9 and 9,
    shell          a  a  b  c  c  b  a  a     4.5 for each token; Megatron's zigzag is this with
    keys seen      1  2  3  4  5  6  7  8     equal shells

*Middle cut.* Lay the fragments on a line by ascending length; work per token never falls along it.
An interval of S / cp_size tokens has at most the mean work at the left end of the line and at least
the mean at the right end. In between lies one that has the mean: the first rank's. What is left has
the same mean and is still sorted, so the second rank's is cut out of it in the same way, and so on.
Each cut divides at most two fragments, which ranks then share as shells:

    cp_size=2, S=16, windows of 6        fragments by length    4 | 6 | 6
    position   0           6           12            work 21 + 21 + 10, of which a rank does 26:
    window     0 0 0 0 0 0 1 1 1 1 1 1 2 2 2 2
    rank       0 0 0 0 0 0 1 1 1 1 1 1 0 1 1 0       21 + 1 + 4 and 21 + 2 + 3

Under the sliding mask a query at position p sees min(p + 1, window) keys, which never falls along
the sequence: positions lie on the line as they are, and nothing has to be cut into shells.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property, lru_cache
from itertools import groupby, pairwise
from typing import NamedTuple

import numpy as np

from megatron_skyladder.errors import UsageError

Span = tuple[int, int]  # tokens [start, stop)

TILE = 128  # tokens: FlashAttention's block of queries
# Cuts on whole tiles lose balance (0.7 % at 8,192 tokens a rank, 4 % at 2,048) and save tiles that
# are partly empty (2 %): worth it for long parts only.
_MIN_TOKENS_FOR_TILES = 8192
_TILE_TOLERANCE_PERCENT = 2  # of the work still to be shared: how far a cut may move to a tile


class Piece(NamedTuple):
    """Tokens [start, stop) of a sequence, and the rank that holds them."""

    start: int
    stop: int
    rank: int


@dataclass(frozen=True, eq=False)
class Layout:
    """Who holds what of one sequence.

    A rank has its tokens in ascending order.

    Args:
        cp_size: context-parallel ranks.
        pieces: ascending and without gaps, from 0 to the sequence's length, a multiple of
            2 * cp_size; each rank has equally many tokens.
    """

    cp_size: int
    pieces: tuple[Piece, ...]

    def __post_init__(self) -> None:
        held = [0] * self.cp_size
        at = 0
        for start, stop, rank in self.pieces:
            assert start == at < stop, f"the pieces {self.pieces} do not follow on each other"
            held[rank] += stop - start
            at = stop
        assert set(held) == {at // self.cp_size}, f"the ranks hold {held} tokens"

    @property
    def seq_length(self) -> int:
        """Tokens in the sequence."""
        return self.pieces[-1].stop

    @cached_property
    def runs(self) -> tuple[tuple[Span, ...], ...]:
        """For each rank the stretches that it holds without a gap, ascending."""
        runs: list[list[Span]] = [[] for _ in range(self.cp_size)]
        for start, stop, rank in self.pieces:
            if runs[rank] and runs[rank][-1][1] == start:
                start = runs[rank].pop()[0]
            runs[rank].append((start, stop))
        return tuple(map(tuple, runs))

    def positions(self, rank: int) -> np.ndarray:
        """Return the positions that a rank holds, int64 [seq_length / cp_size], ascending."""
        return np.concatenate([np.arange(start, stop) for start, stop in self.runs[rank]])

    @cached_property
    def order(self) -> np.ndarray:
        """What has to stand where so that Megatron's own zigzag cut yields the pieces.

        int64 [seq_length]: the reordered sequence is ``sequence[order]``. Megatron gives rank r the
        chunks r and 2 * cp_size - 1 - r; they get the first and the second half of what r holds.
        """
        chunk = self.seq_length // (2 * self.cp_size)
        chunks = np.empty((2 * self.cp_size, chunk), dtype=np.int64)
        for rank in range(self.cp_size):
            chunks[[rank, 2 * self.cp_size - 1 - rank]] = self.positions(rank).reshape(2, chunk)
        return chunks.ravel()

    @cached_property
    def is_zigzag(self) -> bool:
        """Whether every rank holds what Megatron gives it."""
        return self.runs == zigzag(self.seq_length, self.cp_size).runs


def chunk_length_of(cp_size: int, seq_length: int) -> int:
    """Return the tokens of one of Megatron's chunks.

    Raises:
        UsageError: the sequence does not divide into 2 * cp_size chunks.
    """
    if seq_length % (2 * cp_size):
        raise UsageError(
            f"--seq-length={seq_length} does not divide into {2 * cp_size} chunks, two for each of "
            f"{cp_size} context-parallel ranks. Give a multiple of {2 * cp_size}, or another "
            "--context-parallel-size."
        )
    return seq_length // (2 * cp_size)


@lru_cache(maxsize=16)
def zigzag(seq_length: int, cp_size: int) -> Layout:
    """Return Megatron's layout: 2 * cp_size chunks, rank r holds r and 2 * cp_size - 1 - r.

    Raises:
        UsageError: the sequence does not divide into 2 * cp_size chunks.
    """
    chunk, last = chunk_length_of(cp_size, seq_length), 2 * cp_size - 1
    pieces = [Piece(i * chunk, (i + 1) * chunk, min(i, last - i)) for i in range(2 * cp_size)]
    return Layout(cp_size, tuple(pieces))


@lru_cache(maxsize=64)
def by_window(seq_length: int, cp_size: int, window_len: int) -> Layout:
    """Return the layout for windows on a fixed grid: the fragments 0..w, w..2w and so on.

    Megatron's zigzag where the window is the whole sequence. Where S / cp_size is a multiple of the
    window, each rank holds whole windows, and nothing is exchanged.

    Args:
        seq_length: tokens in the sequence.
        cp_size: context-parallel ranks.
        window_len: tokens, 1 <= window_len <= seq_length.

    Raises:
        UsageError: the sequence does not divide into 2 * cp_size chunks.
    """
    chunk_length = chunk_length_of(cp_size, seq_length)
    whole, rest = divmod(seq_length, window_len)
    lengths = [window_len] * whole + [rest] * bool(rest)
    on_tiles = 2 * chunk_length >= _MIN_TOKENS_FOR_TILES and window_len % TILE == 0
    return by_fragments(lengths, cp_size, align=TILE if on_tiles else 1)


def by_fragments(lengths: Sequence[int], cp_size: int, *, align: int = 1) -> Layout:
    """Return the layout for any fragments.

    Args:
        lengths: tokens of each fragment, in the sequence's order; their sum is its length.
        cp_size: context-parallel ranks.
        align: tokens; shells begin and end at multiples of it within their fragments, where that
            costs little balance.

    Raises:
        UsageError: the sequence does not divide into 2 * cp_size chunks.
    """
    chunk_length_of(cp_size, sum(lengths))
    pieces: list[Piece] = []
    start = 0
    for length, shares in zip(lengths, _shares(lengths, cp_size, align), strict=True):
        pieces += _shells(start, start + length, shares, align)
        start += length
    return Layout(cp_size, tuple(_merged(pieces)))


def _merged(pieces: list[Piece]) -> Iterator[Piece]:
    """Join neighbours that one rank holds: hundreds of whole windows are one piece."""
    for rank, group in groupby(pieces, key=lambda piece: piece.rank):
        first, *more = group
        yield Piece(first.start, more[-1].stop if more else first.stop, rank)


@lru_cache(maxsize=64)
def by_positions(seq_length: int, cp_size: int, window_len: int) -> Layout:
    """Return the layout for the sliding mask, under which position p sees min(p + 1, w) keys.

    Args:
        seq_length: tokens in the sequence.
        cp_size: context-parallel ranks.
        window_len: tokens that a query sees at most, itself included.

    Raises:
        UsageError: the sequence does not divide into 2 * cp_size chunks.
    """
    quota = 2 * chunk_length_of(cp_size, seq_length)
    if window_len == seq_length:  # whole sequences: shells need fewer keys of other ranks
        return zigzag(seq_length, cp_size)

    def work_before(position: int) -> int:
        ramp = min(position, window_len)
        return ramp * (ramp + 1) // 2 + (position - ramp) * window_len

    left: list[Span] = [(0, seq_length)]
    pieces: list[Piece] = []
    for rank in range(cp_size - 1):
        line = _Line.of(
            [stop - start for start, stop in left],
            [work_before(stop) - work_before(start) for start, stop in left],
        )

        def upto(x: int, line: _Line = line, spans: list[Span] = left) -> int:
            index = line.index_at(x)
            start = spans[index][0]
            within = work_before(start + x - line.tokens[index]) - work_before(start)
            return line.work[index] + within

        cut = line.middle(upto, quota, cp_size - rank)
        remaining = []
        for (start, stop), begins in zip(left, line.tokens, strict=False):
            first = min(max(start + cut - begins, start), stop)
            last = min(max(start + cut + quota - begins, start), stop)
            pieces += [Piece(first, last, rank)] * (first < last)
            remaining += [span for span in ((start, first), (last, stop)) if span[0] < span[1]]
        left = remaining
    pieces += [Piece(start, stop, cp_size - 1) for start, stop in left]
    return Layout(cp_size, tuple(sorted(pieces)))


@lru_cache(maxsize=512)
def of_sequence(lengths: tuple[int, ...], cp_size: int) -> Layout:
    """Return `by_fragments` of one sequence's fragments; the latest few hundred are kept.

    Until the step ends, see `runtime.trainer.begin_step`: hardly a sequence comes again, and with
    its order a layout of 131,072 tokens takes a MiB.
    """
    return by_fragments(lengths, cp_size)


class Kind(Enum):
    """What decides who holds what."""

    ZIGZAG = "zigzag"  # Megatron: the number of ranks alone
    WINDOW = "window"  # the window: every sequence of a step has the same layout
    SEQUENCE = "sequence"  # the window and the sequence's own documents


@dataclass(frozen=True)
class LayoutRule:
    """Which layout the sequences of a micro-batch have: the one answer for all who ask.

    The batch is cut by it, the rotary embedding takes its positions from it, and keys are exchanged
    by it. Should two of them differ, a model would train on wrong positions, in silence.

    Args:
        kind: what decides.
        seq_length: tokens in a sequence.
        cp_size: context-parallel ranks.
        window_len: tokens, 1 <= window_len <= seq_length.
        sliding: whether the window moves along with the query.
    """

    kind: Kind
    seq_length: int
    cp_size: int
    window_len: int
    sliding: bool

    def layouts(
        self, num_sequences: int, cu_seqlens: np.ndarray | None = None
    ) -> tuple[Layout, ...]:
        """Return the layout of each sequence.

        Args:
            num_sequences: in the micro-batch.
            cu_seqlens: int [num_fragments + 1], over all sequences; None where the window alone
                cuts them, which the layouts by the sequence then go by.
        """
        if self.kind is Kind.ZIGZAG:
            return (zigzag(self.seq_length, self.cp_size),) * num_sequences
        if self.sliding:  # documents or not: the last keys before a query cost the most everywhere
            layout = by_positions(self.seq_length, self.cp_size, self.window_len)
            return (layout,) * num_sequences
        if self.kind is Kind.WINDOW or cu_seqlens is None:
            layout = by_window(self.seq_length, self.cp_size, self.window_len)
            return (layout,) * num_sequences
        bounds = np.arange(num_sequences + 1) * self.seq_length
        first, *last = np.searchsorted(cu_seqlens, bounds).tolist()
        assert cu_seqlens[last[-1]] == bounds[-1]
        lengths = np.diff(cu_seqlens).tolist()
        edges = pairwise([first, *last])
        return tuple(of_sequence(tuple(lengths[a:b]), self.cp_size) for a, b in edges)


@dataclass(frozen=True)
class _Line:
    """What is still to be shared, by ascending work per token.

    Args:
        tokens: [N + 1], before each of N items and after the last.
        work: [N + 1], the same of work.
    """

    tokens: list[int]
    work: list[int]

    @classmethod
    def of(cls, tokens: list[int], work: list[int]) -> _Line:
        """Make it of each item's tokens and work."""
        return cls(*([0, *np.cumsum(each, dtype=np.int64).tolist()] for each in (tokens, work)))

    def index_at(self, x: int) -> int:
        """Return the item in which the token x of the line lies; the last one at the line's end."""
        return min(bisect_right(self.tokens, x), len(self.tokens) - 1) - 1

    def middle(self, upto: Callable[[int], int], quota: int, num_ranks: int, align: int = 1) -> int:
        """Return where an interval of ``quota`` tokens begins that has the mean work.

        Args:
            upto: the work of the line's first x tokens.
            quota: tokens of a rank.
            num_ranks: that share the line.
            align: begin at a multiple of it, where the work stays near enough to the mean.
        """
        total, end = self.work[-1], self.tokens[-1] - quota

        def excess(x: int) -> int:  # over the mean, times num_ranks; never falls
            return (upto(x + quota) - upto(x)) * num_ranks - total

        low, high = 0, end
        while low < high:
            middle = (low + high) // 2
            if excess(middle) >= 0:
                high = middle
            else:
                low = middle + 1
        if align == 1:
            return low
        near = [x for x in (low // align * align, -(-low // align) * align) if x <= end]
        near = [x for x in near if 100 * abs(excess(x)) <= _TILE_TOLERANCE_PERCENT * total]
        return min(near, key=lambda x: abs(excess(x)), default=low)


def _shares(lengths: Sequence[int], cp_size: int, align: int) -> list[list[tuple[int, int]]]:
    """Return for each fragment which ranks hold how many of its tokens: [(rank, tokens), ...]."""
    quota = sum(lengths) // cp_size
    left = sorted(enumerate(lengths), key=lambda item: item[1])
    shares: list[list[tuple[int, int]]] = [[] for _ in lengths]
    for rank in range(cp_size - 1):
        # twice the work, which is a whole number: n of its tokens see n * (length + 1) / 2 keys
        line = _Line.of([n for _, n in left], [n * (lengths[f] + 1) for f, n in left])

        def upto(x: int, line: _Line = line, left: list[tuple[int, int]] = left) -> int:
            index = line.index_at(x)
            return line.work[index] + (x - line.tokens[index]) * (lengths[left[index][0]] + 1)

        cut = line.middle(upto, quota, cp_size - rank, align)
        remaining = []
        for (fragment, tokens), begins in zip(left, line.tokens, strict=False):
            taken = max(0, min(begins + tokens, cut + quota) - max(begins, cut))
            if taken:
                shares[fragment].append((rank, taken))
            if taken < tokens:
                remaining.append((fragment, tokens - taken))
        left = remaining
    for fragment, tokens in left:
        shares[fragment].append((cp_size - 1, tokens))
    return shares


def _shells(start: int, stop: int, shares: list[tuple[int, int]], align: int) -> list[Piece]:
    """Cut the fragment [start, stop) into a shell for each share; the pieces, ascending.

    The largest lies outermost, which needs the fewest keys of other ranks.
    """
    *outer, inner = sorted(shares, key=lambda share: -share[1])
    heads, tails = [], []
    for rank, tokens in outer:
        head = min(tokens, -(-((tokens + 1) // 2) // align) * align)
        tail = tokens - head
        heads.append(Piece(start, start + head, rank))
        if tail:
            tails.append(Piece(stop - tail, stop, rank))
        start, stop = start + head, stop - tail
    return [*heads, Piece(start, stop, inner[0]), *reversed(tails)]
