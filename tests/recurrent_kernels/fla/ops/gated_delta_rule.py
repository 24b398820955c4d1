"""The gated delta rule, with the call of the package of this name; see plain_recurrence.py."""

from __future__ import annotations

from typing import Any

import torch
from plain_recurrence import begins, ids_of

fused_recurrent_gated_delta_rule = None


def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Return [b, s, h, value size]; with cu_seqlens b is 1.

    Args:
        q, k: [b, s, h, d]; v: [b, s, h, value size].
        g, beta: [b, s, h], logarithm of what is kept, and how much is written.
    """
    assert cu_seqlens is None or len(q) == 1
    rows, length, heads, size = q.shape
    ids = ids_of(cu_seqlens)
    state = q.new_zeros(rows, heads, size, v.shape[-1], dtype=torch.float32)
    q = q * (scale or size**-0.5)
    out = []
    for at in range(length):
        kept = state * g[:, at].exp()[..., None, None]
        anew = torch.as_tensor(begins(ids, at)).expand(rows)
        state = torch.where(anew[:, None, None, None], torch.zeros_like(kept), kept)
        known = torch.einsum("bhd,bhdv->bhv", k[:, at], state)
        change = (v[:, at] - known) * beta[:, at, :, None]
        state = state + torch.einsum("bhd,bhv->bhdv", k[:, at], change)
        out.append(torch.einsum("bhd,bhdv->bhv", q[:, at], state))
    return torch.stack(out, 1).to(v.dtype), None
