"""What context parallelism costs: attention work and traffic of each rank, counted exactly.

Pure arithmetic on the fragments of whole rows, as in `context_parallel`; needs only numpy.
"""

from __future__ import annotations

import numpy as np

from megatron_skyladder.context_parallel import (
    chunk_length_of,
    chunk_owner,
    first_visible,
)


def chunk_pairs(
    cu_seqlens: np.ndarray, *, cp_size: int, seq_length: int, sliding_window: int | None = None
) -> np.ndarray:
    """Count the (query, key) pairs of the queries of each chunk, over all rows.

    Args:
        cu_seqlens: int [num_fragments + 1], over all rows.
        cp_size: ranks of the group.
        seq_length: tokens in a row.
        sliding_window: tokens a query sees at most, itself included; None: all of its fragment.

    Returns:
        int64 [2 * cp_size].

    Raises:
        ValueError: the row does not divide into 2 * cp_size chunks.
    """
    chunk_length = chunk_length_of(cp_size, seq_length)
    positions = np.arange(int(cu_seqlens[-1]), dtype=np.int64)
    visible = positions - first_visible(cu_seqlens, positions, sliding_window) + 1
    return visible.reshape(-1, 2 * cp_size, chunk_length).sum(axis=(0, 2))


def rank_pairs(
    cu_seqlens: np.ndarray, *, cp_size: int, seq_length: int, sliding_window: int | None = None
) -> np.ndarray:
    """Count the (query, key) pairs that each rank computes, int64 [cp_size]; see `chunk_pairs`."""
    pairs = chunk_pairs(
        cu_seqlens, cp_size=cp_size, seq_length=seq_length, sliding_window=sliding_window
    )
    return pairs[:cp_size] + pairs[cp_size:][::-1]


def imbalance(work: np.ndarray) -> float:
    """Return the busiest rank's work over the mean: 1.0 is balanced, all wait for that rank."""
    return float(work.max() / work.mean())


def received_tokens(tails: np.ndarray) -> np.ndarray:
    """Return how many tokens' keys and values each rank receives in a forward pass, [cp_size].

    Args:
        tails: of `context_parallel.needed_tails`.
    """
    return tails.sum(axis=(1, 2))


def sent_tokens(tails: np.ndarray) -> np.ndarray:
    """Return how many tokens' keys and values each rank sends in a forward pass, [cp_size]."""
    cp_size = tails.shape[0]
    sent = np.zeros(cp_size, dtype=np.int64)
    for chunk, tokens in enumerate(tails.sum(axis=(0, 1))):
        sent[chunk_owner(chunk, cp_size)] += tokens
    return sent


def all_gather_tokens(cp_size: int, seq_length: int) -> int:
    """Return what a rank receives in a forward pass where all keys of a row are gathered."""
    return seq_length - seq_length // cp_size


# How often a token's keys and values (or their gradients, of the same size) travel in a forward and
# a backward pass, in units of what a forward pass receives.
OUR_PASSES = 2  # fetched once; the gradients go back the same way
ALL_GATHER_PASSES = 2  # all-gather, and reduce-scatter of the gradients
RING_PASSES = 3  # forward; backward turns keys and values round again, and their gradients


def key_value_bytes(num_tokens: int, *, num_groups: int, head_dim: int, num_bytes: int) -> int:
    """Return the size of the keys and values of some tokens in one layer.

    Args:
        num_tokens: tokens.
        num_groups: key/value heads of a tensor-parallel rank.
        head_dim: size of a head.
        num_bytes: of a number, such as 2 for bf16.
    """
    return 2 * num_tokens * num_groups * head_dim * num_bytes
