"""Sequences reordered on the host, so that Megatron's own cut gives each rank its pieces.

Megatron gives context-parallel rank r the chunks r and 2 * cp_size - 1 - r of whatever it reads.
Under another layout (`ladder.sequence_layout`) the tokens that a rank is to hold are put into these
chunks first; labels, loss mask and position ids go with them. Nothing of Megatron's cut is touched,
and no message is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from megatron_skyladder.ladder import clock
from megatron_skyladder.ladder.sequence_layout import Kind, Layout
from megatron_skyladder.runtime import document_mask, trainer

KEYS = (*document_mask.BATCH_KEYS, "positions")


def in_order(batch: dict[str, Any]) -> dict[str, Any]:
    """Return a training micro-batch of the dataset in the order that the layout wants.

    Args:
        batch: host tensors ``[b, s]`` of whole sequences; what is not one of ``KEYS`` stays.
    """
    if clock.current().layout_kind is Kind.ZIGZAG:
        return batch
    return reordered(batch, training_layouts(batch, num_sequences=batch["tokens"].shape[0]))


def training_layouts(batch: dict[str, Any] | None, *, num_sequences: int) -> tuple[Layout, ...]:
    """Return the layouts of a training micro-batch.

    Args:
        batch: of the dataset, on the host; needed where layouts follow the documents.
        num_sequences: in it.
    """
    active, group = clock.current(), trainer.current().groups.cp
    cp_size = 1 if group is None else group.size()
    rule = active.layout_rule(active.config.seq_length, cp_size, training=True)
    cu_seqlens = None
    if rule.kind is Kind.SEQUENCE:
        assert batch is not None
        cu_seqlens, _ = document_mask.fragment_offsets(batch, active.config, rule.window_len)
    return rule.layouts(num_sequences, cu_seqlens)


def reordered(batch: dict[str, Any], layouts: Sequence[Layout]) -> dict[str, Any]:
    """Return whole sequences in the order that these layouts want."""
    if all(layout.is_zigzag for layout in layouts):
        return batch
    order = torch.from_numpy(np.stack([layout.order for layout in layouts]))
    changed = {key: _gathered(batch[key], order) for key in KEYS if torch.is_tensor(batch.get(key))}
    return {**batch, **changed}


def _gathered(tensor: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return ``tensor[b, order[b]]``, in pinned memory where it was so: copies then overlap."""
    out = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_pinned())
    torch.gather(tensor, 1, order.expand(tensor.shape), out=out)
    return out
