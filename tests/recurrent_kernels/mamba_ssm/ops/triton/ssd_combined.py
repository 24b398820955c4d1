"""Mamba-2's scan, with the call of the package of this name; see plain_recurrence.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from plain_recurrence import begins, convolution


def mamba_chunk_scan_combined(*args: Any, **kwargs: Any) -> None:
    """Is imported, and called in inference only."""
    raise NotImplementedError


def mamba_split_conv1d_scan_combined(
    zxbcdt: torch.Tensor,
    conv1d_weight: torch.Tensor,
    conv1d_bias: torch.Tensor,
    dt_bias: torch.Tensor,
    A: torch.Tensor,  # the package's names, as are all of these
    D: torch.Tensor,
    chunk_size: int,
    seq_idx: torch.Tensor | None = None,
    activation: str = "silu",
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> torch.Tensor:
    """Return [b, s, inner].

    Args:
        zxbcdt: [b, s, 2 * inner + 2 * ngroups * state + heads]: gate, input, B, C, time step.
        seq_idx: int32 [b, s]; the state starts anew where it changes.
    """
    del chunk_size
    assert activation == "silu" and not norm_before_gate
    assert seq_idx is None or (seq_idx.shape == zxbcdt.shape[:2] and seq_idx.dtype == torch.int32)
    rows, length, width = zxbcdt.shape
    heads = len(A)
    inner = heads * (headdim or D.shape[-1])
    state_size = (width - 2 * inner - heads) // (2 * ngroups)
    z, xbc, dt = zxbcdt.split([inner, inner + 2 * ngroups * state_size, heads], dim=-1)
    xbc = F.silu(convolution(xbc, conv1d_weight, conv1d_bias, seq_idx))
    x, B, C = xbc.split([inner, ngroups * state_size, ngroups * state_size], dim=-1)
    x = x.view(rows, length, heads, -1)
    B, C = (
        part.view(rows, length, ngroups, state_size).repeat_interleave(heads // ngroups, 2)
        for part in (B, C)
    )
    dt = F.softplus(dt + dt_bias)
    state = x.new_zeros(rows, heads, x.shape[-1], state_size)
    out = []
    for at in range(length):
        kept = (dt[:, at] * A).exp()[..., None, None] * state
        anew = torch.as_tensor(begins(seq_idx, at)).expand(rows)
        kept = torch.where(anew[:, None, None, None], torch.zeros_like(kept), kept)
        state = kept + torch.einsum("bhp,bhn->bhpn", x[:, at] * dt[:, at, :, None], B[:, at])
        out.append(torch.einsum("bhpn,bhn->bhp", state, C[:, at]))
    y = torch.stack(out, 1) + x * D.view(heads, -1)
    return y.reshape(rows, length, inner) * F.silu(z)
