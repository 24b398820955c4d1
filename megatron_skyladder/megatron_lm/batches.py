"""One micro-batch for one pipeline stage: Megatron's tensors, and the document mask beside them."""

from __future__ import annotations

from typing import Any

import torch

from megatron_skyladder.ladder import clock
from megatron_skyladder.megatron_lm import compat
from megatron_skyladder.runtime.document_mask import BATCH_KEYS, Batch, HostTap, training_mask
from megatron_skyladder.runtime.sequence_order import in_order


def get_batch(
    data_iterator: Any, *, vp_stage: int | None, training: bool
) -> tuple[Batch, torch.Tensor | None]:
    """Return this rank's part of the next micro-batch.

    Args:
        data_iterator: yields Megatron's batches of host tensors on tensor-parallel rank 0, is
            None on the other ranks.
        vp_stage: the virtual pipeline stage, where there are several.
        training: False in evaluation, where sequences are seen whole.

    Returns:
        ``BATCH_KEYS`` on the device, cut to this context-parallel rank's part, each None where the
        stage has no use for it; and the mask for the attention: int32 [N + 1] on the host, or None
        where the window alone decides, or Megatron's own where SkyLadder is off.
    """
    active = clock.installed()
    masks_documents = training and active is not None and active.config.intra_document
    has_data = compat.needs_sequences(vp_stage)
    batch: Batch = dict.fromkeys(BATCH_KEYS)
    if not has_data and not masks_documents:
        return batch, None
    tap = HostTap(data_iterator, in_order if has_data and training and active else dict)
    if has_data:
        source = tap if data_iterator is not None else None
        read = compat.tp_batch(source, vp_stage, training=training)
        batch = compat.cp_batch(read)
        if active is None:
            return batch, batch.get("attention_mask")
    elif data_iterator is not None:
        next(tap)
    if not masks_documents:
        return batch, None
    return batch, training_mask(tap.latest)
