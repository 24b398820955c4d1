"""What one attention call needs to know, made once per mask from offsets on the host.

Shapes: T tokens of all sequences of a micro-batch, sequence after sequence; N segments.

The mask travels through Megatron as a host tensor of cu_seqlens in the place of
``attention_mask`` (None: the window grid alone). From it every layer needs the same device tensors
and host lengths, so they are kept for as long as the mask is in use. An entry holds the mask's own
memory, which makes its address a safe key: the memory cannot be reused while the entry lives.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum
from functools import cached_property, lru_cache

import numpy as np
import torch

from megatron_skyladder.ladder.fragments import fragment_cu_seqlens, rows_cu_seqlens
from megatron_skyladder.ladder.geometry import padded_count, whole_tiles
from megatron_skyladder.ladder.key_exchange import KernelCall, RankPlan, exchange_plan
from megatron_skyladder.ladder.sequence_layout import LayoutRule, zigzag

_KEPT_MASKS = 512  # more than the micro-batches in flight of any pipeline, for two kinds of layers


@dataclass(frozen=True, eq=False)
class Segments:
    """Causal attention runs within each segment; queries lie at the end of their keys.

    Args:
        cu_seqlens_q: int32 host array [N + 1], offsets into the query tokens.
        cu_seqlens_k: int32 host array [N + 1], offsets into the key tokens; each segment has at
            least as many keys as queries, and the last query sees the last key (bottom right).
        sliding_window: tokens a query sees at most, itself included; None: all of its segment.
        grid: the window length where the grid alone cuts every sequence (no documents, no sliding
            ladder, queries and keys the same tokens): windows can be batched without gathering. In
            a local layer ``sliding_window`` holds within them.
        device: where the tensors go.
    """

    cu_seqlens_q: np.ndarray
    cu_seqlens_k: np.ndarray
    sliding_window: int | None
    grid: int | None
    device: torch.device

    @cached_property
    def cu_seqlens_q_device(self) -> torch.Tensor:
        """int32 [N + 1]."""
        return to_device(self.cu_seqlens_q, self.device)

    @cached_property
    def cu_seqlens_k_device(self) -> torch.Tensor:
        """int32 [N + 1]; the very same tensor as for queries where the offsets are."""
        if self.cu_seqlens_k is self.cu_seqlens_q:
            return self.cu_seqlens_q_device
        return to_device(self.cu_seqlens_k, self.device)

    @cached_property
    def ids_device(self) -> torch.Tensor:
        """int32 [T]: the number of the segment that each query token lies in."""
        numbers = np.arange(len(self.lengths_q), dtype=np.int32)
        return to_device(np.repeat(numbers, self.lengths_q), self.device)

    @cached_property
    def padded_q_device(self) -> torch.Tensor:
        """int32 [padded N + 1], for kernels that plan by the number of segments.

        Trailing empty segments make the count one of a few sizes.
        """
        return to_device(_pad_count(self.cu_seqlens_q), self.device)

    @cached_property
    def padded_k_device(self) -> torch.Tensor:
        """The same for keys; the very same tensor as for queries where the offsets are."""
        if self.cu_seqlens_k is self.cu_seqlens_q:
            return self.padded_q_device
        return to_device(_pad_count(self.cu_seqlens_k), self.device)

    @cached_property
    def max_seqlen_q(self) -> int:
        """The longest segment's queries in tokens, rounded up to a kernel's tile.

        Grids and plans are sized by it: a bound such as the window would launch blocks for tokens
        that are not there, and the bare length would be another plan at every step.
        """
        return whole_tiles(self.lengths_q)

    @cached_property
    def max_seqlen_k(self) -> int:
        """The same for keys; equal where the offsets are, which kernels look at."""
        return whole_tiles(self.lengths_k)

    def of_one_sequence(self, num_tokens: int) -> Segments:
        """Return the grid's windows of a single sequence, for calls in which sequences join heads.

        Args:
            num_tokens: of the sequence on this rank.
        """
        assert self.grid is not None
        return _one_sequence(num_tokens, self.grid, self.sliding_window, self.device)

    @cached_property
    def lengths_q(self) -> np.ndarray:
        """Queries in each segment, [N]."""
        return np.diff(self.cu_seqlens_q)

    @cached_property
    def lengths_k(self) -> np.ndarray:
        """Keys in each segment, [N]."""
        return np.diff(self.cu_seqlens_k)


@dataclass(frozen=True, eq=False)
class ParallelSegments:
    """What a context-parallel rank needs to know where keys travel between the ranks.

    Args:
        plan: what to send, receive and attend to.
        own: the segments of ``plan.own``; None where it has no such call.
        joined: the same for ``plan.joined``.
    """

    plan: RankPlan
    own: Segments | None
    joined: Segments | None


@dataclass(frozen=True)
class Rows:
    """The sequences of a micro-batch: all that their segments depend on, but for the documents.

    Args:
        seq_length: tokens in a whole sequence, of which a rank holds ``seq_length / cp_size``.
        num_rows: sequences in the micro-batch.
        window_len: tokens, 1 <= window_len <= seq_length.
        sliding: whether the window moves along with the query.
        device: where attention runs.
        cp_size: context-parallel ranks.
        cp_rank: this one among them.
        layout: which tokens each of them holds; None: as Megatron shares them out.
        own_window: tokens that a query of a local layer sees at most, itself included; None where
            the window shows no more, so that such a layer shares what global ones have made.
    """

    seq_length: int
    num_rows: int
    window_len: int
    sliding: bool
    device: torch.device
    cp_size: int = 1
    cp_rank: int = 0
    layout: LayoutRule | None = None
    own_window: int | None = None

    @property
    def slides(self) -> bool:
        """Whether the ladder's own window moves along with the query and hides something."""
        return self.sliding and self.window_len < self.seq_length

    @property
    def sliding_window(self) -> int | None:
        """See `Segments`."""
        if self.own_window is not None:
            return self.own_window
        return self.window_len if self.slides else None

    @property
    def cut(self) -> int:
        """The distance of the grid that cuts sequences; with the sliding mask they are not cut."""
        return self.seq_length if self.sliding else self.window_len


class Part(Enum):
    """What of a mask is meant; but for the first, by its place in `split_mask`."""

    WHOLE = -1
    FRAGMENTS = 0
    DOCUMENTS = 1


class MaskCache:
    """Segments by the host tensor that carries the mask, the latest few hundred."""

    def __init__(self) -> None:
        self._entries: OrderedDict[
            tuple[object, ...], tuple[torch.Tensor, Segments | ParallelSegments]
        ] = OrderedDict()

    def clear(self) -> None:
        """Forget them all."""
        self._entries.clear()

    def get(
        self, mask: torch.Tensor, rows: Rows, part: Part = Part.WHOLE
    ) -> Segments | ParallelSegments:
        """Return the segments of a mask, made on first use.

        Args:
            mask: int32 [N + 1] on the host, cu_seqlens over all whole sequences of the micro-batch.
            rows: the sequences that it cuts.
            part: of the mask, where it may carry fragments and documents both.
        """
        key = (mask.data_ptr(), mask.numel(), mask._version, rows, part)
        entry = self._entries.get(key)
        if entry is None:
            offsets = mask if part is Part.WHOLE else split_mask(mask)[part.value]
            segments = _make_segments(offsets.numpy(), rows, documents=True)
            entry = self._entries[key] = (mask, segments)
            if len(self._entries) > _KEPT_MASKS:
                self._entries.popitem(last=False)
        return entry[1]


def split_mask(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the offsets of fragments and those of documents, where a mask carries both.

    Each begins with 0, and no fragment is empty, so the second 0 is where documents begin.

    Args:
        mask: int32, on the host; where it carries fragments alone, both are it.
    """
    second = int((mask == 0).nonzero()[-1])
    return (mask[:second], mask[second:]) if second else (mask, mask)


@lru_cache(maxsize=16)
def grid_segments(rows: Rows) -> Segments | ParallelSegments:
    """Return the segments of sequences that only the window cuts.

    With the sliding mask a row is one segment and the window moves along with the query.
    """
    row = fragment_cu_seqlens(
        np.empty(0, np.int32), seq_length=rows.seq_length, window_len=rows.cut
    )
    return _make_segments(rows_cu_seqlens([row] * rows.num_rows), rows, documents=False)


def _make_segments(
    cu_seqlens: np.ndarray, rows: Rows, *, documents: bool
) -> Segments | ParallelSegments:
    """Return this rank's segments of whole sequences."""
    grid = rows.cut if not documents and not rows.slides else None
    if rows.cp_size == 1:
        return Segments(cu_seqlens, cu_seqlens, rows.sliding_window, grid, rows.device)
    layouts = (zigzag(rows.seq_length, rows.cp_size),) * rows.num_rows
    if rows.layout is not None:
        layouts = rows.layout.layouts(rows.num_rows, cu_seqlens if documents else None)
    plan = exchange_plan(cu_seqlens, layouts, rank=rows.cp_rank, sliding_window=rows.sliding_window)
    if plan.exchanges:
        own, joined = (
            None if call is None else _call_segments(call, rows, grid=None)
            for call in (plan.own, plan.joined)
        )
        return ParallelSegments(plan, own, joined)
    assert plan.own is not None  # the windows end with the pieces: all keys are at hand
    if grid is not None and (np.diff(plan.own.cu_seqlens_q) != grid).any():
        assert rows.own_window == 1, "a rank holds parts of windows"
        grid = None  # each token sees itself alone, wherever its window is cut
    return _call_segments(plan.own, rows, grid=grid)


def _call_segments(call: KernelCall, rows: Rows, *, grid: int | None) -> Segments:
    return Segments(call.cu_seqlens_q, call.cu_seqlens_k, rows.sliding_window, grid, rows.device)


@lru_cache(maxsize=16)
def _one_sequence(
    num_tokens: int, window_len: int, sliding_window: int | None, device: torch.device
) -> Segments:
    starts = np.arange(0, num_tokens, window_len, dtype=np.int32)
    offsets = np.append(starts, np.int32(num_tokens))
    return Segments(offsets, offsets, sliding_window, window_len, device)


def _pad_count(cu_seqlens: np.ndarray) -> np.ndarray:
    """Repeat the last offset until the number of segments is a power of two.

    Kernels plan, and Transformer Engine caches, by the number of segments: one that changed with
    every sequence would cost a plan per micro-batch.
    """
    padded = padded_count(len(cu_seqlens) - 1)
    return np.pad(cu_seqlens, (0, padded + 1 - len(cu_seqlens)), mode="edge")


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return a device tensor of a host array, without waiting for the device."""
    host = torch.from_numpy(array)
    if device.type != "cuda":
        return host
    return host.pin_memory().to(device, non_blocking=True)  # does not wait for the device
