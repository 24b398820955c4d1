"""The ``sdpa`` backend: windows and fragments through PyTorch's scaled-dot-product attention.

Shapes: T tokens (Tq of queries, Tk of keys), H query heads, G key/value heads (H a multiple of G),
D head size (C of values, where it is another), S sequence length, B sequences, W window.

No S x S mask is ever made: equal windows become the batch of one causal call; fragments are padded
to a few lengths and each length is one causal call (a padded key lies after every real query, so
causality alone hides it); only where a query's keys do not start at its segment's start (sliding
windows, keys fetched from another rank) are masks needed, of one block of queries at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from megatron_skyladder.attention.segments import Segments, to_device

# without cuDNN, which plans, and keeps, a graph for every shape: one for each window of a ladder
_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_LARGEST_BATCH = 65_535  # of a call on a GPU: kernels have the batch in the grid's later axes
_SMALLEST_BUCKET = 16  # tokens; below it a call costs more than the padding
_MIN_BLOCK, _MAX_BLOCK = 128, 512  # queries that share one mask in a band


def attend_grid(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window_len: int,
    scale: float,
    sink: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend within equal windows of each sequence.

    Args:
        query: [S, B, H, D]; key: [S, B, G, D]; value: [S, B, G, C].
        window_len: tokens; the last window of a sequence may be shorter.
        scale: factor on the logits.
        sink: [B * H], see `_attend_with_sink`.

    Returns:
        [S, B, H * C].
    """
    seq_length, num_rows, num_heads, _ = query.shape
    whole = seq_length // window_len * window_len
    parts = []
    for start, stop, width in ((0, whole, window_len), (whole, seq_length, seq_length - whole)):
        if start == stop:
            continue
        # sequences join the heads, not the windows: [S, B, H, D] -> [S/W, B*H, W, D] is always a
        # view, and query head b*H + i still meets key head b*G + i*G//H
        q, k, v = (
            tensor[start:stop]
            .reshape((stop - start) // width, width, -1, tensor.shape[-1])
            .transpose(1, 2)
            for tensor in (query, key, value)
        )
        out = _causal(q, k, v, scale, sink)
        parts.append(
            out.transpose(1, 2).reshape(stop - start, num_rows, num_heads * value.shape[-1])
        )
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def attend_segments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    scale: float,
    sink: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend within segments of any lengths.

    Args:
        query: [Tq, H, D]; key: [Tk, G, D]; value: [Tk, G, C].
        segments: offsets into Tq and Tk.
        scale: factor on the logits.
        sink: [H], see `_attend_with_sink`.

    Returns:
        [Tq, H, C].
    """
    batches = _batches(segments)
    parts = []
    if batches.shapes:
        sizes = [count * length for count, length in batches.shapes]
        q, k, v = (
            tensor.index_select(0, index).split(sizes)
            for tensor, index in (
                (query, batches.gather_q),
                (key, batches.gather_k),
                (value, batches.gather_k),
            )
        )
        for (count, length), *qkv in zip(batches.shapes, q, k, v, strict=True):
            batched = [x.view(count, length, *x.shape[1:]).transpose(1, 2) for x in qkv]
            out = _causal(batched[0], batched[1], batched[2], scale, sink)
            parts.append(out.transpose(1, 2).flatten(0, 1))
    for q_start, q_stop, k_start, k_stop in batches.bands:
        parts.append(
            _attend_band(
                query[q_start:q_stop],
                key[k_start:k_stop],
                value[k_start:k_stop],
                segments.sliding_window,
                scale,
                sink,
            )
        )
    return torch.cat(parts).index_select(0, batches.restore)


def _causal(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    sink: torch.Tensor | None,
) -> torch.Tensor:
    """[batch, heads, length, D] each; grouped queries where the heads differ."""
    if sink is not None:
        return _attend_with_sink(query, key, value, sink, scale)
    return _attend(query, key, value, is_causal=True, scale=scale)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **arguments: Any
) -> torch.Tensor:
    if query.shape[0] > _LARGEST_BATCH:
        parts = (tensor.split(_LARGEST_BATCH) for tensor in (query, key, value))
        return torch.cat([_attend(*qkv, **arguments) for qkv in zip(*parts, strict=True)])
    arguments["enable_gqa"] = query.shape[1] != key.shape[1]
    if query.device.type != "cuda":
        # the CPU's flash attention wants one size; without it all logits would be kept
        missing = max(0, query.shape[-1] - value.shape[-1])
        if missing:
            value = torch.nn.functional.pad(value, (0, missing))
        out = scaled_dot_product_attention(query, key, value, **arguments)
        return out[..., :-missing] if missing else out
    with sdpa_kernel(_KERNELS):
        return scaled_dot_product_attention(query, key, value, **arguments)


def _attend_band(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sliding_window: int | None,
    scale: float,
    sink: torch.Tensor | None,
) -> torch.Tensor:
    """Attend in one segment whose last query sees the last key, a block of queries at a time.

    Args:
        query: [M, H, D]; key: [N, G, D] with N >= M; value: [N, G, C].

    Returns:
        [M, H, C].
    """
    num_queries, offset = query.shape[0], key.shape[0] - query.shape[0]
    block = min(max(sliding_window or _MAX_BLOCK, _MIN_BLOCK), _MAX_BLOCK)
    q, k, v = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
    parts = []
    for start in range(0, num_queries, block):
        stop = min(start + block, num_queries)
        first = 0 if sliding_window is None else max(0, offset + start - sliding_window + 1)
        last = offset + stop
        qkv = q[:, :, start:stop], k[:, :, first:last], v[:, :, first:last]
        if sink is not None:
            out = _attend_with_sink(*qkv, sink, scale, sliding_window)
        else:
            mask = _band_mask(stop - start, last - first, sliding_window, query.device)
            out = _attend(*qkv, attn_mask=mask, scale=scale)
        parts.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(parts)


def _attend_with_sink(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sink: torch.Tensor,
    scale: float,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """Attend where each head has one more logit, which takes weight and gives no value.

    Megatron's ``--softmax-type``: off-by-one has a logit of 0, learnable a parameter. PyTorch's
    kernels have no such logit, so this is a plain softmax, a block of queries at a time; a block's
    weights are worked out again in the backward pass, so that no L x L matrix is kept.

    Args:
        query: [batch, H, M, D]; key, value: [batch, G, N, D]; the last query sees the last key.
        sink: [H].
        scale: factor on the logits, not on the sink.
        sliding_window: tokens that a query sees at most; None: any number.

    Returns:
        [batch, H, M, D].
    """
    repeats, num_queries = query.shape[1] // key.shape[1], query.shape[2]
    key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    offset = key.shape[2] - num_queries
    parts = []
    for start in range(0, num_queries, _MAX_BLOCK):
        stop = min(start + _MAX_BLOCK, num_queries)
        last = offset + stop
        mask = _band_mask(stop - start, last, sliding_window, query.device)
        block = query[:, :, start:stop], key[:, :, :last], value[:, :, :last], sink, mask, scale
        parts.append(
            checkpoint(_softmax_with_sink, *block, use_reentrant=False, preserve_rng_state=False)
        )
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _softmax_with_sink(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sink: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    logits = (query @ key.transpose(2, 3)) * scale
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits.masked_fill(~mask, -torch.inf)
    column = sink.to(logits.dtype).view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
    weights = torch.cat([logits, column], dim=-1).softmax(dim=-1)[..., :-1]
    return weights.to(value.dtype) @ value


@lru_cache(maxsize=32)
def _band_mask(
    num_queries: int, num_keys: int, sliding_window: int | None, device: torch.device
) -> torch.Tensor:
    """bool [M, N], True where visible; the last query sees the last key."""
    positions = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    keys = torch.arange(num_keys, device=device)[None, :]
    visible = keys <= positions
    if sliding_window is not None:
        visible &= keys > positions - sliding_window
    return visible


@dataclass(frozen=True)
class _Batches:
    """Where each segment goes.

    ``shapes``: (segments, padded length) of each causal call; ``gather_*``: the tokens of all
    calls, one call after the other; ``bands``: (q_start, q_stop, k_start, k_stop) of the segments
    that need a mask, after the calls; ``restore``: for each query token, where its output stands.
    """

    shapes: list[tuple[int, int]]
    gather_q: torch.Tensor
    gather_k: torch.Tensor
    bands: list[tuple[int, int, int, int]]
    restore: torch.Tensor


_batched: WeakKeyDictionary[Segments, _Batches] = WeakKeyDictionary()


def _batches(segments: Segments) -> _Batches:
    """Return how segments are batched, worked out on first use and kept with them."""
    batches = _batched.get(segments)
    if batches is None:
        batches = _batched[segments] = _batch_segments(segments)
    return batches


def _batch_segments(segments: Segments) -> _Batches:
    lengths = segments.lengths_q
    starts_q, starts_k = segments.cu_seqlens_q[:-1], segments.cu_seqlens_k[:-1]
    longest_plain = segments.sliding_window or segments.max_seqlen_q
    plain = (lengths == segments.lengths_k) & (lengths <= longest_plain) & (lengths > 0)
    buckets = _bucket_lengths(lengths)
    restore = np.empty(int(segments.cu_seqlens_q[-1]), dtype=np.int64)
    shapes: list[tuple[int, int]] = []
    gather_q, gather_k = [], []
    filled = 0
    for length in np.unique(buckets[plain]).tolist():
        chosen = np.flatnonzero(plain & (buckets == length))
        steps = np.arange(length)
        # padding repeats the segment's last token: a key that comes after every real query
        within = np.minimum(steps, lengths[chosen, None] - 1)
        gather_q.append((starts_q[chosen, None] + within).ravel())
        gather_k.append((starts_k[chosen, None] + within).ravel())
        real = steps < lengths[chosen, None]
        slots = filled + np.arange(len(chosen) * length).reshape(len(chosen), length)
        restore[gather_q[-1].reshape(slots.shape)[real]] = slots[real]
        shapes.append((len(chosen), length))
        filled += slots.size
    bands = []
    for index in np.flatnonzero(~plain & (lengths > 0)).tolist():
        q_start, q_stop = (int(x) for x in segments.cu_seqlens_q[index : index + 2])
        k_start, k_stop = (int(x) for x in segments.cu_seqlens_k[index : index + 2])
        bands.append((q_start, q_stop, k_start, k_stop))
        restore[q_start:q_stop] = filled + np.arange(q_stop - q_start)
        filled += q_stop - q_start

    def index_tensor(parts: list[np.ndarray]) -> torch.Tensor:
        joined = np.concatenate(parts) if parts else np.empty(0)
        return to_device(joined.astype(np.int64), segments.device)

    return _Batches(
        shapes, index_tensor(gather_q), index_tensor(gather_k), bands, index_tensor([restore])
    )


def _bucket_lengths(lengths: np.ndarray) -> np.ndarray:
    """Round lengths up to 4, 5, 6 or 7 times a power of two: at most a quarter is padding."""
    padded = np.maximum(lengths, _SMALLEST_BUCKET).astype(np.int64)
    exponent = np.maximum(np.floor(np.log2(padded)).astype(np.int64) - 2, 0)
    unit = np.int64(1) << exponent
    return (padded + unit - 1) // unit * unit
