"""Where the lines point that ``skyladder patch`` inserts into a checkout.

Patched checkouts name this path, so it stays; the functions are in `megatron_lm.patch_calls`.
"""

from megatron_skyladder.megatron_lm.patch_calls import (
    add_arguments,
    dataset_is_built_on_rank,
    document_mask,
    switch_on,
    watch,
    watch_sequences,
)

__all__ = [
    "add_arguments",
    "dataset_is_built_on_rank",
    "document_mask",
    "switch_on",
    "watch",
    "watch_sequences",
]
