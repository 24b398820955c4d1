"""Megatron's flags that cannot be combined with SkyLadder, and why.

Standard library only: the doctor asks before a launch, the hooks ask in it, and the attention asks
for models that were built in another way.
"""

from __future__ import annotations

from typing import Any

_IN_16_BITS = "SkyLadder's attention runs in 16 bits; --fp8-format for the linear layers can stay"
# of the attention itself: they would silently not be done
ATTENTION = {
    "fp8_dot_product_attention": f"drop --fp8-dot-product-attention, {_IN_16_BITS}",
    "fp8_multi_head_attention": f"drop --fp8-multi-head-attention, {_IN_16_BITS}",
    "qk_clip": "--qk-clip needs an attention that reports its largest logit",
    "log_max_attention_logit": "use --skyladder-attention-stats-interval instead of "
    "--log-max-attention-logit",
}
REFUSED = ATTENTION | {
    "sft": "--sft packs rows itself",
    "fim_data": "--fim-data reorders the row",
    "dataloader_inter_document_masking": "use --skyladder-intra-document instead of "
    "--dataloader-inter-document-masking",
    "reset_attention_mask": "use --skyladder-intra-document instead of --reset-attention-mask",
    "hybrid_context_parallel": "--hybrid-context-parallel changes the layout of rows",
    "mtp_num_layers": "multi-token prediction (--mtp-num-layers) is not supported",
    "multi_latent_attention": "--multi-latent-attention is not supported",
}


def check(options: Any) -> None:
    """Refuse what cannot be combined.

    Args:
        options: Megatron's arguments, parsed.

    Raises:
        ValueError: a flag that is among ``REFUSED``, CUDA graphs, or dropout in the attention.
    """
    _check(options, REFUSED)
    if options.attention_dropout:
        raise ValueError(
            f"--attention-dropout={options.attention_dropout} cannot be combined with SkyLadder: "
            "its kernels have no dropout. Set --attention-dropout 0."
        )


def check_attention(config: Any) -> None:
    """Refuse what the attention of a model cannot do.

    Args:
        config: Megatron's TransformerConfig.

    Raises:
        ValueError: as for `check`.
    """
    _check(config, ATTENTION)


def _check(settings: Any, refused: dict[str, str]) -> None:
    for name, reason in refused.items():
        if getattr(settings, name, None):
            raise ValueError(f"SkyLadder cannot be combined with this run: {reason}.")
    implementation = getattr(settings, "cuda_graph_impl", None) or "none"
    older = any(getattr(settings, f"{name}_cuda_graph", False) for name in ("enable", "external"))
    if implementation != "none" or older:
        raise ValueError(
            "SkyLadder cannot be combined with this run: a CUDA graph would replay the window that "
            "it was captured with. Drop --cuda-graph-impl (or --enable-cuda-graph, "
            "--external-cuda-graph)."
        )
