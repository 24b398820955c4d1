"""The FlashAttention libraries, and PyTorch's own copy: one call with other spellings.

All take packed tokens and offsets, align causal masks at the bottom right, know windows as (left,
right) pairs that are both inclusive, and need no plan: a new window is a new number.

FlashAttention 4 has softmax sinks. FlashAttention 2, which `flash` and `varlen` run, has none, but
its two passes can be called one by one, and that is enough (`attention.sinks`). FlashAttention 3's
passes differ between builds, of which there are no releases: `ladder.kernels` refuses it.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_skyladder.attention import sinks
from megatron_skyladder.attention.backends.base import Backend, require_arguments, window_size
from megatron_skyladder.attention.segments import Segments
from megatron_skyladder.errors import UsageError

_MOST_SEGMENTS = 65_535  # of a call of FlashAttention 2, which has them in the grid's second axis


class _Flash(Backend):
    """A library whose call is ``attend``; deterministic as the model asks."""

    most_segments: int | None = None  # that one call takes

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

    def _offsets(self, segments: Segments) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        if self.most_segments is not None and len(segments.lengths_q) > self.most_segments:
            _refuse(segments, self.most_segments)
        return (
            segments.cu_seqlens_q_device,
            segments.cu_seqlens_k_device,
            segments.max_seqlen_q,
            segments.max_seqlen_k,
        )


def _refuse(segments: Segments, most: int) -> NoReturn:
    num_segments, num_tokens = len(segments.lengths_q), int(segments.cu_seqlens_q[-1])
    what = "windows and documents leave"
    fits = "Give a longer window, a smaller --micro-batch-size"
    if segments.grid is not None:
        what = f"windows of {segments.grid} tokens leave"
        fits = f"Give windows of {-(-num_tokens // most)} tokens or more"
    raise UsageError(
        f"{what} {num_segments} segments in the {num_tokens} tokens of an attention call, and "
        f"FlashAttention 2 takes {most} at most. {fits}, or --skyladder-attention-backend sdpa."
    )


class FlashBackend(_Flash):
    """``flash_attn_varlen_func`` of flash-attn 2; with a sink, the two passes behind it."""

    most_segments: int | None = _MOST_SEGMENTS

    @staticmethod
    def _import() -> Any:
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func

    @classmethod
    def check_installed(cls) -> None:
        """See `Backend`."""
        require_arguments(cls._import(), "window_size", "deterministic")

    @classmethod
    def check_sink(cls) -> None:
        """See `Backend`: the passes take and give what they do from 2.7 on."""
        from flash_attn import flash_attn_interface as interface

        names = ("window_size_left", "window_size_right", "softcap", "alibi_slopes")
        require_arguments(interface._flash_attn_varlen_forward, *names)
        require_arguments(interface._flash_attn_varlen_backward, *names, "rng_state")

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
    ) -> torch.Tensor:
        """See `Backend`."""
        sink = self.sink_of(query.shape[1])
        if sink is not None:
            return sinks.attend_with_sink(self._passes(segments), query, key, value, sink)
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

    def _passes(self, segments: Segments) -> sinks.Passes:
        from flash_attn import flash_attn_interface as interface

        offsets = self._offsets(segments)
        left, right = window_size(segments)
        options: dict[str, Any] = {
            "dropout_p": 0.0,
            "softmax_scale": self.softmax_scale,
            "causal": True,
            "window_size_left": left,
            "window_size_right": right,
            "softcap": 0.0,
            "alibi_slopes": None,
        }

        def forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> sinks.Tensors:
            out, lse, _, rng_state = interface._flash_attn_varlen_forward(
                query, key, value, *offsets, **options
            )
            return out, lse, rng_state

        def backward(grad: torch.Tensor, *saved: torch.Tensor) -> sinks.Tensors:
            *tensors, rng_state = saved
            query, key, value = tensors[:3]
            grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
            interface._flash_attn_varlen_backward(
                grad,
                *tensors,
                *grads,
                *offsets,
                **options,
                deterministic=self.deterministic,
                rng_state=rng_state,
            )
            return grads

        return sinks.Passes(forward, backward)


class FlashHopperBackend(FlashBackend):
    """``flash_attn_varlen_func`` of FlashAttention 3: the same call; old builds return more."""

    most_segments = None  # its scheduler counts tiles in one number

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
        from flash_attn.cute import flash_attn_varlen_func

        return flash_attn_varlen_func

    @classmethod
    def check_installed(cls) -> None:
        """See `Backend`."""
        require_arguments(cls._import(), "cu_seqlens_q", "window_size", "deterministic")

    @classmethod
    def check_sink(cls) -> None:
        """See `Backend`: releases before July 2026 take one and return no gradient of it."""
        from flash_attn.cute import interface

        require_arguments(cls._import(), "learnable_sink")
        require_arguments(interface._flash_attn_bwd, "learnable_sink")

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
    ) -> torch.Tensor:
        """See `Backend`."""
        offsets_q, offsets_k, max_q, max_k = self._offsets(segments)
        # -1 means "no bound" to FlashAttention 2, and a window to this one
        left, right = (None, None) if segments.sliding_window is None else window_size(segments)
        sink = self.sink_of(query.shape[1])
        given = {} if sink is None else {"learnable_sink": sink}
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
            **given,
        )
        return out


class VarlenBackend(_Flash):
    """``torch.nn.attention.varlen``, always through FlashAttention; with a sink, its two passes.

    From Hopper on torch would take cuDNN, which plans, and keeps, a graph for every longest length
    and number of tokens: one per window of a ladder. --deterministic-mode reaches FlashAttention
    through torch.use_deterministic_algorithms.
    """

    most_segments = _MOST_SEGMENTS

    @staticmethod
    def _import() -> Any:
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn

    @classmethod
    def check_installed(cls) -> None:
        """See `Backend`."""
        require_arguments(cls._import(), "scale", "window_size", "enable_gqa")

    @classmethod
    def check_sink(cls) -> None:
        """See `Backend`: before torch 2.15 a pass chooses between cuDNN and this one by itself."""
        from torch.nn.attention import varlen

        for pass_ in (varlen._varlen_attn, varlen._varlen_attn_backward):
            require_arguments(pass_, "scale", "window_size", "backend")

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
    ) -> torch.Tensor:
        """See `Backend`."""
        sink = self.sink_of(query.shape[1])
        if sink is not None:
            passes = self._passes(segments, enable_gqa=query.shape[1] != key.shape[1])
            return sinks.attend_with_sink(passes, query, key, value, sink)
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

    def _passes(self, segments: Segments, *, enable_gqa: bool) -> sinks.Passes:
        offsets = self._offsets(segments)
        window = window_size(segments)
        options: dict[str, Any] = {
            "is_causal": window == (-1, 0),
            "scale": self.softmax_scale,
            "window_size": list(window),
            "backend": SDPBackend.FLASH_ATTENTION.value,
        }

        def forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> sinks.Tensors:
            out, lse, rng_state = torch.ops.torch_attn._varlen_attn(
                query, key, value, *offsets, **options, enable_gqa=enable_gqa
            )
            return out, lse, rng_state

        def backward(grad: torch.Tensor, *saved: torch.Tensor) -> sinks.Tensors:
            *tensors, rng_state = saved
            grads: sinks.Tensors = torch.ops.torch_attn._varlen_attn_backward(
                grad, *tensors, *offsets, **options, rng_state=rng_state
            )
            return grads

        return sinks.Passes(forward, backward)
