"""``sdpa``: PyTorch's scaled-dot-product attention; runs anywhere."""

from __future__ import annotations

import torch

from megatron_skyladder.attention import sdpa
from megatron_skyladder.attention.backends.base import Backend
from megatron_skyladder.attention.segments import Segments


class SdpaBackend(Backend):
    """Windows as the batch of one causal call; fragments in a few padded lengths."""

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
    ) -> torch.Tensor:
        """See `Backend`."""
        sink = self.sink_of(query.shape[1])
        return sdpa.attend_segments(query, key, value, segments, self.softmax_scale, sink)

    def attend_windows(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
    ) -> torch.Tensor:
        """See `Backend`."""
        assert segments.grid is not None
        if segments.sliding_window is not None:
            return super().attend_windows(query, key, value, segments)
        sink = self.sink_of(query.shape[1] * query.shape[2])
        return sdpa.attend_grid(query, key, value, segments.grid, self.softmax_scale, sink)
