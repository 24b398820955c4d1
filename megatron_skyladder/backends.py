"""The kernels that can run windowed attention, behind one call.

    backend(query, key, value, segments) -> [Tq, h, d]

with query [Tq, h, d], key and value [Tk, g, d]: the tokens of all rows, row after row, h query
heads, g key/value heads (h a multiple of g), and `segments` the offsets that attention may not
cross, aligned at the bottom right: the last query of a segment sees its last key.

| name   | what runs                                            | needs                        |
|--------|------------------------------------------------------|------------------------------|
| te     | Megatron's TEDotProductAttention on thd tensors      | transformer-engine, a GPU    |
| varlen | torch.nn.attention.varlen                            | torch >= 2.12, a GPU         |
| flash  | flash_attn_varlen_func                               | flash-attn 2.1 or later, GPU |
| sdpa   | torch scaled_dot_product_attention, windows as batch | nothing                      |
"""

from __future__ import annotations

import copy
import importlib.util
import logging
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch

from megatron_skyladder import cpu_engine, sdpa
from megatron_skyladder.segments import Segments

logger = logging.getLogger(__name__)


class SdpaBackend(torch.nn.Module):
    """PyTorch's scaled-dot-product attention; runs anywhere."""

    def __init__(self, *, softmax_scale: float, **_: Any) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
    ) -> torch.Tensor:
        """See the module."""
        return sdpa.attend_segments(query, key, value, segments, self.softmax_scale)


class VarlenBackend(torch.nn.Module):
    """``torch.nn.attention.varlen``: FlashAttention as PyTorch ships it."""

    def __init__(self, *, softmax_scale: float, **_: Any) -> None:
        super().__init__()
        from torch.nn.attention.varlen import varlen_attn

        self.softmax_scale = softmax_scale
        self.attend: Any = varlen_attn

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
    ) -> torch.Tensor:
        """See the module."""
        out: torch.Tensor = self.attend(
            query,
            key,
            value,
            segments.cu_seqlens_q_device,
            segments.cu_seqlens_k_device,
            segments.max_seqlen_q,
            segments.max_seqlen_k,
            scale=self.softmax_scale,
            window_size=_window_size(segments),
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out


class FlashBackend(torch.nn.Module):
    """``flash_attn_varlen_func`` of flash-attn 2."""

    def __init__(self, *, softmax_scale: float, **_: Any) -> None:
        super().__init__()
        from flash_attn import flash_attn_varlen_func

        self.softmax_scale = softmax_scale
        self.attend = flash_attn_varlen_func

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
    ) -> torch.Tensor:
        """See the module."""
        return self.attend(
            query,
            key,
            value,
            segments.cu_seqlens_q_device,
            segments.cu_seqlens_k_device,
            segments.max_seqlen_q,
            segments.max_seqlen_k,
            softmax_scale=self.softmax_scale,
            causal=True,
            window_size=_window_size(segments),
        )


class TransformerEngineBackend(torch.nn.Module):
    """Megatron's TEDotProductAttention on thd tensors; TE picks FlashAttention or cuDNN.

    TE's own context parallelism stays off: keys have been fetched before it is called.
    """

    def __init__(self, *, config: Any, softmax_scale: float, **arguments: Any) -> None:
        super().__init__()
        from megatron.core.extensions.transformer_engine import TEDotProductAttention
        from megatron.core.transformer.enums import AttnMaskType

        config = copy.copy(config)
        config.context_parallel_size = 1
        attention = TEDotProductAttention(
            config,
            attn_mask_type=AttnMaskType.padding_causal,
            attention_type="self",
            softmax_scale=softmax_scale,
            **arguments,
        )
        # in a tuple, so that its (empty) FP8 state stays out of checkpoints and a run can go on
        # with another backend
        self._attention = (attention,)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
    ) -> torch.Tensor:
        """See the module."""
        from megatron.core.packed_seq_params import PackedSeqParams

        (attention,) = self._attention
        attention.window_size = _window_size(segments)
        offsets_q, offsets_k = segments.cu_seqlens_q_device, segments.cu_seqlens_k_device
        out = attention(
            query,
            key,
            value,
            None,
            attn_mask_type=_CAUSAL if offsets_k is offsets_q else _CAUSAL_BOTTOM_RIGHT,
            packed_seq_params=PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=offsets_q,
                cu_seqlens_kv=offsets_k,
                max_seqlen_q=segments.max_seqlen_q,
                max_seqlen_kv=segments.max_seqlen_k,
            ),
        )
        return out.view(query.shape)


# TE's names; Megatron's enumeration lacks the second, and only the name is looked at
_CAUSAL = SimpleNamespace(name="padding_causal")
_CAUSAL_BOTTOM_RIGHT = SimpleNamespace(name="padding_causal_bottom_right")

BACKENDS: dict[str, type[torch.nn.Module]] = {
    "te": TransformerEngineBackend,
    "varlen": VarlenBackend,
    "flash": FlashBackend,
    "sdpa": SdpaBackend,
}


def make_backend(name: str, **arguments: Any) -> torch.nn.Module:
    """Build the backend of one layer.

    Args:
        name: a key of ``BACKENDS`` or ``auto``.
        arguments: those of Megatron's core attention, with ``softmax_scale`` resolved.

    Raises:
        ValueError: what the backend needs is not installed.
    """
    name, reason = choose_backend(name)
    if arguments["layer_number"] == 1:
        logger.info("attention backend %s: %s", name, reason)
    return BACKENDS[name](**arguments)


def choose_backend(name: str) -> tuple[str, str]:
    """Return the backend that a name stands for here, and why; ``auto`` takes the best there is.

    Raises:
        ValueError: what the backend needs is not installed.
    """
    if name == "auto":
        return pick_backend()
    missing = _missing(name)
    if missing:
        raise ValueError(
            f"--skyladder-attention-backend={name} needs {missing}. Install it, or use auto, "
            "which takes the best of what is there."
        )
    return name, "as --skyladder-attention-backend says"


@lru_cache(maxsize=1)
def pick_backend() -> tuple[str, str]:
    """Return the best backend for this machine and why."""
    if cpu_engine.is_installed() or cpu_engine.is_requested():
        return "sdpa", "the CPU engine runs, the others need a GPU"
    passed_over: list[str] = []
    for name in ("te", "flash", "varlen"):
        missing = _missing(name)
        if missing is None:
            return name, "; ".join([*passed_over, f"{name} is installed"])
        passed_over.append(f"no {missing}")
    return "sdpa", "; ".join(passed_over)


def _missing(name: str) -> str | None:
    """Return what a backend lacks here, or None."""
    module = {
        "te": "transformer_engine",
        "flash": "flash_attn",
        "varlen": "torch.nn.attention.varlen",
    }
    if name in module and importlib.util.find_spec(module[name]) is None:
        return {"varlen": "torch >= 2.12"}.get(name, module[name])
    return None


def _window_size(segments: Segments) -> tuple[int, int]:
    """Return FlashAttention's (left, right), both inclusive: W visible tokens are (W - 1, 0)."""
    left = -1 if segments.sliding_window is None else segments.sliding_window - 1
    return left, 0


def to_thd(tensor: torch.Tensor) -> torch.Tensor:
    """[s, b, heads, d] -> [b * s, heads, d], row after row; a view where b is 1."""
    return tensor.transpose(0, 1).flatten(0, 1)


def from_thd(tensor: torch.Tensor, num_rows: int) -> torch.Tensor:
    """[b * s, heads, d] -> [s, b, heads * d]; a view where b is 1."""
    return tensor.flatten(1).unflatten(0, (num_rows, -1)).transpose(0, 1)
