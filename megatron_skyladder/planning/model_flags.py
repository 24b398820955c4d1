"""From Megatron's flags to the shape of the model that they build, as `costs` counts it."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder.costs import (
    DecoderShape,
    Experts,
    Latent,
    Mamba,
    padded_vocab_size,
)
from megatron_skyladder.ladder.local_layers import layer_list
from megatron_skyladder.ladder.numbers import argument, whole
from megatron_skyladder.planning.vocabulary_size import UnknownVocabularyError, vocabulary_size

INTEGERS = {
    "--num-layers": "decoder layers",
    "--hidden-size": "width of the model",
    "--ffn-hidden-size": "width of the MLP (default: 4 times the hidden size, 8/3 with --swiglu)",
    "--num-attention-heads": "query heads",
    "--num-query-groups": "key and value heads, with --group-query-attention",
    "--kv-channels": "width of a head (default: hidden size / heads)",
    "--max-position-embeddings": "rows of a learned position embedding",
    "--vocab-size": "tokens in the vocabulary, before padding",
    "--padded-vocab-size": "rows of the embedding, if you set them yourself",
    "--make-vocab-size-divisible-by": "pad the vocabulary to a multiple of this times TP",
    "--num-experts": "experts of a layer",
    "--moe-router-topk": "experts that a token goes to",
    "--moe-ffn-hidden-size": "width of an expert (default: that of the MLP)",
    "--moe-shared-expert-intermediate-size": "width of the experts that see every token",
    "--mamba-num-heads": "heads of a Mamba layer (default: twice the hidden size / their width)",
    "--mamba-head-dim": "width of one",
    "--mamba-num-groups": "groups of its state",
    "--mamba-state-dim": "size of its state",
    "--q-lora-rank": "of latent queries",
    "--kv-lora-rank": "of latent keys and values",
    "--qk-head-dim": "of latent attention's heads, without positions",
    "--qk-pos-emb-head-dim": "of their rotary part",
    "--v-head-dim": "of their values",
    "--mtp-num-layers": "heads of multi-token prediction",
}
TEXTS = {
    "--moe-layer-freq": "which layers have experts: N, or a list such as [0]*2+[1]*22",
    "--window-size": "L,0: local layers, whose queries see L tokens before themselves",
    "--window-attn-skip-freq": "which layers are global: every N-th, or the 0 in [1,1,1,1,1,0]*4",
    "--hybrid-layer-pattern": "one symbol for each layer: * attention, - MLP, E experts, M Mamba",
    "--hybrid-override-pattern": "the same (old name)",
    "--tokenizer-type": "tells the vocabulary, with the file it names",
    "--tokenizer-model": "the tokenizer's file or folder",
    "--vocab-file": "of a GPT2BPETokenizer",
}
SWITCHES = {
    "--group-query-attention": "use --num-query-groups",
    "--swiglu": "gated MLP",
    "--quick-geglu": "gated MLP",
    "--untie-embeddings-and-output-weights": "an output layer of its own",
    "--disable-bias-linear": "no biases",
    "--add-qkv-bias": "a bias for queries, keys and values only",
    "--qk-layernorm": "normalise queries and keys",
    "--multi-latent-attention": "keys and values from a latent",
    "--mtp-use-repeated-layer": "one layer for all heads of multi-token prediction",
    "--attention-output-gate": "a gate on what attention returns",
    "--moe-shared-expert-gate": "a gate on what shared experts return",
    "--use-rotary-position-embeddings": "RoPE (old name)",
}
DEFAULTS: dict[str, Any] = {  # Megatron's
    "num_query_groups": 1,
    "make_vocab_size_divisible_by": 128,
    "normalization": "LayerNorm",
    "position_embedding_type": "learned_absolute",
    "moe_router_topk": 2,
    "moe_layer_freq": "1",
    "mamba_head_dim": 64,
    "mamba_num_groups": 8,
    "mamba_state_dim": 128,
    "kv_lora_rank": 32,
    "qk_head_dim": 128,
    "qk_pos_emb_head_dim": 64,
    "v_head_dim": 128,
}
_COUNTED_SYMBOLS = "*-EM"


class NotCountedError(Exception):
    """The launch may be right, but plan does not know its model; the message says why."""


def add_model_flags(group: argparse._ArgumentGroup) -> None:
    """Add those of Megatron's flags that decide the model."""
    for flag, help_text in INTEGERS.items():
        group.add_argument(flag, type=argument(whole), metavar="N", help=help_text)
    for flag, help_text in TEXTS.items():
        group.add_argument(flag, metavar="TEXT", help=help_text)
    for flag, help_text in SWITCHES.items():
        group.add_argument(flag, action="store_const", const=True, help=help_text)
    group.add_argument("--normalization", metavar="NAME", help="LayerNorm or RMSNorm")
    group.add_argument("--position-embedding-type", metavar="NAME")


def decoder_shape(flags: argparse.Namespace, notes: list[str]) -> DecoderShape:
    """Return the model that Megatron builds from these flags.

    Args:
        flags: with Megatron's defaults filled in.
        notes: gets what was taken for a flag that is missing.

    Raises:
        UsageError: they do not make a model.
        NotCountedError: a part of it is not known, or of a kind that is not counted.
    """
    pattern = _pattern(flags)
    _check_given(flags, pattern)
    hidden, heads = flags.hidden_size, flags.num_attention_heads
    if flags.kv_channels is None and hidden % heads and not flags.multi_latent_attention:
        raise UsageError(
            f"--hidden-size={hidden} is no multiple of --num-attention-heads={heads}. "
            "Change one of them, or give --kv-channels."
        )
    groups = flags.num_query_groups if flags.group_query_attention else heads
    if heads % groups:
        raise UsageError(
            f"--num-attention-heads={heads} is no multiple of --num-query-groups={groups}. "
            "Change one of them."
        )
    default_ffn = int(4 * hidden * 2 / 3 / 64) * 64 if flags.swiglu else 4 * hidden
    ffn_hidden_size = flags.ffn_hidden_size or default_ffn
    return DecoderShape(
        num_layers=pattern.count("*") if pattern else flags.num_layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn_hidden_size,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=flags.kv_channels or hidden // heads,
        vocab_size=_embedding_rows(flags),
        gated_mlp=bool(flags.swiglu or flags.quick_geglu),
        linear_bias=not flags.disable_bias_linear,
        qkv_bias=bool(flags.add_qkv_bias),
        norm_bias=flags.normalization == "LayerNorm",
        qk_norm=bool(flags.qk_layernorm),
        tied_embeddings=not flags.untie_embeddings_and_output_weights,
        learned_positions=_learned_positions(flags, notes),
        output_gate=bool(flags.attention_output_gate),
        num_mlp_layers=pattern.count("-") if pattern else None,
        experts=_experts(flags, pattern, ffn_hidden_size),
        mamba=_mamba(flags, pattern),
        latent=_latent(flags),
        prediction_heads=_prediction_heads(flags),
    )


def head_sizes(flags: argparse.Namespace) -> tuple[int, int] | None:
    """Return the channels of a head of queries and keys, and of values; None: not known.

    Args:
        flags: what is not given may be None, and is then Megatron's default.
    """
    if flags.multi_latent_attention:
        plain, rotary, value = (
            getattr(flags, name) or DEFAULTS[name]
            for name in ("qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
        )
        return plain + rotary, value
    if flags.kv_channels:
        return flags.kv_channels, flags.kv_channels
    if not flags.hidden_size or not flags.num_attention_heads:
        return None
    size = flags.hidden_size // flags.num_attention_heads
    return size, size


def _check_given(flags: argparse.Namespace, pattern: str) -> None:
    needed = ["hidden_size", "num_attention_heads"] + ([] if pattern else ["num_layers"])
    missing = [f"--{name.replace('_', '-')}" for name in needed if getattr(flags, name) is None]
    if missing:
        raise NotCountedError(f"the model is not known: give {', '.join(sorted(missing))}")


def _pattern(flags: argparse.Namespace) -> str:
    """Return the layers of a hybrid model, one symbol each, or nothing for a GPT."""
    given = flags.hybrid_layer_pattern or flags.hybrid_override_pattern
    if not given:
        return ""
    pattern = given.partition("/")[0].replace("|", "")  # heads of multi-token prediction follow /
    other = sorted(set(pattern) - set(_COUNTED_SYMBOLS))
    if other or not pattern:
        raise NotCountedError(
            f"--hybrid-layer-pattern {given} has layers {' '.join(other)} that plan cannot count: "
            "it counts * (attention), - (MLP), E (experts) and M (Mamba)"
        )
    return pattern


def _embedding_rows(flags: argparse.Namespace) -> int:
    if flags.padded_vocab_size:
        return int(flags.padded_vocab_size)
    size = flags.vocab_size
    if size is None:
        try:
            size = vocabulary_size(flags.tokenizer_type, flags.tokenizer_model, flags.vocab_file)
        except UnknownVocabularyError as error:
            raise NotCountedError(str(error)) from None
    return padded_vocab_size(
        size,
        divisible_by=flags.make_vocab_size_divisible_by,
        tensor_parallel=flags.tensor_model_parallel_size,
    )


def _learned_positions(flags: argparse.Namespace, notes: list[str]) -> int:
    if flags.position_embedding_type != "learned_absolute":
        return 0
    if flags.max_position_embeddings is not None:
        return int(flags.max_position_embeddings)
    notes.append(
        f"--max-position-embeddings is not given: a learned embedding of {flags.seq_length:,} "
        "positions is counted, as --seq-length has. Megatron wants the flag; for RoPE give "
        "--position-embedding-type rope."
    )
    return int(flags.seq_length)


def _experts(flags: argparse.Namespace, pattern: str, ffn_hidden_size: int) -> Experts | None:
    if not flags.num_experts:
        if "E" in pattern:
            raise NotCountedError("the experts are not known: give --num-experts")
        return None
    if pattern:
        num_layers = pattern.count("E")
    else:
        layers = _expert_layers(flags)
        num_layers = sum(layers) + layers[-1] * _prediction_heads(flags)
    return Experts(
        num_layers=num_layers,
        num_experts=flags.num_experts,
        topk=flags.moe_router_topk,
        ffn_hidden_size=flags.moe_ffn_hidden_size or ffn_hidden_size,
        shared_ffn_hidden_size=flags.moe_shared_expert_intermediate_size or 0,
        shared_gate=bool(flags.moe_shared_expert_gate),
        linear_bias=not flags.disable_bias_linear,
        router_bias=not flags.disable_bias_linear,
    )


def _expert_layers(flags: argparse.Namespace) -> list[int]:
    """Return 1 for each layer with experts and 0 for each without, as Megatron reads the flag.

    Raises:
        UsageError: it is neither a number nor a list, or has another length than the model.
    """
    text = str(flags.moe_layer_freq)
    if text.isdigit() and int(text):
        return [int(layer % int(text) == 0) for layer in range(flags.num_layers)]
    try:
        pattern = layer_list(text)
    except ValueError:
        pattern = 0
    if not isinstance(pattern, list) or len(pattern) != flags.num_layers:
        raise UsageError(
            f"--moe-layer-freq={text} does not say for each of {flags.num_layers} layers whether "
            "it has experts. Give a number, or a list such as [0]*2+[1]*22."
        )
    return pattern


def _latent(flags: argparse.Namespace) -> Latent | None:
    if not flags.multi_latent_attention:
        return None
    return Latent(
        query_rank=flags.q_lora_rank or 0,
        key_value_rank=flags.kv_lora_rank,
        head_size=flags.qk_head_dim,
        rotary_size=flags.qk_pos_emb_head_dim,
        value_size=flags.v_head_dim,
    )


def _prediction_heads(flags: argparse.Namespace) -> int:
    if flags.mtp_num_layers and flags.mtp_use_repeated_layer:
        raise NotCountedError("--mtp-use-repeated-layer gives heads that plan cannot count")
    return flags.mtp_num_layers or 0


def _mamba(flags: argparse.Namespace, pattern: str) -> Mamba | None:
    if "M" not in pattern:
        return None
    head_dim = flags.mamba_head_dim
    return Mamba(
        num_layers=pattern.count("M"),
        num_heads=flags.mamba_num_heads or 2 * flags.hidden_size // head_dim,
        head_dim=head_dim,
        num_groups=flags.mamba_num_groups,
        state_dim=flags.mamba_state_dim,
    )
