"""The norm that Megatron's Mamba mixer imports; see plain_recurrence.py."""

from __future__ import annotations

from typing import Any

import torch


class RMSNorm(torch.nn.Module):
    """Norm over groups of channels; Megatron multiplies the gate in before it."""

    def __init__(
        self, hidden_size: int, eps: float = 1e-5, group_size: int | None = None, **options: Any
    ) -> None:
        super().__init__()
        self.eps, self.group_size = eps, group_size or hidden_size
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=options.get("dtype")))

    def forward(self, x: torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
        """Return x, [..., hidden_size], normalised."""
        assert z is None
        groups = x.view(*x.shape[:-1], -1, self.group_size)
        groups = groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + self.eps)
        return groups.reshape(x.shape) * self.weight
