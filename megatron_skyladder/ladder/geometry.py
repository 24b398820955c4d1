"""What an attention call launches: blocks, tiles, workspace, plans; from the kernels' own formulas.

Nothing here was measured. Each formula names the file and function it was read in (November 2026):

* FA2: flash-attention 0251105, ``csrc/flash_attn``; torch's varlen and sdpa run a copy of it;
* FA3: the same repository, ``hopper``; FA4: ``flash_attn/cute``;
* TE: Transformer Engine d0067d0, ``common/fused_attn``; cuDNN: cudnn-frontend 3929da2,
  ``node/scaled_dot_product_flash_attention.h``.

Words: a *block* is what a grid declares, a block without tokens is *idle*; a *tile* is one product
of a block of queries with a block of keys, so tiles times their area is the work that is done; a
*plan* is what a library compiles, builds or selects anew when its key changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from megatron_skyladder.ladder.kernels import Call

TILE = 128  # tokens: FlashAttention's block of queries; cuDNN wants multiples of 64
_MIN_PADDED_SEGMENTS = 16
_FLOAT, _HALF = 4, 2  # bytes
_SMALL_SHARED_MEMORY = ((8, 6), (8, 9), (12, 0), (12, 1))  # 99 KB a block, for which 144 KB miss
_FA4_SEARCH_ABOVE = 256  # segments; BIN_BATCH_SEARCH_THRESH in flash_attn/cute/interface.py


def whole_tiles(lengths: np.ndarray) -> int:
    """Return the longest of some lengths in tokens, rounded up to a kernel's tile."""
    longest = int(lengths.max(initial=1))
    return -(-longest // TILE) * TILE


def padded_count(num_segments: int) -> int:
    """Return the number of segments for kernels that plan by it: a power of two, 16 or more."""
    return 1 << (max(_MIN_PADDED_SEGMENTS, num_segments) - 1).bit_length()


@dataclass(frozen=True)
class Heads:
    """Attention heads of a tensor-parallel rank.

    Args:
        query: query heads.
        key: key and value heads, of which ``query`` is a multiple.
        size: elements of a head.
    """

    query: int
    key: int
    size: int


@dataclass(frozen=True, eq=False)
class Attention:
    """One attention call as a backend makes it.

    Args:
        kind: of call.
        lengths_q: queries of each segment in tokens, int [N].
        lengths_k: keys of each segment, int [N]; the last query sees the last key.
        heads: of the call; sequences of a micro-batch join them where nothing is packed.
        sliding_window: tokens that a query sees at most; None: all of its segment.
        deterministic: whether the model is.
    """

    kind: Call
    lengths_q: np.ndarray
    lengths_k: np.ndarray
    heads: Heads
    sliding_window: int | None = None
    deterministic: bool = False

    @property
    def num_segments(self) -> int:
        """N."""
        return len(self.lengths_q)

    @property
    def tokens_q(self) -> int:
        """All queries."""
        return int(self.lengths_q.sum())

    @property
    def tokens_k(self) -> int:
        """All keys."""
        return int(self.lengths_k.sum())


@dataclass(frozen=True)
class Launch:
    """What one call launches, forward and backward.

    Args:
        blocks: that the forward grid declares; of a persistent kernel the units that its blocks
            take one after the other.
        idle_blocks: those among them without a token.
        forward_tiles: products of the forward pass.
        forward_pairs: (query, key) pairs that they cover, masked ones included.
        backward_tiles: the same in the backward pass.
        backward_pairs: the pairs that they cover.
        workspace: bytes that the backward pass allocates beside the gradients.
        plan: the key by which the library plans.
    """

    blocks: int
    idle_blocks: int
    forward_tiles: int
    forward_pairs: int
    backward_tiles: int
    backward_pairs: int
    workspace: int
    plan: tuple[object, ...]


def grid_call(seq_length: int, window_len: int, heads: Heads, num_sequences: int = 1) -> Attention:
    """Return the call for sequences that the window alone cuts; at the full window the whole one.

    Sequences join the heads, as in `attention.backends.base`.
    """
    starts = np.arange(0, seq_length, window_len)
    lengths = np.diff(np.append(starts, seq_length))
    kind = Call.FULL if window_len == seq_length else Call.WINDOWS
    joined = Heads(num_sequences * heads.query, num_sequences * heads.key, heads.size)
    return Attention(kind, lengths, lengths, joined)


def packed_call(
    cu_seqlens_q: np.ndarray,
    cu_seqlens_k: np.ndarray,
    heads: Heads,
    sliding_window: int | None = None,
) -> Attention:
    """Return the call for segments of any lengths; offsets as in `attention.segments.Segments`."""
    lengths_q, lengths_k = np.diff(cu_seqlens_q), np.diff(cu_seqlens_k)
    return Attention(Call.PACKED, lengths_q, lengths_k, heads, sliding_window)


def launch(kernel: str, call: Attention, capability: tuple[int, int]) -> Launch:
    """Return what a call launches.

    Args:
        kernel: a name of ``kernels.KERNELS``.
        call: as the backend of that name makes it.
        capability: of the device.

    Raises:
        ValueError: there is no formula for it.
    """
    formula = _FORMULAS.get(kernel)
    if formula is None or call.heads.size > 128 or (kernel == "sdpa" and call.kind is Call.PACKED):
        raise ValueError(
            f"no formula says what {kernel} launches for {call.kind.value} and heads of "
            f"{call.heads.size}. Known are {', '.join(_FORMULAS)}, for heads of 128 at most; sdpa "
            "without packed calls."
        )
    return formula(call, capability)


# --- tiles --------------------------------------------------------------------------------------


def _each_length(call: Attention) -> Iterator[tuple[int, int, int]]:
    """Yield (queries, keys, how many segments have both), each once, empty ones left out."""
    pairs, counts = np.unique(
        np.stack([call.lengths_q, call.lengths_k], axis=1), axis=0, return_counts=True
    )
    for (queries, keys), count in zip(pairs.tolist(), counts.tolist(), strict=True):
        if queries:
            yield queries, keys, count


def _up(number: int, unit: int) -> int:
    return -(-number // unit)


def _blocks(lengths: np.ndarray, block: int) -> int:
    return int((-(-lengths // block)).sum())


def _forward_tiles(call: Attention, block_m: int, block_n: int, packed_heads: int = 1) -> int:
    """Return the tiles of one head (or group of packed ones) of all segments.

    ``n_block_min`` and ``n_block_max`` of FA2's flash_fwd_kernel.h (compute_attn_1rowblock), of
    FA3's block.h and of FA4's block_info.py: the same bounds. Where the query heads of a group are
    packed, a block has ``block_m / packed_heads`` tokens.
    """
    total = 0
    for queries, keys, count in _each_length(call):
        blocks = np.arange(_up(queries * packed_heads, block_m))
        first = blocks * block_m // packed_heads
        stop = np.minimum(-(-(blocks + 1) * block_m // packed_heads), queries)
        last_n = np.minimum(-(-keys // block_n), -(-(stop + keys - queries) // block_n))
        first_n = np.zeros_like(last_n)
        if call.sliding_window is not None:
            reach = first + keys - queries - (call.sliding_window - 1)
            first_n = np.maximum(0, reach // block_n)
        total += count * int((last_n - first_n).sum())
    return total


def _backward_tiles(call: Attention, block_m: int, block_n: int) -> int:
    """Return the tiles of one head: ``m_block_min``, ``m_block_max`` of FA2's flash_bwd_kernel.h.

    (compute_dq_dk_dv_1colblock); FA3 and FA4 have the same bounds.
    """
    total = 0
    for queries, keys, count in _each_length(call):
        blocks = np.arange(_up(keys, block_n))
        first_m = np.maximum(0, (blocks * block_n + queries - keys) // block_m)
        last_m = np.full_like(blocks, _up(queries, block_m))
        if call.sliding_window is not None:
            reach = (blocks + 1) * block_n + queries - keys + call.sliding_window - 1
            last_m = np.minimum(last_m, -(-reach // block_m))
        total += count * int(np.maximum(0, last_m - first_m).sum())
    return total


def _made(
    call: Attention,
    *,
    forward: tuple[int, int],
    backward: tuple[int, int],
    blocks: int,
    live: int,
    workspace: int,
    plan: tuple[object, ...],
    packed_heads: int = 1,
) -> Launch:
    groups = call.heads.query // packed_heads
    forward_tiles = groups * _forward_tiles(call, *forward, packed_heads)
    backward_tiles = call.heads.query * _backward_tiles(call, *backward)
    return Launch(
        blocks=blocks,
        idle_blocks=blocks - live,
        forward_tiles=forward_tiles,
        forward_pairs=forward_tiles * forward[0] * forward[1],
        backward_tiles=backward_tiles,
        backward_pairs=backward_tiles * backward[0] * backward[1],
        workspace=workspace,
        plan=(call.heads, *plan),
    )


# --- FlashAttention -----------------------------------------------------------------------------


def _fa2(call: Attention, capability: tuple[int, int], *, batched: bool = False) -> Launch:
    """FA2.

    Tiles: flash_fwd_launch_template.h (run_mha_fwd_hdim*), flash_bwd_launch_template.h
    (run_mha_bwd_hdim*). Grid: ceil(max_seqlen_q / kBlockM) x segments x heads (run_flash_fwd).
    Workspace: flash_api.cpp, mha_varlen_bwd: dq_accum and softmax_d have ``total_q + 128 * batch``
    rows, dk and dv are expanded to the query heads; mha_bwd: rows rounded up to 128.
    """
    heads, small = call.heads, capability in _SMALL_SHARED_MEMORY
    if heads.size <= 64:
        forward, backward = (128, 128), (64, 128) if small else (128, 128)
    else:
        # compute capability 8.6 and 8.9 are asked for by major 8 and a minor above 0
        forward = (64, 64) if capability[0] == 8 and capability[1] else (128, 64)
        backward = (64, 64) if small and heads.size > 96 else (64, 128)
    longest = int(call.lengths_q.max()) if batched else whole_tiles(call.lengths_q)
    if batched:
        rows = call.num_segments * _up(longest, 128) * 128
    else:
        rows = call.tokens_q + 128 * call.num_segments
    workspace = _FLOAT * rows * heads.query * (_up(heads.size, 32) * 32 + 1)
    if heads.key != heads.query:
        workspace += 2 * _HALF * call.tokens_k * heads.query * heads.size
    return _made(
        call,
        forward=forward,
        backward=backward,
        blocks=_up(longest, forward[0]) * call.num_segments * heads.query,
        live=_blocks(call.lengths_q, forward[0]) * heads.query,
        workspace=workspace,
        plan=("FA2", call.sliding_window is not None, batched),
    )


def _sdpa(call: Attention, capability: tuple[int, int]) -> Launch:
    """Windows as the batch of FA2's dense call."""
    return _in_turn([_fa2(part, capability, batched=True) for part in _equal_windows(call)])


def _equal_windows(call: Attention) -> list[Attention]:
    """Return the calls of whole windows and, where it is shorter, of the last one."""
    lengths = call.lengths_q
    whole = lengths[:-1] if lengths[-1] != lengths[0] else lengths
    parts = [part for part in (whole, lengths[len(whole) :]) if len(part)]
    return [replace(call, lengths_q=part, lengths_k=part) for part in parts]


def _in_turn(parts: list[Launch]) -> Launch:
    """Return calls one after the other as one; the workspace is that of the larger."""
    return Launch(
        blocks=sum(part.blocks for part in parts),
        idle_blocks=sum(part.idle_blocks for part in parts),
        forward_tiles=sum(part.forward_tiles for part in parts),
        forward_pairs=sum(part.forward_pairs for part in parts),
        backward_tiles=sum(part.backward_tiles for part in parts),
        backward_pairs=sum(part.backward_pairs for part in parts),
        workspace=max(part.workspace for part in parts),
        plan=tuple(part.plan for part in parts),
    )


def _accumulators(call: Attention, rows_q: int, rows_k: int, *, expanded: bool) -> int:
    """Return the bytes of dq, the two rows of statistics, and dk, dv where groups share keys."""
    size, heads = _up(call.heads.size, 32) * 32, call.heads
    total = _FLOAT * heads.query * rows_q * (size + 2)
    return total + (2 * _FLOAT * heads.key * rows_k * size if expanded else 0)


def _fa3(call: Attention, capability: tuple[int, int]) -> Launch:
    """FA3, always packed.

    Tiles: tile_size.h (tile_size_fwd_sm90), flash_api.cpp (mha_bwd, kBlockM_sm90). Varlen packs the
    query heads of a group (heuristics.h, should_pack_gqa) and its scheduler hands out blocks that
    have tokens only (VarlenDynamicPersistentTileScheduler). Workspace: flash_api.cpp, mha_bwd:
    ``total_q + batch * kBlockM`` rows of dq, the same for dk and dv in float where keys are shared.
    """
    heads = call.heads
    local = call.sliding_window is not None
    forward = (192, 128) if heads.size <= 64 or (heads.size <= 96 and local) else (128, 128)
    if 64 < heads.size <= 96 and not local:
        forward = (192, 144)
    backward = (128, 128) if heads.size <= 64 else (64, 128)
    group = heads.query // heads.key
    units = _blocks(call.lengths_q * group, forward[0]) * heads.key
    rows_q = _up(call.tokens_q + call.num_segments * backward[0], backward[0]) * backward[0]
    rows_k = _up(call.tokens_k + call.num_segments * 128, 128) * 128
    return _made(
        call,
        forward=forward,
        backward=backward,
        blocks=units,
        live=units,
        workspace=_accumulators(call, rows_q, rows_k, expanded=group > 1),
        plan=("FA3", local),
        packed_heads=group,
    )


def _fa4(call: Attention, capability: tuple[int, int]) -> Launch:
    """FA4, always packed.

    Tiles: interface.py (_tile_size_fwd_sm90, _tile_size_bwd_sm90; 128 x 128 on Blackwell, two
    blocks of queries at a time). Grid: tile_scheduler.py (SingleTileVarlenScheduler):
    ``(total_q + batch * (tile_m - 1)) // tile_m`` blocks a head. Workspace: interface.py,
    _flash_attn_bwd. Compile keys: interface.py, the entries of both ``compile_key`` that a call of
    ours can change: the sliding mask, q_stage, one block of queries or keys, and above 256 segments
    a search for the segment.
    """
    heads = call.heads
    hopper, consumer = capability[0] == 9, capability[0] == 12
    forward = (192, 128) if hopper and heads.size <= 96 else (128, 128)
    backward = (64, 128) if hopper and heads.size > 64 else (128, 128)
    if consumer:
        forward, backward = (128, 128 if heads.size <= 64 else 64), (64, 64)
    group = heads.query // heads.key
    rows = call.tokens_q * group
    blocks = (rows + call.num_segments * (forward[0] - 1)) // forward[0] * heads.key
    cluster = 1 if hopper or consumer or heads.size <= 64 else 2
    rows_q = ((call.tokens_q + (call.num_segments + 1) * backward[0] - 1) // backward[0]) * (
        backward[0]
    )
    unit_k = cluster * backward[1]
    rows_k = (call.tokens_k + (call.num_segments + 1) * unit_k - 1) // unit_k * unit_k
    max_q, max_k = whole_tiles(call.lengths_q), whole_tiles(call.lengths_k)
    key = (
        call.sliding_window is not None,
        capability[0] in (10, 11) and max_q * group > forward[0],
        max_q <= backward[0],
        max_k <= backward[1],
        call.num_segments > _FA4_SEARCH_ABOVE,
    )
    return _made(
        call,
        forward=forward,
        backward=backward,
        blocks=blocks,
        live=_blocks(call.lengths_q * group, forward[0]) * heads.key,
        workspace=_accumulators(call, rows_q, rows_k, expanded=group > 1),
        plan=("FA4", *key),
        packed_heads=group,
    )


# --- Transformer Engine -------------------------------------------------------------------------


def _te(call: Attention, capability: tuple[int, int]) -> Launch:
    """TE: FA2 before Hopper, cuDNN from there on.

    Packed (thd) calls: utils.cu, get_max_batch_size and get_max_tokens give cuDNN's shape
    (fused_attn_f16_arbitrary_seqlen.cu): many more query tiles than have tokens. Workspace: one row
    of dQ_accum for each of ``max_tokens`` (set_max_total_seq_len_q), of the batch otherwise; in
    deterministic mode dP, ``b * h * s_q * s_kv`` in 16 bits. cuDNN plans by all of that and by the
    sliding window. Tiles are taken as 128 x 128; cuDNN does not publish its own.
    """
    packed = call.kind is Call.PACKED
    if capability < (9, 0):
        one = partial(_fa2, capability=capability, batched=not packed)
    else:
        one = partial(_cudnn, packed=packed)
    return one(call) if packed else _in_turn([one(part) for part in _equal_windows(call)])


def _cudnn(call: Attention, *, packed: bool) -> Launch:
    heads, batch = call.heads, call.num_segments
    if packed:
        batch = max_batch_size(padded_count(batch))
        max_q, max_k = max_tokens(call.tokens_q), max_tokens(call.tokens_k)
    else:
        max_q, max_k = int(call.lengths_q[0]), int(call.lengths_k[0])
    workspace = _FLOAT * (max_q if packed else batch * max_q) * heads.query * heads.size
    if call.deterministic:
        workspace = _HALF * batch * heads.query * max_q * max_k
    return _made(
        call,
        forward=(128, 128),
        backward=(128, 128),
        blocks=batch * heads.query * _up(max_q, 128),
        live=_blocks(call.lengths_q, 128) * heads.query,
        workspace=workspace,
        plan=("cuDNN", packed, batch, max_q, max_k, call.sliding_window),
    )


def max_batch_size(num_segments: int) -> int:
    """Return cuDNN's batch for so many packed segments (TE's utils.cu, get_max_batch_size)."""
    if num_segments <= 32:
        return 32
    if num_segments <= 512:
        return 1 << (num_segments - 1).bit_length()
    return _up(num_segments, 512) * 512


def max_tokens(num_tokens: int) -> int:
    """Return cuDNN's sequence length for so many packed tokens (TE's utils.cu, get_max_tokens)."""
    if num_tokens <= 1024:
        return 1024
    if num_tokens <= 32_768:
        return 1 << (num_tokens - 1).bit_length()
    return _up(num_tokens, 32_768) * 32_768


_FORMULAS: dict[str, Callable[[Attention, tuple[int, int]], Launch]] = {
    "te": _te,
    "fa4": _fa4,
    "fa3": _fa3,
    "flash": _fa2,
    "varlen": _fa2,
    "sdpa": _sdpa,
}
