"""The kernels that can run windowed attention, behind one call.

    backend(query, key, value, segments) -> [Tq, h, d]

with query [Tq, h, d], key and value [Tk, g, d]: the tokens of all rows, row after row, h query
heads, g key/value heads (h a multiple of g), and `segments` the offsets that attention may not
cross, aligned at the bottom right: the last query of a segment sees its last key.

| name   | what runs                                            | needs                        |
|--------|------------------------------------------------------|------------------------------|
| te     | Megatron's TEDotProductAttention on thd tensors      | transformer-engine, a GPU    |
| varlen | torch.nn.attention.varlen                            | torch >= 2.12, a GPU         |
| flash  | flash_attn_varlen_func                               | flash-attn 2.4 or later, GPU |
| sdpa   | torch scaled_dot_product_attention, windows as batch | nothing                      |

All but sdpa are for float16 and bfloat16: in float32 varlen and flash raise, and Transformer Engine
falls back to attention over padded segments. --deterministic-mode holds for all of them: flash is
told, varlen leaves cuDNN aside, varlen and sdpa follow torch.use_deterministic_algorithms, and for
te Megatron asks for NVTE_ALLOW_NONDETERMINISTIC_ALGO=0.
"""

from __future__ import annotations

import copy
import inspect
import logging
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_skyladder.attention import sdpa
from megatron_skyladder.attention.segments import Segments
from megatron_skyladder.cpu import engine as cpu_engine
from megatron_skyladder.errors import UsageError

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
    """``torch.nn.attention.varlen``: FlashAttention, or cuDNN, as PyTorch ships them."""

    def __init__(self, *, config: Any, softmax_scale: float, **_: Any) -> None:
        super().__init__()
        from torch.nn.attention.varlen import varlen_attn

        self.softmax_scale = softmax_scale
        self.attend: Any = varlen_attn
        if config.deterministic_mode:
            self.attend = sdpa_kernel(SDPBackend.FLASH_ATTENTION)(varlen_attn)

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

    def __init__(self, *, config: Any, softmax_scale: float, **_: Any) -> None:
        super().__init__()
        from flash_attn import flash_attn_varlen_func

        self.softmax_scale = softmax_scale
        self.deterministic = config.deterministic_mode
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
            deterministic=self.deterministic,
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
            # or its PyTorch attention takes the queries' lengths for those of the keys
            attention_type="cross",
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

        # TE tells the layout from addresses and knows none in which contiguous keys begin later
        key, value = (
            x.clone() if x.storage_offset() and x.is_contiguous() else x for x in (key, value)
        )
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
        UsageError: what the backend needs is not installed.
    """
    name, reason = choose_backend(name, arguments["config"].params_dtype)
    if arguments["layer_number"] == 1:
        logger.info("attention backend %s: %s", name, reason)
    return BACKENDS[name](**arguments)


def choose_backend(name: str, dtype: torch.dtype = torch.bfloat16) -> tuple[str, str]:
    """Return the backend that a name stands for here, and why; ``auto`` takes the best there is.

    Args:
        name: a key of ``BACKENDS`` or ``auto``.
        dtype: of the model's parameters.

    Raises:
        UsageError: what the backend needs is not installed.
    """
    if name == "auto":
        return _best_backend(dtype)
    missing = _missing(name)
    if missing:
        raise UsageError(
            f"--skyladder-attention-backend={name} needs {missing}. Install it, or use auto, "
            "which takes the best of what is there."
        )
    return name, "as --skyladder-attention-backend says"


@lru_cache(maxsize=8)
def _best_backend(dtype: torch.dtype) -> tuple[str, str]:
    if cpu_engine.is_installed() or cpu_engine.is_requested():
        return "sdpa", "the CPU engine runs, the others need a GPU"
    if dtype == torch.float32:
        return "sdpa", "the model is float32, the others take float16 and bfloat16"
    passed_over: list[str] = []
    for name in ("te", "flash", "varlen"):
        missing = _missing(name)
        if missing is None:
            return name, "; ".join([*passed_over, f"{name} is installed"])
        passed_over.append(f"no {missing}")
    return "sdpa", "; ".join(passed_over)


_NEEDS = {
    "te": "transformer-engine",
    "varlen": "torch 2.12 or later",
    "flash": "flash-attn 2.4 or later",
}


def _missing(name: str) -> str | None:
    """Return what a backend lacks here, or None.

    A package is imported rather than looked for: one that is half installed, or built for another
    torch, is not there either, and raises what it likes.
    """
    try:
        if name == "te":
            import transformer_engine.pytorch  # noqa: F401
        elif name == "flash":
            from flash_attn import flash_attn_varlen_func

            _require_arguments(flash_attn_varlen_func, "window_size", "deterministic")
        elif name == "varlen":
            from torch.nn.attention.varlen import varlen_attn

            _require_arguments(varlen_attn, "scale", "window_size", "enable_gqa")
    except Exception as error:
        return f"{_NEEDS[name]} ({type(error).__name__}: {error})"
    return None


def _require_arguments(function: Any, *names: str) -> None:
    missing = [name for name in names if name not in inspect.signature(function).parameters]
    if missing:
        raise ImportError(f"{function.__name__} does not take {', '.join(missing)}")


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
