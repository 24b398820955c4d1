"""The document mask of a micro-batch, on every rank that attends.

Megatron lets only the first and last pipeline stage read data. With documents masked every stage
needs their ends, so every stage's tensor-parallel rank 0 reads the sequence; the other ranks of its
group get the offsets over a host group, because only the host can know their number without
waiting for the device. Where every rank reads (Megatron Bridge), each makes its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from megatron_skyladder.attention.segments import split_mask
from megatron_skyladder.ladder import clock, fragments
from megatron_skyladder.ladder.config import SkyLadderConfig
from megatron_skyladder.runtime import metrics, trainer

Batch = dict[str, torch.Tensor | None]
BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids")
_MESSAGE_OFFSETS = 2047  # 8 KB with their number: windows of 32 in 32K tokens, and 1,000 documents


class HostTap:
    """An iterator that keeps the sequences that it has read, while they are still on the host.

    Args:
        iterator: yields the dataset's batches.
        arrange: returns what is handed on in a batch's place.
    """

    def __init__(
        self,
        iterator: Iterator[dict[str, torch.Tensor]],
        arrange: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = dict,
    ) -> None:
        self._iterator = iterator
        self._arrange = arrange
        self.latest: dict[str, torch.Tensor] | None = None

    def __iter__(self) -> HostTap:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        # a shallow copy: Megatron moves the tensors to the device in the dict it gets
        self.latest = next(self._iterator)
        return dict(self._arrange(self.latest))


def training_mask(row_batch: dict[str, torch.Tensor] | None) -> torch.Tensor:
    """Return the document mask of a training micro-batch, and count the work that it leaves.

    Every integration gets its masks here, so that none can leave out what is logged of them.

    Args:
        row_batch: the dataset's batch on the host, on tensor-parallel rank 0; elsewhere unused.

    Returns:
        int32 [N + 1], on the host: cu_seqlens of the fragments over all sequences.
    """
    active = clock.current()
    window = active.window(training=True)
    mask, rows_with_end = document_mask(row_batch, active.config, window)
    num_rows = int(mask[-1]) // active.config.seq_length
    fragments_alone, _ = split_mask(mask)
    of_local = active.local_window(training=True)
    metrics.meter().count(fragments_alone, window, num_rows, rows_with_end, local_window=of_local)
    return mask


def document_mask(
    row_batch: dict[str, torch.Tensor] | None, config: SkyLadderConfig, window_len: int
) -> tuple[torch.Tensor, int]:
    """Return the mask of a micro-batch and what it is made of, on every TP rank.

    Args:
        row_batch: the dataset's batch on the host, on tensor-parallel rank 0; elsewhere unused,
            unless the trainer's every rank reads.
        config: the checked configuration.
        window_len: tokens.

    Returns:
        cu_seqlens of the fragments over all sequences, int32 [N + 1] on the host, and behind them
        those of the documents where the state of other layers starts anew at these alone (see
        `segments.split_mask`); and the number of sequences in which a document's end was found.
    """
    group, reads = trainer.current().groups.tp, trainer.current().every_rank_reads
    message = None
    if reads or group.rank() == 0:
        assert row_batch is not None
        offsets, rows_with_end = fragment_offsets(row_batch, config, window_len)
        message = np.append(np.int32(rows_with_end), offsets)
    alone = reads or group.size() == 1
    received = torch.from_numpy(message) if alone else _broadcast_host(message, group)
    return received[1:], int(received[0])


def fragment_offsets(
    row_batch: dict[str, torch.Tensor], config: SkyLadderConfig, window_len: int
) -> tuple[np.ndarray, int]:
    """Return what `document_mask` does, of sequences that this rank has read.

    Args:
        row_batch: the dataset's batch on the host, in the order of the dataset.
        config: the checked configuration.
        window_len: tokens.
    """
    tokens = row_batch["tokens"].numpy()
    given = row_batch.get("cu_seqlens")
    cut = config.seq_length if config.mask == "sliding" else window_len
    splits_documents = config.recurrent_state == "documents"
    rows, documents, rows_with_end = [], [], 0
    for index, row in enumerate(tokens):
        if given is not None:  # the dataset knows its documents; trailing entries are padding
            ends = np.unique(given[index].numpy())
            ends = ends[(ends > 0) & (ends <= row.shape[0])]
            rows_with_end += 1
        else:
            eod = trainer.current().end_of_document
            ends = fragments.document_ends(row, eod)
            rows_with_end += len(ends) > 1 or row[-1] == eod
        length = row.shape[0]
        rows.append(fragments.fragment_cu_seqlens(ends, seq_length=length, window_len=cut))
        if splits_documents:
            whole = fragments.fragment_cu_seqlens(ends, seq_length=length, window_len=length)
            documents.append(whole)
    offsets = fragments.rows_cu_seqlens(rows)
    if splits_documents:
        offsets = np.concatenate([offsets, fragments.rows_cu_seqlens(documents)])
    return offsets, rows_with_end


def _broadcast_host(offsets: np.ndarray | None, group: Any) -> torch.Tensor:
    """Send a host array of unknown length from the group's first rank to the others.

    One message, which begins with the number of offsets, and a second one for what is left over.
    """
    ranks = torch.distributed.get_process_group_ranks(group)
    host_group = trainer.host_group(tuple(ranks))
    send = partial(torch.distributed.broadcast, src=ranks[0], group=host_group)
    message = torch.empty(1 + _MESSAGE_OFFSETS, dtype=torch.int32)
    mask = None if offsets is None else torch.from_numpy(offsets)
    if mask is not None:
        message[0] = mask.numel()
        message[1 : 1 + mask.numel()] = mask[:_MESSAGE_OFFSETS]
    send(message)
    count = int(message[0])
    if mask is None:
        mask = message[1 : 1 + count]
        if count > _MESSAGE_OFFSETS:
            mask = torch.cat((mask, mask.new_empty(count - _MESSAGE_OFFSETS)))
    if count > _MESSAGE_OFFSETS:
        send(mask[_MESSAGE_OFFSETS:])
    return mask
