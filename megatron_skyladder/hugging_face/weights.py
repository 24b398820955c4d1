"""Names and layouts of weights: Megatron's GPT and Hugging Face's Llama, Qwen2 and Qwen3.

Pure functions on one layer's tensors. Megatron's names are those of a ``torch_dist`` checkpoint,
which are Transformer Engine's: the local spec maps to them when it saves. Shapes below are those of
whole (not tensor-parallel) weights; h hidden, f ffn_hidden, n heads, g query groups, d head_dim:

    Megatron                                     shape                 Hugging Face
    self_attention.linear_qkv.layer_norm_weight  [h]                   input_layernorm.weight
    self_attention.linear_qkv.weight             [g, n/g + 2, d, h]    q_proj, k_proj, v_proj
    self_attention.linear_proj.weight            [h, n * d]            o_proj
    mlp.linear_fc1.layer_norm_weight             [h]                   post_attention_layernorm
    mlp.linear_fc1.weight                        [gate f; up f, h]     gate_proj, up_proj
    mlp.linear_fc2.weight                        [h, f]                down_proj

linear_qkv's first three dimensions are one in the file. Each group has its n/g queries, then its
key, then its value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from megatron_skyladder.hugging_face.architecture import Architecture

Tensors = dict[str, torch.Tensor]
Shapes = dict[str, tuple[int, ...]]

EMBEDDING = "embedding.word_embeddings.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
OUTPUT = "output_layer.weight"
QKV = "self_attention.linear_qkv"
GATE_AND_UP = "mlp.linear_fc1.weight"

OUTSIDE = {
    EMBEDDING: "model.embed_tokens.weight",
    FINAL_NORM: "model.norm.weight",
    OUTPUT: "lm_head.weight",
}
# what stays as it is, in each layer
RENAMED = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
# the local spec's names for its norms, where nothing has mapped them (format torch)
LOCAL_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
OUTPUT_BIAS = "self_attn.o_proj.bias"  # see Architecture.output_bias


def hugging_face_layer(index: int) -> str:
    """Return what the names of a layer's weights begin with."""
    return f"model.layers.{index}."


def layer_to_hugging_face(weights: Mapping[str, torch.Tensor], model: Architecture) -> Tensors:
    """Return a layer's weights by Hugging Face's names, without `hugging_face_layer`.

    Args:
        weights: the whole tensors of one layer by Megatron's names, without ``decoder.layers.N.``.
        model: what the shapes are.

    Raises:
        ValueError: a weight has no counterpart, or another shape than the model's.
    """
    expected = megatron_layer_shapes(model)
    weights = {LOCAL_NAMES.get(name, name): tensor for name, tensor in weights.items()}
    _compare_names(weights, expected)
    converted: Tensors = {}
    for name, tensor in weights.items():
        _check_shape(name, tensor, expected[name])
        if name in RENAMED:
            converted[RENAMED[name]] = tensor
        elif name == GATE_AND_UP:
            gate, up = tensor.chunk(2)
            converted |= {"mlp.gate_proj.weight": gate, "mlp.up_proj.weight": up}
        else:
            kind = name.rpartition(".")[2]
            for letter, part in zip("qkv", split_qkv(tensor, model), strict=True):
                converted[f"self_attn.{letter}_proj.{kind}"] = part
    if model.output_bias:
        sample = weights[f"{QKV}.bias"]
        converted[OUTPUT_BIAS] = sample.new_zeros(model.hidden_size)
    return converted


def layer_to_megatron(weights: Mapping[str, torch.Tensor], model: Architecture) -> Tensors:
    """Return a layer's weights by Megatron's names; the inverse of `layer_to_hugging_face`.

    Raises:
        ValueError: a weight is missing or unknown, has another shape, or cannot be expressed.
    """
    expected = hugging_face_layer_shapes(model)
    _compare_names(weights, expected)
    for name, tensor in weights.items():
        _check_shape(name, tensor, expected[name])
    if OUTPUT_BIAS in weights and weights[OUTPUT_BIAS].any():
        raise ValueError(
            f"{OUTPUT_BIAS} is not zero. Megatron has a bias there only together with one "
            "everywhere, which these models have not."
        )
    converted = {name: weights[other] for name, other in RENAMED.items() if other in weights}
    converted[GATE_AND_UP] = torch.cat(
        [weights["mlp.gate_proj.weight"], weights["mlp.up_proj.weight"]]
    )
    for kind in ("weight", "bias"):
        query, key, value = (f"self_attn.{letter}_proj.{kind}" for letter in "qkv")
        if query in weights:
            converted[f"{QKV}.{kind}"] = join_qkv(
                weights[query], weights[key], weights[value], model
            )
    return converted


def split_qkv(
    weight: torch.Tensor, model: Architecture
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return q, k and v from Megatron's interleaved weight or bias.

    Args:
        weight: ``[g * (n/g + 2) * d, ...]``.

    Returns:
        ``[n * d, ...]``, ``[g * d, ...]``, ``[g * d, ...]``, contiguous.
    """
    per_group = model.num_heads // model.num_groups
    rest = weight.shape[1:]
    grouped = weight.view(model.num_groups, per_group + 2, model.head_dim, *rest)
    query, key, value = grouped.split([per_group, 1, 1], dim=1)
    return (query.reshape(-1, *rest), key.reshape(-1, *rest), value.reshape(-1, *rest))


def join_qkv(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, model: Architecture
) -> torch.Tensor:
    """Return Megatron's interleaved weight or bias; the inverse of `split_qkv`.

    Args:
        query: [heads * head size, ...].
        key: [groups * head size, ...].
        value: the same.
        model: heads, groups and head size.

    Returns:
        [(heads + 2 * groups) * head size, ...], group by group: its queries, its key, its value.
    """
    per_group = model.num_heads // model.num_groups
    rest = query.shape[1:]
    parts = [
        part.view(model.num_groups, heads, model.head_dim, *rest)
        for part, heads in ((query, per_group), (key, 1), (value, 1))
    ]
    return torch.cat(parts, dim=1).view(-1, *rest)


def cut_vocabulary(weight: torch.Tensor, model: Architecture, name: str) -> torch.Tensor:
    """Return the rows of a padded ``[padded vocabulary, h]`` that belong to tokens.

    Raises:
        ValueError: there are fewer rows than tokens, or another width.
    """
    rows, width = weight.shape
    if rows < model.vocab_size or width != model.hidden_size:
        raise ValueError(
            f"{name} is {list(weight.shape)}, but the tokenizer has {model.vocab_size} tokens and "
            f"the model a hidden size of {model.hidden_size}. Give the tokenizer that it was "
            "trained with (--tokenizer-type, --tokenizer-model), or --vocab-size."
        )
    return weight[: model.vocab_size]


def megatron_layer_shapes(model: Architecture) -> Shapes:
    """Return Megatron's weights of each layer."""
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    qkv = (model.num_heads + 2 * model.num_groups) * model.head_dim
    shapes: Shapes = {
        f"{QKV}.layer_norm_weight": (hidden,),
        f"{QKV}.weight": (qkv, hidden),
        "self_attention.linear_proj.weight": (hidden, model.num_heads * model.head_dim),
        "mlp.linear_fc1.layer_norm_weight": (hidden,),
        GATE_AND_UP: (2 * ffn, hidden),
        "mlp.linear_fc2.weight": (hidden, ffn),
    }
    if model.qkv_bias:
        shapes[f"{QKV}.bias"] = (qkv,)
    if model.qk_norm:
        shapes["self_attention.q_layernorm.weight"] = (model.head_dim,)
        shapes["self_attention.k_layernorm.weight"] = (model.head_dim,)
    return shapes


def hugging_face_layer_shapes(model: Architecture) -> Shapes:
    """Return Hugging Face's weights of each layer, without `hugging_face_layer`."""
    megatron = megatron_layer_shapes(model)
    shapes = {RENAMED[name]: shape for name, shape in megatron.items() if name in RENAMED}
    widths = {"q": model.num_heads, "k": model.num_groups, "v": model.num_groups}
    for letter, heads in widths.items():
        rows = heads * model.head_dim
        shapes[f"self_attn.{letter}_proj.weight"] = (rows, model.hidden_size)
        if model.qkv_bias:
            shapes[f"self_attn.{letter}_proj.bias"] = (rows,)
    if model.output_bias:
        shapes[OUTPUT_BIAS] = (model.hidden_size,)
    for name in ("mlp.gate_proj.weight", "mlp.up_proj.weight"):
        shapes[name] = (model.ffn_hidden_size, model.hidden_size)
    return shapes


def hugging_face_shapes(model: Architecture) -> Iterator[Shapes]:
    """Yield Hugging Face's weights: the embedding, each layer, then what comes after them."""
    table = (model.vocab_size, model.hidden_size)
    yield {OUTSIDE[EMBEDDING]: table}
    layer = hugging_face_layer_shapes(model)
    for index in range(model.num_layers):
        yield {hugging_face_layer(index) + name: shape for name, shape in layer.items()}
    last: Shapes = {OUTSIDE[FINAL_NORM]: (model.hidden_size,)}
    if not model.tied:
        last[OUTSIDE[OUTPUT]] = table
    yield last


def _compare_names(weights: Mapping[str, torch.Tensor], expected: Shapes) -> None:
    unknown = sorted(weights.keys() - expected.keys())
    missing = sorted(expected.keys() - weights.keys())
    if unknown or missing:
        parts = [f"has {', '.join(unknown)}"] if unknown else []
        parts += [f"lacks {', '.join(missing)}"] if missing else []
        raise ValueError(
            f"a layer {' and '.join(parts)}, which does not fit this model's settings. Only "
            "Llama, Qwen2 and Qwen3 without further weights can be converted."
        )


def _check_shape(name: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(
            f"{name} is {list(tensor.shape)}, but the model's settings make it {list(expected)}."
        )
