"""The loss on all held-out text, by how much of it a token may see.

A validation in mid-run takes the next sequences each time, so two points of a run are on different
text. Here every model reads the same tokens: the whole held-out text, cut into sequences, and each
sequence again into blocks of a context length, whose tokens see nothing before their block:

    sequence   0  1  2  3  4  5  6  7
    context 8  sees 0..i                  the whole sequence
    context 4  sees 0..i   |  sees 4..i   on the same tokens
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

BATCH_TOKENS = 4096  # of a forward pass


def measure(
    loss_sum: Callable[[np.ndarray, np.ndarray], float],
    tokens: np.ndarray,
    lengths: Sequence[int],
    *,
    seq_length: int,
) -> dict[int, float]:
    """Return the mean loss by context length, nats per token.

    Args:
        loss_sum: takes tokens and what follows each, int64 [batch, length], and returns the sum of
            the losses.
        tokens: int, [any], the held-out text; what does not fill a sequence at its end is left out.
        lengths: context lengths, each at most ``seq_length``.
        seq_length: tokens of a sequence.

    Raises:
        ValueError: the text does not fill one sequence.
    """
    count = (len(tokens) - 1) // seq_length
    if count < 1:
        raise ValueError(
            f"the held-out text has {len(tokens):,} tokens, too few for a sequence of {seq_length} "
            "and the token behind it. Raise validation-share, or name more packages."
        )
    used = tokens[: count * seq_length + 1].astype(np.int64)
    given, wanted = (part.reshape(count, seq_length) for part in (used[:-1], used[1:]))
    found = {}
    for length in lengths:
        blocks = [_blocks(part, length) for part in (given, wanted)]
        total = 0.0
        for inputs, targets in zip(*blocks, strict=True):
            batch = max(1, BATCH_TOKENS // inputs.shape[1])
            for start in range(0, len(inputs), batch):
                total += loss_sum(inputs[start : start + batch], targets[start : start + batch])
        found[length] = total / given.size
    return found


def _blocks(sequences: np.ndarray, length: int) -> list[np.ndarray]:
    """Return the blocks of all sequences, and the shorter ones at their ends, if any."""
    whole = sequences.shape[1] // length * length
    parts = [sequences[:, :whole].reshape(-1, length)]
    if whole < sequences.shape[1]:
        parts.append(sequences[:, whole:])
    return parts
