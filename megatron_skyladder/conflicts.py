"""Megatron's flags that cannot be combined with SkyLadder, and why.

Standard library only: the doctor asks before a launch, the hooks ask in it.
"""

from __future__ import annotations

from typing import Any

REFUSED = {
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
        ValueError: a flag that is among ``REFUSED``, or dropout in the attention.
    """
    for name, reason in REFUSED.items():
        if getattr(options, name, None):
            raise ValueError(f"SkyLadder cannot be combined with this run: {reason}.")
    if options.attention_dropout:
        raise ValueError(
            f"--attention-dropout={options.attention_dropout} cannot be combined with SkyLadder: "
            "its kernels have no dropout. Set --attention-dropout 0."
        )
