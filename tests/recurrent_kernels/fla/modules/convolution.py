"""The convolution that gated delta net layers import; see plain_recurrence.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from plain_recurrence import convolution, ids_of

causal_conv1d_update = None


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    cu_seqlens: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Return [b, s, d]; with cu_seqlens b is 1."""
    assert activation in ("silu", "swish") and (cu_seqlens is None or len(x) == 1)
    return F.silu(convolution(x, weight, bias, ids_of(cu_seqlens))), None
