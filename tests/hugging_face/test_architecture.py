"""What is read from Megatron's arguments and Bridge's settings, and what config.json says of it."""

from __future__ import annotations

import math
from argparse import Namespace

import pytest
import torch
from random_models import LLAMA

from megatron_skyladder.hugging_face.architecture import (
    Architecture,
    Rope,
    Yarn,
    bridge_arguments,
    extended,
    from_hugging_face,
    from_megatron,
    hugging_face_config,
    megatron_settings,
)

ARGS = {k: v for _, values in megatron_settings(LLAMA) for k, v in values.items()}
ARGS |= {"max_position_embeddings": 64, "use_rope_scaling": False}


def read(**changes: object) -> Architecture:
    return from_megatron(Namespace(**{**ARGS, **changes}), LLAMA.vocab_size)


def test_arguments_are_read() -> None:
    assert read() == LLAMA
    assert read(add_qkv_bias=True).family == "Qwen2"
    assert read(qk_layernorm=True, add_qkv_bias=True).family == "Qwen3"
    assert read(untie_embeddings_and_output_weights=False).tied
    assert read(group_query_attention=False, num_query_groups=1).num_groups == 4
    assert read(kv_channels=None).head_dim == 8


def test_the_epsilon_had_another_name() -> None:
    older = {k: v for k, v in ARGS.items() if k != "layernorm_epsilon"}
    model = from_megatron(Namespace(**{**older, "norm_epsilon": 1e-6}), 330)
    assert model.norm_epsilon == 1e-6
    newer = {k: v for k, v in ARGS.items() if k != "norm_epsilon"}
    assert (
        from_megatron(Namespace(**{**newer, "layernorm_epsilon": 1e-6}), 330).norm_epsilon == 1e-6
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("normalization", "LayerNorm"),
        ("swiglu", False),
        ("add_bias_linear", True),
        ("position_embedding_type", "learned_absolute"),
        ("rotary_percent", 0.5),
        ("rotary_interleaved", True),
        ("no_rope_freq", 4),
        ("apply_layernorm_1p", True),
        ("apply_residual_connection_post_layernorm", True),
        ("qk_l2_norm", True),
        ("attention_output_gate", True),
        ("softmax_type", "learnable"),
        ("softmax_scale", 0.1),
        ("window_size", (127, 0)),
        ("experimental_attention_variant", "dsa"),
        ("multi_latent_attention", True),
        ("glu_linear_offset", 1.0),
        ("activation_func_clamp_value", 7.0),
        ("num_experts", 8),
        ("mtp_num_layers", 1),
        ("use_mup", True),
        ("hybrid_layer_pattern", "M*M*"),
        ("heterogeneous_layers_config_path", "layers.json"),
    ],
)
def test_what_the_family_cannot_express_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"cannot express this model: {name}=") as refusal:
        read(**{name: value})
    assert str(value) in str(refusal.value)


def test_all_that_is_wrong_is_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"normalization=LayerNorm.*swiglu=False.*num_experts=8"):
        read(normalization="LayerNorm", swiglu=False, num_experts=8)


def test_the_factor_of_rope_scaling_is_what_training_had() -> None:
    """Megatron-LM does not hand --rope-scaling-factor to the model."""
    assert read(use_rope_scaling=True, rope_scaling_factor=8.0).rope == Rope(10_000, "llama3", 8.0)
    assert read(use_rope_scaling=True).rope.factor == 8.0
    scaled = Namespace(**{**ARGS, "use_rope_scaling": True, "rope_scaling_factor": 32.0})
    with pytest.raises(ValueError, match=r"--rope-scaling-factor=32.0.*trains with 8"):
        from_megatron(scaled, 330)
    assert from_megatron(scaled, 330, 8.0).rope.factor == 8.0
    assert from_megatron(scaled, 330, 32.0).rope.factor == 32.0


def test_the_interpolation_factor_is_what_training_had() -> None:
    """Up to 0.18 GPT's builder ignores it, from 0.19 on it does not."""
    with pytest.raises(ValueError, match=r"interpolation-factor=4.*--rope-scaling-factor 1"):
        read(rotary_seq_len_interpolation_factor=4)
    sure = {"rotary_seq_len_interpolation_factor": 4, "passes_rotary_interpolation": True}
    assert read(**sure).rope == Rope(10_000, "linear", 4.0)
    unsure = Namespace(**{**ARGS, "rotary_seq_len_interpolation_factor": 4})
    assert from_megatron(unsure, 330, 1.0).rope == Rope(10_000)
    assert from_megatron(unsure, 330, 4.0).rope == Rope(10_000, "linear", 4.0)
    with pytest.raises(ValueError, match="has one scaling"):
        read(**sure, use_rope_scaling=True)


FLAGS = {
    "rotary_scaling_factor": 4.0,
    "yarn_original_max_position_embeddings": 512,
    "yarn_beta_fast": 16.0,
    "yarn_beta_slow": 2.0,
    "yarn_correction_range_round_to_int": False,
    "mscale": 0.7,
    "mscale_all_dim": 0.3,
}


def test_yarn_is_what_megatrons_flags_say() -> None:
    factor = (0.07 * math.log(4) + 1) / (0.03 * math.log(4) + 1)
    rope = read(position_embedding_type="yarn", **FLAGS).rope
    assert rope == Rope(10_000, "yarn", 4.0, Yarn(512, 16.0, 2.0, False, pytest.approx(factor)))
    left_out = {name: None for name in FLAGS if name.startswith("yarn")}
    given = {"rotary_scaling_factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.0}
    rope = read(position_embedding_type="yarn", **left_out, **given).rope
    assert rope.yarn == Yarn(4096, 32.0, 1.0, True, 0.1 * math.log(4) + 1)
    rope = read(position_embedding_type="yarn", **FLAGS | {"rotary_scaling_factor": 1.0}).rope
    assert rope.yarn and rope.yarn.attention_factor == 1.0
    with pytest.raises(ValueError, match="lack yarn_beta_fast, yarn_beta_slow, yarn_correction"):
        read(position_embedding_type="yarn", **given, yarn_original_max_position_embeddings=9)


@pytest.mark.parametrize(
    ("scaling", "yarn"),
    [
        ({}, Yarn(64, 32.0, 1.0, True, 0.1 * math.log(4) + 1)),
        (
            {"mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 16},
            Yarn(16, 32.0, 1.0, True, 1.0),
        ),
        ({"attention_factor": 1.5, "truncate": False}, Yarn(64, 32.0, 1.0, False, 1.5)),
    ],
)
def test_yarn_is_what_transformers_reads(scaling: dict, yarn: Yarn) -> None:
    """Against transformers' own function, where it is there."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = hugging_face_config(LLAMA, "float32")
    del config["rope_parameters"]
    config["rope_scaling"] = {"rope_type": "yarn", "factor": 4.0, **scaling}
    found = from_hugging_face(config)
    assert found.rope == Rope(10_000, "yarn", 4.0, yarn)
    written = hugging_face_config(found, "float32")
    read_alike = [
        ROPE_INIT_FUNCTIONS["yarn"](transformers.LlamaConfig(**each), "cpu")
        for each in (config, written)
    ]
    assert torch.equal(read_alike[0][0], read_alike[1][0])
    assert read_alike[0][1] == pytest.approx(read_alike[1][1], rel=1e-15)


def test_yarn_is_not_extended_by_its_base() -> None:
    yarn = Yarn(16, 32.0, 1.0, True, 1.0)
    model = Architecture(**{**vars(LLAMA), "rope": Rope(10_000, "yarn", 4.0, yarn)})
    with pytest.raises(ValueError, match="extended with YaRN already: its factor is what grows"):
        extended(model, 128)


@pytest.mark.parametrize(
    "rope",
    [
        Rope(1_000_000),
        Rope(10_000, "linear", 4.0),
        Rope(500_000, "llama3", 8.0),
        Rope(500_000, "yarn", 8.5, Yarn(512, 16.0, 2.0, False, 1.25)),
    ],
)
def test_config_says_the_same_to_transformers_4_and_5(rope: Rope) -> None:
    """Version 4 reads rope_theta and rope_scaling, 5 saves and reads rope_parameters."""
    model = Architecture(**{**vars(LLAMA), "rope": rope})
    config = hugging_face_config(model, "bfloat16")
    older = {k: v for k, v in config.items() if k != "rope_parameters"}
    newer = {k: v for k, v in config.items() if k not in ("rope_theta", "rope_scaling")}
    assert (
        from_hugging_face(config) == from_hugging_face(older) == from_hugging_face(newer) == model
    )
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == rope.base


def test_ids_that_are_not_there_are_said_to_be_none() -> None:
    """Left out they would be 1 and 2."""
    config = hugging_face_config(LLAMA, "float32", eos=0)
    assert (config["bos_token_id"], config["eos_token_id"]) == (None, 0)


BRIDGE = {
    "model": {
        "num_layers": 4,
        "hidden_size": 32,
        "ffn_hidden_size": 80,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 8,
        "normalization": "RMSNorm",
        "layernorm_epsilon": 1e-5,
        "gated_linear_unit": True,
        "activation_func": {"_call_": False, "_target_": "torch.nn.functional.silu"},
        "add_bias_linear": False,
        "position_embedding_type": "rope",
        "rotary_base": 10_000,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "share_embeddings_and_output_weights": False,
        "init_method_std": 0.02,
        "seq_length": 64,
        "vocab_size": 330,
        "rope_scaling": False,
        "num_moe_experts": None,
        "layernorm_zero_centered_gamma": False,
        "softmax_type": "vanilla",
    },
    "tokenizer": {"tokenizer_type": "NullTokenizer", "tokenizer_model": None, "vocab_size": 330},
}


def read_bridge(**changes: object) -> Architecture:
    config = {**BRIDGE, "model": {**BRIDGE["model"], **changes}}
    return from_megatron(bridge_arguments(config), 330)


def test_bridge_settings_are_read() -> None:
    assert read_bridge() == LLAMA
    assert read_bridge(num_query_groups=None).num_groups == 4
    assert read_bridge(share_embeddings_and_output_weights=True).tied
    assert read_bridge(seq_len_interpolation_factor=2.0).rope == Rope(10_000, "linear", 2.0)
    # unlike Megatron-LM, Bridge hands it to the model
    scaled = read_bridge(rope_scaling=True, rope_scaling_factor=32.0)
    assert scaled.rope == Rope(10_000, "llama3", 32.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_moe_experts": 8}, "num_experts=8"),
        ({"layernorm_zero_centered_gamma": True}, "apply_layernorm_1p=True"),
        ({"activation_func": {"_target_": "torch.nn.functional.gelu"}}, "swiglu=False"),
        ({"gated_linear_unit": False}, "swiglu=False"),
        ({"window_size": [127, 0]}, "window_size"),
        ({"no_rope_freq": [0, 0, 0, 1]}, r"no_rope_freq=\[0, 0, 0, 1\]"),
        ({"linear_attention_freq": [1, 1, 1, 0]}, "linear_attention_freq"),
        ({"softmax_scale": {"_target_": "own.scale"}}, "softmax_scale"),
    ],
)
def test_what_bridge_has_and_the_family_has_not(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_bridge(**changes)
