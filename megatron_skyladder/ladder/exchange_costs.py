"""What context parallelism costs: attention work and traffic of each rank, counted exactly.

Pure arithmetic on the fragments of whole rows, as in `context_parallel`; needs only numpy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_skyladder.ladder.key_exchange import (
    chunk_length_of,
    chunk_owner,
    first_visible,
    held_runs,
    needed_tails,
)

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
    cu_seqlens: np.ndarray, *, cp_size: int, seq_length: int, sliding_window: int | None = None
) -> RankCosts:
    """Count the work and the traffic of each rank.

    Args:
        cu_seqlens: int [num_fragments + 1], over all whole rows of the micro-batch.
        cp_size: ranks of the group.
        seq_length: tokens in a row.
        sliding_window: tokens a query sees at most, itself included; None: all of its fragment.

    Raises:
        ValueError: the row does not divide into 2 * cp_size chunks.
    """
    chunk_length = chunk_length_of(cp_size, seq_length)
    owners = np.array([chunk_owner(chunk, cp_size) for chunk in range(2 * cp_size)])
    run_starts = np.empty(2 * cp_size, dtype=np.int64)
    for rank in range(cp_size):
        for chunk, stop in held_runs(cp_size, rank):
            run_starts[chunk:stop] = chunk * chunk_length
    positions = np.arange(int(cu_seqlens[-1]), dtype=np.int64)
    first = first_visible(cu_seqlens, positions, sliding_window)
    pairs = (positions - first + 1).reshape(-1, 2 * cp_size, chunk_length)
    row_starts = positions[::seq_length, None, None]
    waits = first.reshape(pairs.shape) < row_starts + run_starts[:, None]
    tails = needed_tails(
        cu_seqlens, cp_size=cp_size, seq_length=seq_length, sliding_window=sliding_window
    )

    def of_ranks(per_chunk: np.ndarray) -> np.ndarray:
        return np.bincount(owners, per_chunk, cp_size).astype(np.int64)

    return RankCosts(
        pairs=of_ranks(pairs.sum(axis=(0, 2))),
        waiting_pairs=of_ranks((pairs * waits).sum(axis=(0, 2))),
        received=tails.sum(axis=(1, 2)),
        sent=of_ranks(tails.sum(axis=(0, 1))),
    )


def gathered_tokens(cp_size: int, seq_length: int) -> int:
    """Return what a rank receives per row in a forward pass where every rank gets all keys."""
    return seq_length - seq_length // cp_size


def key_value_bytes(num_tokens: float, *, num_groups: int, head_dim: int, num_bytes: int) -> float:
    """Return the size of the keys and values of some tokens in one layer.

    Args:
        num_tokens: tokens.
        num_groups: key/value heads of a tensor-parallel rank.
        head_dim: size of a head.
        num_bytes: of a number, such as 2 for bf16.
    """
    return 2 * num_tokens * num_groups * head_dim * num_bytes
