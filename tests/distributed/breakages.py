"""Bugs on purpose: a test that cannot see these is worth nothing."""

from __future__ import annotations

import os
from typing import Any


def look_up_documents() -> None:
    """Let attention take the mask of the latest micro-batch, wherever it is asked from.

    Wrong as soon as a forward pass is recomputed after other micro-batches have been read.
    """
    from megatron_skyladder.attention import core_attention
    from megatron_skyladder.megatron_lm import batches

    get_batch, forward = batches.get_batch, core_attention.SkyLadderAttention.forward
    latest: Any = None

    def keeping_get_batch(*args: Any, **kwargs: Any) -> Any:
        nonlocal latest
        batch, latest = get_batch(*args, **kwargs)
        return batch, latest

    def looking_up(self: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        return forward(self, query, key, value, None if mask is None else latest, **kwargs)

    batches.get_batch = keeping_get_batch
    core_attention.SkyLadderAttention.forward = looking_up


def window_one_longer() -> None:
    """See W + 1 tokens, the classic."""
    from megatron_skyladder.ladder import clock

    window = clock.Clock.window

    def longer(self: Any, *, training: bool) -> int:
        return min(window(self, training=training) + 1, self.config.seq_length)

    clock.Clock.window = longer


def documents_end_before_eod() -> None:
    """Let a document end before its end-of-document token rather than after it."""
    from megatron_skyladder.ladder import fragments

    document_ends = fragments.document_ends

    def too_early(tokens: Any, eod: int) -> Any:
        ends = document_ends(tokens, eod)
        ends[:-1] -= 1
        return ends[ends > 0]

    fragments.document_ends = too_early


def mean_of_means() -> None:
    """Divide each context-parallel rank's loss by its own count, as Megatron does."""
    from megatron_skyladder.runtime import sequence_mean

    sequence_mean.SequenceMean.wrap = lambda self, forward_step: forward_step  # type: ignore


def fail_between_steps() -> None:
    """Let a mistake of ours show on rank 1 alone, after a step and outside of ``forward_step``."""
    from megatron.training import training

    from megatron_skyladder.ladder.schedules import WindowSchedule

    train_step = training.train_step

    def failing(*args: Any, **kwargs: Any) -> Any:
        result = train_step(*args, **kwargs)
        if os.environ["RANK"] == "1":
            WindowSchedule(alpha=1).window_at(-1)
        return result

    training.train_step = failing
