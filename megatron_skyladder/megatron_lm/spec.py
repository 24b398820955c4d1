"""Layer specs as Megatron-LM's own builders choose them, and the one for ``--spec``."""

from __future__ import annotations

import copy
from typing import Any

from megatron_skyladder.errors import UsageError
from megatron_skyladder.megatron_lm import releases

NOT_BUILT = (  # by `gpt_layer_spec`; from 0.19 on Megatron's trainer builds the model
    "mtp_num_layers",
    "heterogeneous_layers_config_path",
    "experimental_attention_variant",
    "use_grouped_gemm_for_dense_mlp",
)


ENTRY_POINT = "SkyLadder's entry point"
SPEC = "--spec megatron_skyladder.layer_specs"


def gpt_layer_spec(
    options: Any, config: Any, vp_stage: int | None = None, *, builder: str = ENTRY_POINT
) -> Any:
    """Return the spec of a stock GPT's layers, as Megatron's own builders choose it.

    Args:
        options: Megatron's arguments.
        config: the TransformerConfig made of them.
        vp_stage: the virtual pipeline stage, where there are several.
        builder: who asks, for an error.

    Returns:
        One layer's spec for a dense model, this stage's block of specs for a mixture of experts.

    Raises:
        UsageError: the arguments ask for a kind of layers that is not built here.
    """
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer.spec_utils import import_module

    for flag in NOT_BUILT:
        if getattr(options, flag, None):
            later = ", or take Megatron 0.19 or later" if builder == ENTRY_POINT else ""
            raise UsageError(
                f"--{flag.replace('_', '-')} is not built by {builder} on Megatron "
                f"{releases.installed().version}. Run Megatron's own pretrain_gpt.py of a "
                f"checkout, patched (skyladder patch apply DIR){later}."
            )
    if options.spec is not None:
        return import_module(options.spec)
    build = gpt_layer_specs.get_gpt_decoder_layer_specs
    if options.num_experts:
        build = gpt_layer_specs.get_gpt_decoder_block_spec
    spec = build(
        config,
        use_transformer_engine=options.transformer_impl == "transformer_engine",
        normalization=options.normalization,
        qk_l2_norm=options.qk_l2_norm,
        vp_stage=vp_stage,
    )
    return spec if options.num_experts else spec[0]


def spec_from_environment() -> Any:
    """Return the spec for ``--spec``, and switch SkyLadder on.

    Raises:
        UsageError: what the environment says, or a model whose layers differ from each other.
    """
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args

    from megatron_skyladder.megatron_lm import from_environment, hybrid

    releases.check_for_our_start(releases.installed())
    options = get_args()
    is_hybrid = hybrid.is_asked_for(options)
    if options.num_experts and not is_hybrid:  # of a GPT Megatron wants one stage's block here
        raise UsageError(
            f"{SPEC} builds dense models, not --num-experts={options.num_experts} (Megatron "
            f"{releases.installed().version}). Patch the checkout instead (skyladder patch apply "
            "DIR)."
        )
    from_environment.switch_on(options)
    if is_hybrid:
        return hybrid.stock_spec()
    dense = copy.copy(options)
    dense.spec = None
    return gpt_layer_spec(dense, core_transformer_config_from_args(options), builder=SPEC)
