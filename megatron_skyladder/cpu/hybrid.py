"""Megatron's hybrid stack without Transformer Engine, of which alone it has a spec.

Part of the CPU engine. The layers are the two halves of Megatron's own local GPT layers; a
checkpoint's keys are those of the stack that Transformer Engine runs.
"""

from __future__ import annotations

import importlib.util
from typing import Any


def prepare() -> None:
    """Let Megatron's own stack build local layers, where Transformer Engine is not installed."""
    try:
        if importlib.util.find_spec("megatron.core.models.hybrid.hybrid_block") is None:
            return
    except ModuleNotFoundError:  # up to 0.17
        return
    from megatron.core.extensions import transformer_engine

    if transformer_engine.HAVE_TE:
        return
    from megatron.core.models.hybrid import hybrid_block, hybrid_layer_specs
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    hybrid_block.TENorm = WrappedTorchNorm  # of the end of the stack, which no spec names
    stack = hybrid_layer_specs.hybrid_stack_spec.submodules  # in place: others have it by now
    for name, layer in _layers().items():
        setattr(stack, name, layer)


def _layers() -> dict[str, Any]:
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import (
        MoETransformerLayer,
        TransformerLayer,
        TransformerLayerSubmodules,
    )

    dense, experts = _gpt_layer(None), _gpt_layer(8)  # the model's own number of experts counts

    def with_mlp(module: type, layer: Any) -> Any:
        parts = TransformerLayerSubmodules(
            pre_mlp_layernorm=layer.pre_mlp_layernorm,
            mlp=layer.mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"},
        )
        return ModuleSpec(module=module, submodules=parts)

    attention = TransformerLayerSubmodules(
        input_layernorm=dense.input_layernorm,
        self_attention=dense.self_attention,
        self_attn_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map={"input_layernorm.": "self_attention.linear_qkv.layer_norm_"},
    )
    return {
        "attention_layer": ModuleSpec(module=TransformerLayer, submodules=attention),
        "mlp_layer": with_mlp(MLPLayer, dense),
        "moe_layer": with_mlp(MoETransformerLayer, experts),
    }


def _gpt_layer(num_experts: int | None) -> Any:
    """Return the parts of a local GPT layer; its norm is the one that takes either kind."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    return get_gpt_layer_local_spec(num_experts=num_experts, normalization="RMSNorm").submodules
