"""The sequences that the probe asks about: the first real micro-batch, read and not used up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from megatron_skyladder.runtime.trainer import Trainer

HostBatch = dict[str, Any]  # what the dataset yields: host tensors [num_sequences, seq_length]


def peek(iterator: Any) -> tuple[HostBatch | None, Any]:
    """Return the micro-batch that comes next, and the iterator that will still hand it out.

    Args:
        iterator: a data iterator of Megatron, or None on ranks that read nothing.

    Returns:
        None where there is none, or no more; and ``iterator`` itself where that can take a
        micro-batch back, as Megatron's ``RerunDataIterator`` can, else a wrapper in its place.
    """
    if iterator is None:
        return None, None
    if getattr(iterator, "replaying", False):  # a checkpoint holds batches that are read again
        return iterator.saved_microbatches[iterator.replay_pos], iterator
    holder = iterator if hasattr(iterator, "iterable") else None
    source = iterator.iterable if holder is not None else iterator
    if isinstance(source, _Returned) and source.batch is not None:
        return source.batch, iterator
    try:
        batch = next(source)
    except StopIteration:
        return None, iterator
    returned = _Returned(batch, source, holder)
    if holder is None:
        return batch, returned
    holder.iterable = returned
    return batch, iterator


class _Returned:
    """An iterator that hands out a batch that was read already, and then leaves the way.

    Everything else that is asked of it (the state of a data loader, say) the source answers.
    """

    def __init__(self, batch: HostBatch, source: Iterator[HostBatch], holder: Any) -> None:
        self.batch: HostBatch | None = batch
        self._source = source
        self._holder = holder

    def __iter__(self) -> _Returned:
        return self

    def __next__(self) -> HostBatch:
        batch, self.batch = self.batch, None
        if batch is None:
            return next(self._source)
        if self._holder is not None and self._holder.iterable is self:
            self._holder.iterable = self._source
        return batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


class Replay:
    """A data iterator that yields copies of one micro-batch, as often as it is asked."""

    def __init__(self, batch: HostBatch) -> None:
        self._batch = batch

    def __iter__(self) -> Replay:
        return self

    def __next__(self) -> HostBatch:
        return dict(self._batch)  # the reader may change the dict, not the tensors


def made_up(trainer: Trainer) -> HostBatch:
    """Return a micro-batch for a rank whose data has come to its end."""
    shape = trainer.micro_batch_size, trainer.seq_length
    positions = torch.arange(shape[1]).expand(shape)
    return {
        "tokens": positions % trainer.vocab_size,
        "labels": positions % trainer.vocab_size,
        "loss_mask": torch.ones(shape),
        "position_ids": positions,
    }


def planted(batch: HostBatch, end_of_document: int, places: list[int], number: int) -> HostBatch:
    """Return a copy in which more documents end, in other places in each sequence.

    A first micro-batch may hold no document's end, or none where the mask is most easily wrong. A
    batch that names its documents itself stays as it is.

    Args:
        batch: of the dataset.
        end_of_document: the token that ends a document.
        places: where documents may end, exclusive, ascending, within the sequence.
        number: sequence b takes every second place, the odd ones where ``number + b`` is odd.
    """
    if batch.get("cu_seqlens") is not None:
        return batch
    tokens = batch["tokens"].clone()
    for index, row in enumerate(tokens):
        chosen = torch.tensor(places[(number + index) % 2 :: 2], dtype=torch.int64)
        row[chosen - 1] = end_of_document
    return {**batch, "tokens": tokens}


def marks(seq_length: int, window_len: int, run_starts: np.ndarray) -> list[int]:
    """Return where a document's end is worth asking about: beside every other boundary.

    Args:
        seq_length: tokens.
        window_len: tokens.
        run_starts: where the run of each position begins (see `sight.Sight`).
    """
    middle = seq_length // 2
    grid = middle - middle % window_len
    places = [1, 2, window_len, grid, grid + window_len, middle, seq_length - 1]
    places += np.unique(run_starts)[:_MARKED_RUNS].tolist()
    near = {place + step for place in places for step in (-1, 0, 1)}
    return sorted(place for place in near if 0 < place < seq_length)


_MARKED_RUNS = 64
