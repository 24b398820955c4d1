"""What a decoder is, in the words of Megatron's arguments, Bridge's and Hugging Face's settings.

Llama, Qwen2 (bias on q, k, v) and Qwen3 (norms on q and k) are one family: RMSNorm before attention
and MLP, rotary positions, grouped queries, SwiGLU. What they cannot express is refused by name.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_skyladder.ladder.continuation import Checkpoint
from megatron_skyladder.ladder.flags import PREFIX

FAMILIES = ("Llama", "Qwen2", "Qwen3")
PRECISIONS = ("float32", "bfloat16", "float16")
DEFAULT_ROTARY_BASE = 10_000
# Megatron's --use-rope-scaling is Llama 3.1's; all but the factor are constants in its code
LLAMA3_FACTOR = 8.0
LLAMA3_REST = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# Megatron's arguments that change what the model computes -> what the family can express.
EXPRESSIBLE: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",),
    "swiglu": (True,),
    "add_bias_linear": (False,),
    "position_embedding_type": ("rope", "yarn"),
    "rotary_percent": (1.0,),
    "rotary_interleaved": (False,),
    "no_rope_freq": (None,),
    "apply_layernorm_1p": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "qk_l2_norm": (False,),
    "attention_output_gate": (False,),
    "softmax_type": ("vanilla",),
    "softmax_scale": (None,),
    "window_size": (None,),
    "experimental_attention_variant": (None,),
    "linear_attention_freq": (None,),
    "multi_latent_attention": (False,),
    "squared_relu": (False,),
    "quick_geglu": (False,),
    "glu_linear_offset": (0.0,),
    "activation_func_clamp_value": (None,),
    "num_experts": (None,),
    "mtp_num_layers": (None, 0),
    "use_mup": (False,),
    "hybrid_layer_pattern": (None,),
    "hybrid_override_pattern": (None,),
    "is_hybrid_model": (False,),
    "heterogeneous_layers_config_path": (None,),
    "heterogeneous_layers_config_encoded_json": (None,),
}
# what a schedule needs beside its flags and the model, and Bridge keeps in other sections
_OF_THE_CLOCK = ("train_iters", "train_samples", "global_batch_size")
_YARN_ARGUMENTS: dict[str, Any] = {  # Megatron's, with what its module has where they are None
    "rotary_scaling_factor": 1.0,
    "yarn_original_max_position_embeddings": 4096,
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
    "yarn_correction_range_round_to_int": True,
    "mscale": 1.0,
    "mscale_all_dim": 0.0,
}
# the same for config.json; None: absent as well
_EXPRESSIBLE_CONFIG: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "mlp_bias": (None, False),
    "partial_rotary_factor": (None, 1.0),
    "use_sliding_window": (None, False),
    "quantization_config": (None,),
    "head_dim_list": (None,),
}


@dataclass(frozen=True)
class Yarn:
    """What YaRN has beside the base and the factor (arXiv:2309.00071).

    Args:
        original: positions that the model had before it was extended.
        beta_fast: frequencies with more rotations than this within them stay.
        beta_slow: those with fewer are divided by the factor; between them it is a mean.
        rounded: whether both ends of that range are rounded outwards to whole dimensions.
        attention_factor: on cosines and sines.
    """

    original: int
    beta_fast: float
    beta_slow: float
    rounded: bool
    attention_factor: float


@dataclass(frozen=True)
class Rope:
    """Rotary positions.

    Args:
        base: of the frequencies; ``rope_theta``, ``--rotary-base``.
        kind: ``default``, ``linear`` (positions divided by the factor), ``llama3`` or ``yarn``.
        factor: of the scaling.
        yarn: the rest of that kind.
    """

    base: float = DEFAULT_ROTARY_BASE
    kind: str = "default"
    factor: float = 1.0
    yarn: Yarn | None = None

    @property
    def parameters(self) -> dict[str, Any]:
        """What stands in config.json, without the base."""
        if self.kind == "default":
            return {"rope_type": "default"}
        rest: dict[str, Any] = LLAMA3_REST if self.kind == "llama3" else {}
        if self.yarn is not None:  # nothing is left to defaults, which differ between readers
            rest = {
                "original_max_position_embeddings": self.yarn.original,
                "beta_fast": self.yarn.beta_fast,
                "beta_slow": self.yarn.beta_slow,
                "truncate": self.yarn.rounded,
                "attention_factor": self.yarn.attention_factor,
            }
        return {"rope_type": self.kind, "factor": self.factor, **rest}


@dataclass(frozen=True)
class Architecture:
    """A decoder of the Llama family."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_groups: int
    head_dim: int
    vocab_size: int  # tokens, without padding
    max_positions: int
    norm_epsilon: float
    init_std: float
    rope: Rope
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    # Llama and Qwen3 have a bias on attention's output too where they have it on q, k, v. Megatron
    # has it there only together with all others, so it is zero.
    output_bias: bool = False

    @property
    def family(self) -> str:
        """Which of `FAMILIES`; biases on q, k, v are Qwen2's, or Llama's with `output_bias`."""
        if self.qk_norm:
            return "Qwen3"
        return "Qwen2" if self.qkv_bias and not self.output_bias else "Llama"


def from_megatron(
    args: Namespace, vocab_size: int, rope_scaling_factor: float | None = None
) -> Architecture:
    """Read Megatron's arguments, as a checkpoint has them.

    Args:
        args: Megatron's, see `bridge_arguments` for Bridge's.
        vocab_size: tokens of the tokenizer.
        rope_scaling_factor: which factor ``--use-rope-scaling`` or
            ``--rotary-seq-len-interpolation-factor`` was trained with, where the arguments leave it
            open.

    Raises:
        ValueError: the family cannot express it; the message names every setting.
    """
    wrong = [
        f"{name}={getattr(args, name)} (has to be {' or '.join(map(str, possible))})"
        for name, possible in EXPRESSIBLE.items()
        if hasattr(args, name) and getattr(args, name) not in possible
    ]
    if wrong:
        raise ValueError(
            f"Llama, Qwen2 and Qwen3 cannot express this model: {', '.join(wrong)}. Such a model "
            "needs modelling code of its own."
        )
    qkv_bias = bool(getattr(args, "add_qkv_bias", False))
    qk_norm = bool(getattr(args, "qk_layernorm", False))
    return Architecture(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_heads=args.num_attention_heads,
        num_groups=args.num_query_groups
        if args.group_query_attention
        else args.num_attention_heads,
        head_dim=args.kv_channels or args.hidden_size // args.num_attention_heads,
        vocab_size=vocab_size,
        max_positions=args.max_position_embeddings,
        # renamed in 0.19
        norm_epsilon=getattr(args, "layernorm_epsilon", None) or args.norm_epsilon,
        init_std=args.init_method_std,
        rope=_megatron_rope(args, rope_scaling_factor),
        tied=not args.untie_embeddings_and_output_weights,
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        output_bias=qkv_bias and qk_norm,
    )


def _megatron_rope(args: Namespace, given_factor: float | None) -> Rope:
    if args.position_embedding_type == "yarn":  # which takes no other scaling
        return _megatron_yarn(args)
    scaled = bool(getattr(args, "use_rope_scaling", False))
    interpolation = getattr(args, "rotary_seq_len_interpolation_factor", None)
    if scaled and interpolation:
        raise ValueError(
            "the model has both --use-rope-scaling and --rotary-seq-len-interpolation-factor; "
            "Hugging Face's Llama has one scaling."
        )
    if scaled:
        return Rope(args.rotary_base, "llama3", _llama3_factor(args, given_factor))
    factor = _linear_factor(args, interpolation, given_factor) if interpolation else 1.0
    return Rope(args.rotary_base) if factor == 1 else Rope(args.rotary_base, "linear", factor)


def _megatron_yarn(args: Namespace) -> Rope:
    """Return what the flags of Megatron-LM 0.19 say; None is the module's default."""
    missing = [name for name in _YARN_ARGUMENTS if not hasattr(args, name)]
    if missing:
        raise ValueError(
            f"the model's positions are YaRN's, and the checkpoint's arguments lack "
            f"{', '.join(missing)}, which Megatron-LM has from 0.19 on. Export it with what trained"
            " it, such as Megatron Bridge."
        )
    given = (getattr(args, name) for name in _YARN_ARGUMENTS)
    factor, original, fast, slow, rounded, mscale, mscale_all_dim = (
        default if value is None else value
        for value, default in zip(given, _YARN_ARGUMENTS.values(), strict=True)
    )
    concentration = _concentration(factor, mscale) / _concentration(factor, mscale_all_dim)
    yarn = Yarn(original, float(fast), float(slow), rounded, concentration)
    return Rope(args.rotary_base, "yarn", float(factor), yarn)


def _concentration(factor: float, mscale: float = 1.0) -> float:
    """Return the factor on cosines and sines (arXiv:2309.00071), as Megatron does."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _linear_factor(args: Namespace, recorded: float, given: float | None) -> float:
    """Return the interpolation that training had: GPT's builders ignored the flag up to 0.18."""
    if given is not None:
        return given
    if not getattr(args, "passes_rotary_interpolation", False):
        raise ValueError(
            f"the run was given --rotary-seq-len-interpolation-factor={recorded}, which "
            "Megatron-LM up to 0.18 does not hand to the model, and the checkpoint does not say "
            "which release wrote it. Say what your Megatron did: --rope-scaling-factor 1 (up to "
            f"0.18), or {recorded:g}; --check tells."
        )
    return float(recorded)


def _llama3_factor(args: Namespace, given: float | None) -> float:
    """Return the factor that training had, which is not what --rope-scaling-factor says.

    Megatron-LM's builders (seen in 0.16 to 0.19) do not pass it on, so models have 8 whatever the
    flag is.
    """
    recorded = getattr(args, "rope_scaling_factor", LLAMA3_FACTOR)
    if given is not None:
        return given
    if recorded != LLAMA3_FACTOR and not getattr(args, "passes_rope_scaling_factor", False):
        raise ValueError(
            f"the run was given --rope-scaling-factor={recorded}, which Megatron-LM up to 0.19 "
            f"does not hand to the model: it trains with {LLAMA3_FACTOR:g}. Say what your Megatron "
            f"did: --rope-scaling-factor {LLAMA3_FACTOR:g}, or {recorded:g}; --check tells."
        )
    return float(recorded)


def bridge_arguments(run_config: Mapping[str, Any]) -> Namespace:
    """Return a Bridge checkpoint's settings by the names of Megatron's arguments.

    Args:
        run_config: what is in its run_config.yaml.
    """
    model = dict(run_config["model"])
    activation = model.get("activation_func") or {}
    target = activation.get("_target_") if isinstance(activation, Mapping) else activation
    # what decides the model comes along whatever it is: an object is refused, not left out
    kept = {name: v for name, v in model.items() if name in EXPRESSIBLE or _is_plain(v)}
    args = Namespace(**kept)
    args.swiglu = bool(model.get("gated_linear_unit")) and str(target).endswith(".silu")
    args.num_query_groups = model.get("num_query_groups") or model["num_attention_heads"]
    args.group_query_attention = True
    args.kv_channels = model.get("kv_channels")
    args.max_position_embeddings = model["seq_length"]
    args.num_experts = model.get("num_moe_experts")
    args.apply_layernorm_1p = bool(model.get("layernorm_zero_centered_gamma"))
    args.untie_embeddings_and_output_weights = not model["share_embeddings_and_output_weights"]
    args.use_rope_scaling = bool(model.get("rope_scaling"))
    args.passes_rope_scaling_factor = True  # unlike Megatron-LM
    args.rotary_seq_len_interpolation_factor = model.get("seq_len_interpolation_factor")
    args.passes_rotary_interpolation = True
    tokenizer = run_config.get("tokenizer") or {}
    for name in ("tokenizer_type", "tokenizer_model", "vocab_size"):
        setattr(args, name, tokenizer.get(name))
    if args.vocab_size is None:
        args.vocab_size = model.get("vocab_size")
    ladder = Checkpoint.of_variables(run_config.get("env_vars") or {}, 0).arguments
    for name, value in vars(ladder).items():
        if name.startswith(PREFIX) or name in _OF_THE_CLOCK:
            setattr(args, name, value)
    return args


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):  # one entry for each layer; Bridge writes frequencies as such
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def from_hugging_face(config: Mapping[str, Any]) -> Architecture:
    """Read a config.json of transformers 4 or 5.

    Raises:
        ValueError: the model is of another family, or Megatron-LM's flags cannot express it.
    """
    kind = config.get("model_type")
    families = {name.lower(): name for name in FAMILIES}
    if kind not in families:
        raise ValueError(
            f'config.json has "model_type": {kind!r}. Megatron checkpoints can be made of '
            f"{', '.join(families)}."
        )
    _refuse_config(config)
    heads = config["num_attention_heads"]
    output_bias = kind != "qwen2" and bool(config.get("attention_bias", False))
    return Architecture(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_heads=heads,
        num_groups=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or _default_head_dim(config),
        vocab_size=config["vocab_size"],
        max_positions=config["max_position_embeddings"],
        norm_epsilon=config["rms_norm_eps"],
        init_std=config.get("initializer_range", 0.02),
        rope=_hugging_face_rope(config),
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=kind == "qwen2" or output_bias,
        qk_norm=kind == "qwen3",
        output_bias=output_bias,
    )


def _default_head_dim(config: Mapping[str, Any]) -> int:
    if config["model_type"] == "qwen3":
        return 128
    return int(config["hidden_size"]) // int(config["num_attention_heads"])


def _refuse_config(config: Mapping[str, Any]) -> None:
    wrong = [
        f"{name}={config.get(name)}"
        for name, possible in _EXPRESSIBLE_CONFIG.items()
        if config.get(name) not in possible
    ]
    kinds = set(config.get("layer_types") or ())
    if kinds - {"full_attention"}:
        wrong.append(f"layer_types with {', '.join(sorted(kinds - {'full_attention'}))}")
    if wrong:
        raise ValueError(
            f"Megatron's GPT has no counterpart for what config.json says: {', '.join(wrong)}."
        )


def _hugging_face_rope(config: Mapping[str, Any]) -> Rope:
    """Read transformers 4's rope_theta and rope_scaling, or transformers 5's rope_parameters."""
    newer = dict(config.get("rope_parameters") or {})
    older = dict(config.get("rope_scaling") or {})
    bases = {
        float(base) for base in (newer.get("rope_theta"), config.get("rope_theta")) if base
    } or {float(DEFAULT_ROTARY_BASE)}
    kinds = {
        scaling.get("rope_type", scaling.get("type", "default"))
        for scaling in (newer, older)
        if scaling
    } or {"default"}
    if len(bases) > 1 or len(kinds) > 1:
        raise ValueError(
            "config.json contradicts itself: rope_parameters="
            f"{config.get('rope_parameters')}, but rope_theta={config.get('rope_theta')} and "
            f"rope_scaling={config.get('rope_scaling')}. Correct the one that is wrong."
        )
    base, kind, scaling = bases.pop(), kinds.pop(), newer or older
    if not base.is_integer():
        raise ValueError(f"rope_theta={base}: Megatron's --rotary-base takes whole numbers.")
    factor = float(scaling.get("factor", 1.0))
    if kind == "default":
        return Rope(int(base))
    if kind == "linear" and factor.is_integer():
        return Rope(int(base), kind, factor)
    constants = {"factor": LLAMA3_FACTOR, **LLAMA3_REST}
    if kind == "llama3" and all(scaling.get(name) == value for name, value in constants.items()):
        return Rope(int(base), kind, factor)
    if kind == "yarn":
        yarn = _hugging_face_yarn(scaling, factor, config["max_position_embeddings"])
        if factor > 1 or yarn.attention_factor == 1:
            return Rope(int(base), kind, factor, yarn)
    raise ValueError(
        f"the rotary scaling {scaling} cannot be given to Megatron-LM: it has linear scaling by "
        "whole numbers (--rotary-seq-len-interpolation-factor), Llama 3.1's with "
        f"{constants} (--use-rope-scaling), and YaRN (--position-embedding-type yarn)."
    )


def _hugging_face_yarn(scaling: Mapping[str, Any], factor: float, max_positions: int) -> Yarn:
    """Read what transformers reads, with its defaults."""
    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        upper, lower = scaling.get("mscale"), scaling.get("mscale_all_dim")
        if not (upper and lower):
            upper, lower = 1.0, 0.0
        attention_factor = _concentration(factor, upper) / _concentration(factor, lower)
    return Yarn(
        scaling.get("original_max_position_embeddings") or max_positions,
        float(scaling.get("beta_fast") or _YARN_ARGUMENTS["yarn_beta_fast"]),
        float(scaling.get("beta_slow") or _YARN_ARGUMENTS["yarn_beta_slow"]),
        bool(scaling.get("truncate", True)),
        float(attention_factor),
    )


def hugging_face_config(
    model: Architecture,
    dtype: str,
    *,
    bos: int | None = None,
    eos: int | None = None,
    pad: int | None = None,
) -> dict[str, Any]:
    """Return what goes into config.json, so that transformers 4 and 5 read the same.

    Args:
        model: what to describe.
        dtype: of the weights, one of `PRECISIONS`.
        bos, eos, pad: the tokenizer's ids. Left out they would not be none: Llama's defaults are
            1 and 2.
    """
    rope = model.rope.parameters
    config: dict[str, Any] = {
        "architectures": [f"{model.family}ForCausalLM"],
        "model_type": model.family.lower(),
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_groups,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_epsilon,
        "max_position_embeddings": model.max_positions,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tied,
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "torch_dtype": dtype,
        # transformers 4 reads these two, transformers 5 the third. Where its own is missing,
        # version 4 takes a base of 10,000 without a word.
        "rope_theta": float(model.rope.base),
        "rope_scaling": None if model.rope.kind == "default" else rope,
        "rope_parameters": {"rope_theta": float(model.rope.base), **rope},
    }
    if model.family == "Llama":
        config |= {"mlp_bias": False}
    else:
        config |= {"use_sliding_window": False}
    if model.family != "Qwen2":
        config |= {"attention_bias": model.output_bias}
    return config


def megatron_settings(model: Architecture) -> list[tuple[str, dict[str, Any]]]:
    """Return Megatron's flags for this model, each with the arguments that it sets."""
    positions = "rope" if model.rope.yarn is None else "yarn"
    settings: list[tuple[str, dict[str, Any]]] = [
        (f"--num-layers {model.num_layers}", {"num_layers": model.num_layers}),
        (f"--hidden-size {model.hidden_size}", {"hidden_size": model.hidden_size}),
        (f"--ffn-hidden-size {model.ffn_hidden_size}", {"ffn_hidden_size": model.ffn_hidden_size}),
        (f"--num-attention-heads {model.num_heads}", {"num_attention_heads": model.num_heads}),
        ("--group-query-attention", {"group_query_attention": True}),
        (f"--num-query-groups {model.num_groups}", {"num_query_groups": model.num_groups}),
        (f"--kv-channels {model.head_dim}", {"kv_channels": model.head_dim}),
        ("--normalization RMSNorm", {"normalization": "RMSNorm"}),
        (
            f"--norm-epsilon {model.norm_epsilon}",
            {"norm_epsilon": model.norm_epsilon, "layernorm_epsilon": model.norm_epsilon},
        ),
        ("--swiglu", {"swiglu": True}),
        ("--disable-bias-linear", {"add_bias_linear": False}),
        (f"--position-embedding-type {positions}", {"position_embedding_type": positions}),
        (f"--rotary-base {model.rope.base}", {"rotary_base": model.rope.base}),
        ("--rotary-percent 1.0", {"rotary_percent": 1.0}),
        (f"--init-method-std {model.init_std}", {"init_method_std": model.init_std}),
        ("--attention-dropout 0", {"attention_dropout": 0.0}),
        ("--hidden-dropout 0", {"hidden_dropout": 0.0}),
    ]
    if model.tied:
        settings.append(("", {"untie_embeddings_and_output_weights": False}))
    else:
        flag = "--untie-embeddings-and-output-weights"
        settings.append((flag, {"untie_embeddings_and_output_weights": True}))
    if model.qkv_bias:
        settings.append(("--add-qkv-bias", {"add_qkv_bias": True}))
    if model.qk_norm:
        settings.append(("--qk-layernorm", {"qk_layernorm": True}))
    if model.rope.kind == "llama3":
        settings.append(("--use-rope-scaling", {"use_rope_scaling": True}))
    if model.rope.kind == "linear":
        factor = int(model.rope.factor)
        flag = f"--rotary-seq-len-interpolation-factor {factor}"
        settings.append((flag, {"rotary_seq_len_interpolation_factor": factor}))
    if model.rope.yarn is not None:
        settings += _yarn_settings(model.rope.factor, model.rope.yarn)
    return settings


def _yarn_settings(factor: float, yarn: Yarn) -> list[tuple[str, dict[str, Any]]]:
    """Return the flags of YaRN; --mscale is what gives its attention factor, to rounding."""
    mscale = (yarn.attention_factor - 1) / (0.1 * math.log(factor)) if factor > 1 else 1.0
    if _concentration(factor, round(mscale, 12)) == yarn.attention_factor:
        mscale = round(mscale, 12)  # 1.0 in most models
    given = (factor, yarn.original, yarn.beta_fast, yarn.beta_slow, yarn.rounded, mscale, 0.0)
    settings = []
    for name, value in zip(_YARN_ARGUMENTS, given, strict=True):
        flag = f"--{name.replace('_', '-')} {value}"
        if isinstance(value, bool):
            flag = f"--{'' if value else 'no-'}{name.replace('_', '-')}"
        settings.append((flag, {name: value}))
    return settings


def extended(model: Architecture, seq_length: int, rotary_base: int | None = None) -> Architecture:
    """Return the model for a longer context: more positions and a larger rotary base.

    Where no base is given it is the "NTK-aware" one, base * s**(d / (d - 2)) with s the ratio of
    the lengths and d the head dimension: the lowest frequency is then interpolated by s, the
    highest stays (arXiv:2309.00071, section 3.1).

    Raises:
        ValueError: seq_length is not above what the model has, or its positions are YaRN's.
    """
    if model.rope.yarn is not None:
        raise ValueError(
            "--seq-length is given, but the model has been extended with YaRN already: its factor "
            "is what grows with the length, not its base. Import it without --seq-length, and give "
            "--rotary-scaling-factor (or stages with yarn=FACTOR) in training."
        )
    if seq_length <= model.max_positions:
        raise ValueError(
            f"--seq-length={seq_length} is no extension: the model has "
            f"{model.max_positions} positions. Give more, or leave it out."
        )
    if rotary_base is None:
        ratio = seq_length / model.max_positions
        rotary_base = round(model.rope.base * ratio ** (model.head_dim / (model.head_dim - 2)))
    return replace(model, max_positions=seq_length, rope=replace(model.rope, base=rotary_base))
