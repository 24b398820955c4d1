"""Megatron's hybrid stack without Transformer Engine, of which alone it has a spec.

Part of the CPU engine. The layers are the two halves of Megatron's own local GPT layers; a
checkpoint's keys are those of the stack that Transformer Engine runs.
"""

from __future__ import annotations

import importlib.util
import inspect
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
    for name, layer in (_layers() | _recurrent_layers()).items():
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


def _recurrent_layers() -> dict[str, Any]:
    """Return Megatron's own Mamba and gated delta net layers, with its local linear layers.

    They need kernels that no CPU has: for tests, which bring some in plain torch.
    """
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
    from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
    from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_layer import (
        TransformerLayer,
        TransformerLayerSubmodules,
    )

    into = _taking_what_it_knows(ColumnParallelLinear)
    out_of = _taking_what_it_knows(RowParallelLinear)
    mamba = MambaMixerSubmodules(in_proj=into, out_proj=out_of)
    delta = GatedDeltaNetSubmodules(in_proj=into, out_norm=WrappedTorchNorm, out_proj=out_of)
    layer = MambaLayerSubmodules(
        norm=WrappedTorchNorm,
        mixer=ModuleSpec(module=MambaMixer, submodules=mamba),
        mamba_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map={"norm.": "mixer.in_proj.layer_norm_"},
    )
    attention = TransformerLayerSubmodules(
        input_layernorm=WrappedTorchNorm,
        self_attention=ModuleSpec(module=GatedDeltaNet, submodules=delta),
        self_attn_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map={"input_layernorm.": "self_attention.in_proj.layer_norm_"},
    )
    return {
        "mamba_layer": ModuleSpec(module=MambaLayer, submodules=layer),
        "gdn_layer": ModuleSpec(module=TransformerLayer, submodules=attention),
    }


def _taking_what_it_knows(linear: Any) -> type:
    """Return a linear layer that is built with the arguments of Transformer Engine's."""
    known = inspect.signature(linear.__init__).parameters

    class Linear(linear):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{name: kwargs[name] for name in kwargs if name in known})

    return Linear


def _gpt_layer(num_experts: int | None) -> Any:
    """Return the parts of a local GPT layer; its norm is the one that takes either kind."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    return get_gpt_layer_local_spec(num_experts=num_experts, normalization="RMSNorm").submodules
