"""Megatron's HybridModel, built instead of a GPT where ``--hybrid-layer-pattern`` is given."""

from __future__ import annotations

import importlib.util
from typing import Any

from megatron_skyladder.attention import recurrent
from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder import layer_pattern
from megatron_skyladder.megatron_lm import flag_rules, releases

MODULE = "megatron.core.models.hybrid.hybrid_model"


def pattern_of(options: Any) -> str:
    """Return the pattern in Megatron's arguments, or nothing."""
    for name in ("hybrid_layer_pattern", "hybrid_override_pattern"):  # the latter alone up to 0.16
        if pattern := getattr(options, name, None):
            return str(pattern)
    return ""


def is_asked_for(options: Any) -> bool:
    """Return whether Megatron's arguments ask for a HybridModel."""
    return bool(pattern_of(options))


def is_in_megatron() -> bool:
    """Return whether this Megatron has the model: 0.18 and later do."""
    try:
        return importlib.util.find_spec(MODULE) is not None
    except ModuleNotFoundError:  # of the package above it
        return False


def recurrent_symbols(options: Any) -> str:
    """Return those of the pattern's symbols whose layers carry a state along the sequence."""
    symbols = layer_pattern.layers(pattern_of(options))
    return "".join(symbol for symbol in layer_pattern.RECURRENT if symbol in symbols)


def check(options: Any) -> None:
    """Refuse a pattern where it builds another model, and layers whose state cannot be cut.

    Raises:
        UsageError: this Megatron has no HybridModel; or a flag takes another kernel than the one
            that can start a state anew, or there is no state at all.
    """
    _check_state(options)
    if is_asked_for(options) and not is_in_megatron():
        raise UsageError(
            f"--hybrid-layer-pattern={pattern_of(options)} builds a MambaModel in "
            f"Megatron {releases.installed().version}, and windows reach GPTModel and, from 0.18 "
            "on, HybridModel. Use a later release, or train a GPT: --num-layers."
        )


def _check_state(options: Any) -> None:
    state, symbols = getattr(options, flag_rules.RECURRENT_STATE, None), recurrent_symbols(options)
    if state and not symbols:
        raise UsageError(
            f"--skyladder-recurrent-state={state} is about the layers M and G of "
            "--hybrid-layer-pattern, and there are none. Leave it out."
        )
    if state == "free" or not state:
        return
    for symbol, name, needed, flag in (
        (layer_pattern.MAMBA, "use_mamba_mem_eff_path", True, "--disable-mamba-mem-eff-path"),
        (layer_pattern.GATED_DELTA_NET, "deterministic_mode", False, "--deterministic-mode"),
    ):
        if symbol in symbols and getattr(options, name, needed) != needed:
            raise UsageError(
                f"{flag} takes a kernel for {symbol} layers that cannot start their state anew, as "
                f"--skyladder-recurrent-state={state} asks for. Drop one of them, or give "
                "--skyladder-recurrent-state free."
            )


def check_layers(model: Any, state: str) -> None:
    """Make sure that the layers of a model chunk are those whose state is cut.

    Args:
        model: a HybridModel.
        state: of the configuration.

    Raises:
        UsageError: a spec has built another kind of layer.
    """
    if not state or state == "free":
        return
    for symbol, layer in zip(model.decoder.layer_type_list, model.decoder.layers, strict=True):
        part = layer.self_attention if symbol == layer_pattern.GATED_DELTA_NET else layer
        if symbol in layer_pattern.RECURRENT and recurrent.kind_of(part) is None:
            kind = type(part)
            raise UsageError(
                f"layer {layer.layer_number} ({symbol}) is a {kind.__module__}.{kind.__name__}, "
                f"whose state SkyLadder cannot start anew. Use Megatron's own stack, or give "
                "--skyladder-recurrent-state free."
            )


def model(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> Any:
    """Build one model chunk; Megatron's ``model_provider``, where it takes one (0.18)."""
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.transformer.spec_utils import import_module
    from megatron.training.arguments import core_transformer_config_from_args

    from megatron_skyladder.megatron_lm import compat

    options = compat.args()
    return HybridModel(
        config=config or core_transformer_config_from_args(options),
        hybrid_stack_spec=import_module(options.spec) if options.spec else stock_spec(),
        vocab_size=options.padded_vocab_size,
        max_sequence_length=options.max_position_embeddings,
        hybrid_layer_pattern=options.hybrid_layer_pattern,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=options.fp16_lm_cross_entropy,
        parallel_output=True,
        share_embeddings_and_output_weights=not options.untie_embeddings_and_output_weights,
        position_embedding_type=options.position_embedding_type,
        rotary_percent=options.rotary_percent,
        rotary_base=options.rotary_base,
        pg_collection=pg_collection,
        vp_stage=vp_stage,
    )


def stock_spec() -> Any:
    """Return the spec of Megatron's own stack, the only one that it has."""
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec

    return hybrid_stack_spec
