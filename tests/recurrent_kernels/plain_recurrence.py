"""Reference kernels of Mamba and gated delta net layers: plain torch, token by token, for tests.

The files beside this one put them under the names that Megatron imports, so that its real mixers
run where no kernel does: with this folder on the path before Megatron is imported.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def convolution(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, ids: torch.Tensor | None
) -> torch.Tensor:
    """Convolve causally, channel by channel; what lies in another sequence counts as zero.

    Args:
        x: [b, s, d].
        weight: [d, taps], the last is the token's own.
        bias: [d].
        ids: [b, s], of the sequence that each token belongs to; None: a row is one.
    """
    length, taps = x.shape[1], weight.shape[1]
    out = torch.zeros_like(x) if bias is None else bias.to(x.dtype).expand_as(x).clone()
    for back in range(taps):
        earlier = F.pad(x, (0, 0, back, 0))[:, :length]
        if ids is not None and back:
            same = F.pad(ids, (back, 0), value=-1)[:, :length] == ids
            earlier = earlier * same[..., None]
        out = out + earlier * weight[:, taps - 1 - back]
    return out


def ids_of(cu_seqlens: torch.Tensor | None) -> torch.Tensor | None:
    """Return [1, s], the number of each token's sequence."""
    if cu_seqlens is None:
        return None
    lengths = cu_seqlens.diff().long()
    return torch.repeat_interleave(torch.arange(len(lengths)), lengths)[None]


def begins(ids: torch.Tensor | None, at: int) -> torch.Tensor | bool:
    """Return, for each row, whether a sequence begins at a token."""
    if at == 0:
        return True
    return False if ids is None else ids[:, at] != ids[:, at - 1]
