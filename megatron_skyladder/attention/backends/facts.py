"""What a GPU's kernels are: versions, and which sub-backend Transformer Engine takes for a call."""

from __future__ import annotations

import importlib.metadata
from dataclasses import fields
from typing import Any

import torch

FLASH_ATTENTIONS = {  # name of a backend: distribution
    "flash": "flash-attn",
    "fa3": "flash_attn_3",
    "fa4": "flash-attn-4",
}
TRANSFORMER_ENGINE = "transformer-engine"
UNFUSED = "UnfusedDotProductAttention"


def gpu_facts() -> dict[str, Any]:
    """Return the versions of cuDNN, TE and FlashAttention, and TE's sub-backends where it is."""
    found: dict[str, Any] = {"cudnn": cudnn_version()}
    found[TRANSFORMER_ENGINE] = version(TRANSFORMER_ENGINE)
    for distribution in FLASH_ATTENTIONS.values():
        found[distribution] = version(distribution)
    chosen = te_sub_backends()
    if chosen is not None:
        found["te sub-backends"] = chosen
    return found


def cudnn_version() -> str:
    """Return the version of cuDNN that torch loads."""
    number = torch.backends.cudnn.version()
    if not number:
        return "none"
    major = 10_000 if number >= 90_000 else 1000
    return f"{number // major}.{number % major // 100}.{number % 100}"


def version(distribution: str) -> str:
    """Return the version of an installed distribution."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def te_sub_backends(
    heads: tuple[int, int, int] = (32, 4, 64), **changes: Any
) -> dict[str, str] | None:
    """Return which of its attentions Transformer Engine takes here; None where it is not here.

    Asked of TE's own selection, with what our calls come to: the full window and windows as a
    batch ("batched"), documents ("packed"), keys of other ranks ("packed, other ranks").

    Args:
        heads: query heads, key heads and head size.
        changes: to TE's AttentionParams, such as ``deterministic``.
    """
    try:
        import transformer_engine.pytorch  # noqa: F401
        from transformer_engine.pytorch.attention.dot_product_attention import utils
    except Exception:  # not installed, or half so: doctor says that elsewhere
        return None
    query_heads, key_heads, size = heads
    known = {each.name for each in fields(utils.AttentionParams)}
    batched = {
        "qkv_layout": "bshd_bshd_bshd",
        "attn_mask_type": "causal",
        "bottom_right_diagonal": False,
        "batch_size": 1,
        "max_seqlen_q": 8192,
        "max_seqlen_kv": 8192,
    }
    packed = batched | {
        "qkv_layout": "thd_thd_thd",
        "attn_mask_type": "padding_causal",
        "batch_size": 16,
        "max_seqlen_q": 4096,
        "max_seqlen_kv": 4096,
        "num_tokens_q": 8192,
        "num_tokens_kv": 8192,
    }
    remote = packed | {
        "attn_mask_type": "padding_causal_bottom_right",
        "bottom_right_diagonal": True,
        "max_seqlen_q": 1024,
        "num_tokens_q": 4096,
    }
    found = {}
    for name, call in (("batched", batched), ("packed", packed), ("packed, other ranks", remote)):
        given = {
            "num_heads": query_heads,
            "num_gqa_groups": key_heads,
            "head_dim_qk": size,
            "head_dim_v": size,
            "window_size": (-1, 0),
            "core_attention_bias_requires_grad": False,
            "softmax_scale": size**-0.5,
            **call,
            **changes,
        }
        params = utils.AttentionParams(**{k: v for k, v in given.items() if k in known})
        found[name] = _name(utils.get_attention_backend(params))
    return found


def _name(selection: tuple[Any, ...]) -> str:
    """Return the sub-backend that a selection of TE names."""
    use_flash, flash_version, use_fused, _, use_unfused, *_ = selection
    if use_flash:
        return f"FlashAttention {flash_version}"
    if use_fused:
        return "cuDNN (FusedAttention)"
    return UNFUSED if use_unfused else "none"
