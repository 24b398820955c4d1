"""Multiples for windows that end where kernel tiles and context-parallel chunks do."""

from __future__ import annotations

import math

KERNEL_TILE = 128  # tokens: attention kernels work on blocks of this many queries and keys


def aligned_multiple(seq_length: int, cp_size: int = 1) -> int:
    """Return what windows should be multiples of; they are then rounded down by less than this.

    The largest number that divides both a kernel's tile and a context-parallel chunk (half of a
    rank's part of a sequence): windows, chunks and tiles then end together, and where a window
    crosses a chunk's end, the pieces on both sides are multiples of it too. 128 in most runs; 32
    for sequences of 9,024 tokens on 3 ranks, whose chunks have 1,504.
    """
    chunk_length = seq_length // (2 * cp_size) if cp_size > 1 else seq_length
    return math.gcd(KERNEL_TILE, chunk_length)


def explain_multiple(
    seq_length: int, cp_size: int = 1, *, name: str = "--skyladder-round-to"
) -> str:
    """Return one line on the choice of `aligned_multiple`, for the log and the plan."""
    multiple = aligned_multiple(seq_length, cp_size)
    what = f"kernel tiles of {KERNEL_TILE} tokens"
    if cp_size > 1:
        what += f" and context-parallel chunks of {seq_length // (2 * cp_size):,}"
    else:
        what += f" and sequences of {seq_length:,}"
    return (
        f"{name} auto is {multiple}, the largest number that divides {what}: windows "
        f"end where they do, and each is at most {multiple - 1} tokens shorter than scheduled."
    )
