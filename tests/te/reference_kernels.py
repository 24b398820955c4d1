"""The definitions that the stubs compute: plain, one segment at a time, on the CPU.

They refuse what the compiled kernels refuse, and also what those would answer with wrong numbers:
offsets that end before the last token, a max_seqlen below the longest segment. `CALLS` counts the
calls, so that a test can tell that its path was really taken.

Shapes: T tokens, H query heads, G key/value heads, D head size, N segments; M queries and K keys
of one segment.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import torch

CALLS: Counter[str] = Counter()
_tolist = torch.Tensor.tolist  # tests make the method fail for those who are no kernels
FLOAT32_VARIABLE = "STAND_INS_TAKE_FLOAT32"  # inherited by the ranks that a test starts


def require(condition: bool, message: str) -> None:
    """Fail as compiled code does, with a RuntimeError."""
    if not condition:
        raise RuntimeError(message)


@contextlib.contextmanager
def float32_kernels() -> Iterator[None]:
    """Let the attention kernels take float32, which the real ones refuse, for exact numerics."""
    os.environ[FLOAT32_VARIABLE] = "1"
    try:
        yield
    finally:
        del os.environ[FLOAT32_VARIABLE]


def attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    window_size: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend within segments, aligned to the bottom right, as flash-attn >= 2.1 defines it.

    Args:
        q: [Tq, H, D]; k, v: [Tk, G, D].
        cu_seqlens_q: int32 [N + 1]; cu_seqlens_k: the same for keys.
        max_seqlen_q: bound on the longest segment; max_seqlen_k: the same for keys.
        window_size: (left, right), both inclusive, -1 is unbounded; causal is right = 0.

    Returns:
        The output [Tq, H, D] and the log of the softmax's denominator, float32 [H, Tq].
    """
    segments = _checked_segments(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    out = torch.zeros_like(q)
    lse = torch.full((q.shape[1], q.shape[0]), float("inf"), dtype=torch.float32)
    for at_q, at_k in segments:
        logits, _, values = _logits(q[at_q], k[at_k], v[at_k], scale, window_size)
        lse[:, at_q] = logits.logsumexp(-1)
        # a query that sees nothing gets zeros; its logits are all -inf
        weights = logits.softmax(-1).nan_to_num(0.0)
        out[at_q] = (weights @ values).transpose(0, 1).to(out.dtype)
    return out, lse


def attention_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    window_size: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of q, k and v from what the forward pass saved."""
    segments = _checked_segments(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    grads = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    groups = k.shape[1]

    def sum_heads(x: torch.Tensor) -> torch.Tensor:
        """[H, K, D] -> [K, G, D], adding up the query heads of each group."""
        return x.unflatten(0, (groups, -1)).sum(1).transpose(0, 1)

    for at_q, at_k in segments:
        logits, keys, values = _logits(q[at_q], k[at_k], v[at_k], scale, window_size)
        weights = (logits - lse[:, at_q, None]).exp().nan_to_num(0.0)
        grad = grad_out[at_q].transpose(0, 1).float()
        grad_weights = grad @ values.mT
        mean_grad = (grad * out[at_q].transpose(0, 1).float()).sum(-1, keepdim=True)
        grad_logits = weights * (grad_weights - mean_grad) * scale
        queries = q[at_q].transpose(0, 1).float()
        grads[0][at_q] = (grad_logits @ keys).transpose(0, 1).to(q.dtype)
        grads[1][at_k] = sum_heads(grad_logits.mT @ queries).to(k.dtype)
        grads[2][at_k] = sum_heads(weights.mT @ grad).to(v.dtype)
    return grads


def _logits(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window_size: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return float32 logits [H, M, K], -inf where hidden, and keys and values as [H, K, D]."""
    per_group = q.shape[1] // k.shape[1]
    keys, values = (x.transpose(0, 1).float().repeat_interleave(per_group, 0) for x in (k, v))
    logits = q.transpose(0, 1).float() @ keys.mT * scale
    left, right = window_size
    distance = torch.arange(k.shape[0]) - torch.arange(q.shape[0])[:, None]
    distance -= k.shape[0] - q.shape[0]  # the last query stands at the last key
    if right >= 0:
        logits = logits.masked_fill(distance > right, float("-inf"))
    if left >= 0:
        logits = logits.masked_fill(distance < -left, float("-inf"))
    return logits, keys, values


def _checked_segments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> list[tuple[slice, slice]]:
    """Return where each segment lies, after the checks of flash-attn's C++ and some more."""
    half = q.dtype in (torch.float16, torch.bfloat16)
    require(half or FLOAT32_VARIABLE in os.environ, "only support fp16 and bf16 data type")
    require(q.dtype == k.dtype == v.dtype, "query, key and value must have the same dtype")
    require(all(x.dim() == 3 for x in (q, k, v)), "q, k and v must be [tokens, heads, size]")
    require(all(x.stride(-1) == 1 for x in (q, k, v)), "the last dimension must be contiguous")
    require(k.shape == v.shape, "k and v must have the same shape")
    require(q.shape[1] % k.shape[1] == 0, "key heads must divide the query heads")
    require(q.shape[2] % 8 == 0 and q.shape[2] <= 256, "head size: a multiple of 8, at most 256")
    require(cu_seqlens_q.shape == cu_seqlens_k.shape, "as many segments of queries as of keys")
    bounds = []
    for cu_seqlens, tokens, longest in (
        (cu_seqlens_q, q, max_seqlen_q),
        (cu_seqlens_k, k, max_seqlen_k),
    ):
        require(cu_seqlens.dtype == torch.int32, "cu_seqlens must have dtype int32")
        require(cu_seqlens.dim() == 1 and cu_seqlens.is_contiguous(), "cu_seqlens must be a list")
        require(isinstance(longest, int), "max_seqlen must be an int on the host")
        offsets = _tolist(cu_seqlens)
        lengths = [end - start for start, end in pairwise(offsets)]
        require(
            offsets[0] == 0 and offsets[-1] == tokens.shape[0] and min(lengths) >= 0,
            f"cu_seqlens has to ascend from 0 to the {tokens.shape[0]} tokens",
        )
        require(max(lengths) <= longest, f"max_seqlen={longest} < longest {max(lengths)}")
        bounds.append([slice(*pair) for pair in pairwise(offsets)])
    pairs = zip(*bounds, strict=True)
    return [(at_q, at_k) for at_q, at_k in pairs if at_q.stop > at_q.start]


def thd_to_bshd(
    tokens: torch.Tensor, cu_seqlens: torch.Tensor, num_segments: int, max_seqlen: int
) -> torch.Tensor:
    """Copy [T, H, D] to [N, max_seqlen, H, D], zeros where a segment is shorter."""
    CALLS["thd_to_bshd"] += 1
    offsets = _tolist(cu_seqlens)
    require(len(offsets) == num_segments + 1, "one offset more than segments")
    require(offsets[-1] == tokens.shape[0], f"cu_seqlens ends before the {tokens.shape[0]} tokens")
    padded = tokens.new_zeros((num_segments, max_seqlen, *tokens.shape[1:]))
    for row, (start, end) in enumerate(pairwise(offsets)):
        padded[row, : end - start] = tokens[start:end]
    return padded


def bshd_to_thd(padded: torch.Tensor, cu_seqlens: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Copy [N, max_seqlen, H, D] back to [T, H, D]."""
    CALLS["bshd_to_thd"] += 1
    offsets = _tolist(cu_seqlens)
    require(offsets[-1] == num_tokens, f"cu_seqlens ends before the {num_tokens} tokens")
    tokens = padded.new_zeros((num_tokens, *padded.shape[2:]))
    for row, (start, end) in enumerate(pairwise(offsets)):
        tokens[start:end] = padded[row, : end - start]
    return tokens
