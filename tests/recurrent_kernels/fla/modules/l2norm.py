"""The norm of queries and keys; see plain_recurrence.py."""

from __future__ import annotations

from typing import Any

import torch


def l2norm(x: torch.Tensor, eps: float = 1e-6, **_: Any) -> torch.Tensor:
    """Return x with last dimensions of length one."""
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + eps)
