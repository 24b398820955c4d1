"""What each rank runs for test_batches.py."""

from __future__ import annotations

import numpy as np
import torch

from megatron_skyladder.runtime import document_mask, trainer


def send_offsets() -> None:
    """Send offsets of many lengths, in groups with and without rank 0."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    for ranks in ((0, 1, 2), (1, 2)):
        group = torch.distributed.new_group(ranks)
        if rank not in ranks:
            continue
        full = document_mask._MESSAGE_OFFSETS
        for count in (2, full - 1, full, full + 1, 3 * full, 5):
            offsets = np.arange(count, dtype=np.int32) * 7
            mask = document_mask._broadcast_host(offsets if rank == ranks[0] else None, group)
            assert mask.dtype == torch.int32 and mask.numpy().tolist() == offsets.tolist()
        trainer.uninstall()  # training has one group only, which goes with it
    torch.distributed.destroy_process_group()
