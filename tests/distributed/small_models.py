"""The model of bodies that build one without Megatron's trainer."""

from __future__ import annotations

from typing import Any

import torch


def small_config(**sizes: Any) -> Any:
    """Return a small Llama-like configuration of Megatron's, with weights large enough to matter.

    Args:
        sizes: more of its settings, ``num_layers`` among them.
    """
    from megatron.core.transformer import TransformerConfig

    return TransformerConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        normalization="RMSNorm",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        init_method_std=0.2,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        **sizes,
    )
