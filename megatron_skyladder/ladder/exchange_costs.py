"""What context parallelism costs: attention work and traffic of each rank, counted exactly.

Pure arithmetic on the fragments of whole sequences, as in `context_parallel`; needs only numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_skyladder.ladder.fragments import fragment_cu_seqlens
from megatron_skyladder.ladder.key_exchange import exchange_plan, needed_tails
from megatron_skyladder.ladder.sequence_layout import Layout, LayoutRule

# How often keys and values, or their gradients (of the same size), travel in a forward and a
# backward pass, in units of what a forward pass receives.
OUR_PASSES = 2  # fetched once; the gradients go back the same way
ALL_GATHER_PASSES = 2  # all-gather; reduce-scatter of the gradients
RING_PASSES = 3  # forward; in the backward pass keys and values again, and their gradients


@dataclass(frozen=True, eq=False)
class RankCosts:
    """What each rank of a group does for one micro-batch in one layer, forward.

    Args:
        pairs: int64 [cp_size], (query, key) pairs that it computes.
        waiting_pairs: int64 [cp_size], those of them whose query sees a key of another rank: the
            rest is computed while keys travel.
        received: int64 [cp_size], tokens whose keys and values it receives.
        sent: int64 [cp_size], tokens whose keys and values it sends, once for each receiver.
    """

    pairs: np.ndarray
    waiting_pairs: np.ndarray
    received: np.ndarray
    sent: np.ndarray

    @property
    def imbalance(self) -> float:
        """The busiest rank's work over the mean: 1.0 is balanced; the others wait for it."""
        return float(self.pairs.max() / self.pairs.mean())


def rank_costs(
    cu_seqlens: np.ndarray, layouts: Sequence[Layout], *, sliding_window: int | None = None
) -> RankCosts:
    """Count the work and the traffic of each rank.

    Args:
        cu_seqlens: int [num_fragments + 1], over all whole sequences of the micro-batch.
        layouts: of each sequence.
        sliding_window: tokens a query sees at most, itself included; None: all of its fragment.
    """
    cp_size, seq_length = layouts[0].cp_size, layouts[0].seq_length
    tails = needed_tails(cu_seqlens, layouts, sliding_window=sliding_window)
    piece_starts, owners, held_from = _pieces_of_all(layouts)
    # A part is what a fragment has in a piece: its pairs are a difference of two sums, so that the
    # count looks at every fragment and not at every token.
    fragments = np.asarray(cu_seqlens, dtype=np.int64)
    edges = np.union1d(fragments, np.append(piece_starts, len(layouts) * seq_length))
    starts, ends = edges[:-1], edges[1:]
    fragment_starts = fragments[np.searchsorted(fragments, starts, side="right") - 1]
    pieces = np.searchsorted(piece_starts, starts, side="right") - 1
    wait_ends = ends
    if sliding_window is not None:
        wait_ends = np.clip(held_from[pieces] + sliding_window - 1, starts, ends)
    wait_ends = np.where(fragment_starts < held_from[pieces], wait_ends, starts)

    def pairs_before(positions: np.ndarray) -> np.ndarray:
        return _pairs_of_first(positions - fragment_starts, sliding_window)

    def of_ranks(values: np.ndarray, ranks: np.ndarray) -> np.ndarray:
        total = np.zeros(cp_size, dtype=np.int64)
        np.add.at(total, ranks, values)
        return total

    before = pairs_before(starts)
    return RankCosts(
        pairs=of_ranks(pairs_before(ends) - before, owners[pieces]),
        waiting_pairs=of_ranks(pairs_before(wait_ends) - before, owners[pieces]),
        received=np.sum([each.sum(axis=1) for each in tails], axis=0),
        sent=of_ranks(np.concatenate([each.sum(axis=0) for each in tails]), owners),
    )


def _pieces_of_all(layouts: Sequence[Layout]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return where each piece of each sequence starts, who holds it, and where its run starts."""
    starts, owners, held_from = [], [], []
    for index, layout in enumerate(layouts):
        begin = index * layout.seq_length
        before = None
        for start, _, rank in layout.pieces:
            starts.append(begin + start)
            owners.append(rank)
            held_from.append(held_from[-1] if rank == before else begin + start)
            before = rank
    return np.array(starts), np.array(owners), np.array(held_from)


def _pairs_of_first(num_queries: np.ndarray, sliding_window: int | None) -> np.ndarray:
    """Return the pairs of the first queries of a fragment: the sum of min(k, window)."""
    within = num_queries if sliding_window is None else np.minimum(num_queries, sliding_window)
    pairs: np.ndarray = within * (within + 1) // 2 + (num_queries - within) * within
    return pairs


def kept_tokens(rule: LayoutRule, own_window: int | None = None) -> int:
    """Return for how many tokens a layer keeps joined keys and values until the backward pass.

    For one sequence without document ends, which only shorten what is joined, on the rank that
    keeps most. What the rank's own part of the sequence takes comes on top.

    Args:
        rule: with the window.
        own_window: tokens that a query of the layer sees at most, by its model; None: any number.
    """
    cut = rule.seq_length if rule.sliding else rule.window_len
    cu_seqlens = fragment_cu_seqlens(
        np.empty(0, np.int32), seq_length=rule.seq_length, window_len=cut
    )
    layouts = rule.layouts(1, cu_seqlens)
    limits = [rule.window_len] if rule.sliding else []
    limits += [] if own_window is None else [own_window]
    at_most = min(limits, default=None)
    calls = (
        exchange_plan(cu_seqlens, layouts, rank=rank, sliding_window=at_most).joined
        for rank in range(rule.cp_size)
    )
    return max(0 if call is None else int(call.cu_seqlens_k[-1]) for call in calls)


def gathered_tokens(cp_size: int, seq_length: int) -> int:
    """Return what a rank receives per sequence in a forward pass where every rank gets all keys."""
    return seq_length - seq_length // cp_size


def key_value_bytes(
    num_tokens: float, *, num_groups: int, head_dim: float, num_bytes: int
) -> float:
    """Return the size of the keys and values of some tokens in one layer.

    Args:
        num_tokens: tokens.
        num_groups: key/value heads of a tensor-parallel rank.
        head_dim: size of a head, the mean of keys and values.
        num_bytes: of a number, such as 2 for bf16.
    """
    return 2 * num_tokens * num_groups * head_dim * num_bytes
