"""The FlashAttention libraries, and PyTorch's own copy: one call with other spellings.

All take packed tokens and offsets, align causal masks at the bottom right, know windows as (left,
right) pairs that are both inclusive, and need no plan: a new window is a new number.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_skyladder.attention.backends.base import Backend, require_arguments, window_size
from megatron_skyladder.attention.segments import Segments

_CACHE_ENABLED = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"


class _Flash(Backend):
    """A library whose call is ``attend``; deterministic as the model asks."""

    def __init__(self, scale: float, *, deterministic: bool) -> None:
        super().__init__(scale)
        self.deterministic = deterministic
        self.attend = self._import()

    @classmethod
    def build(cls, *, config: Any, scale: float, **stock_arguments: Any) -> Backend:
        """See `Backend`."""
        return cls(scale, deterministic=config.deterministic_mode)

    @staticmethod
    def _import() -> Any:
        raise NotImplementedError

    @staticmethod
    def _offsets(segments: Segments) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        return (
            segments.cu_seqlens_q_device,
            segments.cu_seqlens_k_device,
            segments.max_seqlen_q,
            segments.max_seqlen_k,
        )


class FlashBackend(_Flash):
    """``flash_attn_varlen_func`` of flash-attn 2."""

    @staticmethod
    def _import() -> Any:
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func

    @classmethod
    def check_installed(cls) -> None:
        """See `Backend`."""
        require_arguments(cls._import(), "window_size", "deterministic")

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
    ) -> torch.Tensor:
        """See `Backend`."""
        out: torch.Tensor = self.attend(
            query,
            key,
            value,
            *self._offsets(segments),
            softmax_scale=self.softmax_scale,
            causal=True,
            window_size=window_size(segments),
            deterministic=self.deterministic,
        )
        return out


class FlashHopperBackend(FlashBackend):
    """``flash_attn_varlen_func`` of FlashAttention 3: the same call; old builds return more."""

    @staticmethod
    def _import() -> Any:
        from flash_attn_interface import flash_attn_varlen_func

        return flash_attn_varlen_func

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
    ) -> torch.Tensor:
        """See `Backend`."""
        out: Any = super().forward(query, key, value, segments)
        return out[0] if isinstance(out, tuple) else out


class FlashCuteBackend(_Flash):
    """``flash_attn_varlen_func`` of FlashAttention 4: keywords only, output and statistics."""

    @staticmethod
    def _import() -> Any:
        # kernels are compiled on first use; kept on disk, a job of many ranks does so once
        os.environ.setdefault(_CACHE_ENABLED, "1")
        from flash_attn.cute import flash_attn_varlen_func

        return flash_attn_varlen_func

    @classmethod
    def check_installed(cls) -> None:
        """See `Backend`."""
        require_arguments(cls._import(), "cu_seqlens_q", "window_size", "deterministic")

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
    ) -> torch.Tensor:
        """See `Backend`."""
        offsets_q, offsets_k, max_q, max_k = self._offsets(segments)
        # -1 means "no bound" to FlashAttention 2, and a window to this one
        left, right = (None, None) if segments.sliding_window is None else window_size(segments)
        out, *_ = self.attend(
            query,
            key,
            value,
            cu_seqlens_q=offsets_q,
            cu_seqlens_k=offsets_k,
            max_seqlen_q=max_q,
            max_seqlen_k=max_k,
            softmax_scale=self.softmax_scale,
            causal=True,
            window_size=(left, right),
            deterministic=self.deterministic,
        )
        return out


class VarlenBackend(_Flash):
    """``torch.nn.attention.varlen``, always through FlashAttention.

    From Hopper on torch would take cuDNN, which plans, and keeps, a graph for every longest length
    and number of tokens: one per window of a ladder. --deterministic-mode reaches FlashAttention
    through torch.use_deterministic_algorithms.
    """

    @staticmethod
    def _import() -> Any:
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn

    @classmethod
    def check_installed(cls) -> None:
        """See `Backend`."""
        require_arguments(cls._import(), "scale", "window_size", "enable_gqa")

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
    ) -> torch.Tensor:
        """See `Backend`."""
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out: torch.Tensor = self.attend(
                query,
                key,
                value,
                *self._offsets(segments),
                scale=self.softmax_scale,
                window_size=window_size(segments),
                enable_gqa=query.shape[1] != key.shape[1],
            )
        return out
