"""How much memory fetched keys take under context parallelism, said before the window is there.

They are kept until the backward pass, and most of them at the longest window, hence hours or days
into a run.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from megatron_skyladder.attention.core_attention import SkyLadderAttention
from megatron_skyladder.ladder.clock import Clock
from megatron_skyladder.ladder.exchange_costs import kept_tokens
from megatron_skyladder.ladder.sequence_layout import Kind, LayoutRule

logger = logging.getLogger(__name__)


def announce(model: Sequence[torch.nn.Module], clock: Clock) -> None:
    """Log what this rank's layers keep of a sequence at the run's longest window.

    Args:
        model: this rank's chunks, as the trainer wraps them.
        clock: with the layout that the run has.
    """
    layers = [layer for chunk in model for layer in _that_keep(chunk)]
    num_bytes = sum(kept_bytes(layer, clock) for layer in layers)
    if not num_bytes:
        return
    logger.info(
        "context parallelism: at a window of %s tokens, keys and values of other ranks take up to "
        "%s MB on a rank for each sequence of a micro-batch, in %d layers, until its backward "
        "pass. --recompute-granularity selective --recompute-modules core_attn fetches them again "
        "instead.",
        f"{_longest_window(clock):,}",
        _megabytes(num_bytes),
        len(layers),
    )


def kept_bytes(layer: SkyLadderAttention, clock: Clock) -> int:
    """Return what one layer keeps of one sequence on the rank that keeps most."""
    config: Any = layer.config
    if config.context_parallel_size == 1:
        return 0
    latent = getattr(config, "multi_latent_attention", False)
    groups = config.num_attention_heads if latent else config.num_query_groups
    of_rank = max(1, groups // config.tensor_model_parallel_size)
    rule = LayoutRule(
        Kind.ZIGZAG if clock.layout_kind is Kind.ZIGZAG else Kind.WINDOW,
        clock.config.seq_length,
        config.context_parallel_size,
        _longest_window(clock),
        clock.config.mask == "sliding",
    )
    tokens = _kept(rule, layer.own_window)
    return tokens * of_rank * sum(layer.head_sizes) * config.params_dtype.itemsize


_kept = cache(kept_tokens)


def _longest_window(clock: Clock) -> int:
    """Return the final window: none is above it, and not every schedule uses a start window."""
    return clock.config.schedule.final_window


def _megabytes(num_bytes: int) -> str:
    value = num_bytes / 1e6
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _that_keep(chunk: torch.nn.Module) -> list[SkyLadderAttention]:
    """Return the layers that do not fetch again in the backward pass."""
    layers = [module for module in chunk.modules() if isinstance(module, SkyLadderAttention)]
    if not layers:
        return []
    config: Any = layers[0].config
    if config.recompute_granularity == "full":
        is_block = config.recompute_method == "block"
        return layers[config.recompute_num_layers :] if is_block else []
    if config.recompute_granularity == "selective":
        modules = getattr(config, "recompute_modules", None) or ["core_attn"]
        return [] if "core_attn" in modules else layers
    return layers
