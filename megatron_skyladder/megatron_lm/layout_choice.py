"""Which layout a run's context parallelism has, decided once, before the first step.

A layout other than Megatron's needs somebody who reorders each sequence before Megatron cuts it:
our own forward step, or the lines of a patch that know whether the model trains.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

from megatron.core.utils import get_attr_wrapped_model

from megatron_skyladder.ladder import clock
from megatron_skyladder.ladder.sequence_layout import Kind
from megatron_skyladder.ladder.settings import SAME_ON_ALL_RANKS

ARRANGES = "watch_sequences"  # what a patched forward step calls, see `patch_calls`
_BY_PLACE = (  # what Megatron stores of each token or reads again, by rank and place on it
    *("logits_load_dir", "logits_save_dir"),  # a teacher's, whose shapes fit in any order
    *("moe_routing_trace_path", "save_activations_interval", "save_dgrads_interval"),
)

logger = logging.getLogger(__name__)


def choose(options: Any, model: list[Any], forward_step: Callable[..., Any]) -> None:
    """Set the clock's layout, and say which it is.

    Args:
        options: Megatron's validated arguments.
        model: this rank's model chunks, as Megatron wraps them.
        forward_step: Megatron's ``forward_step_func``.
    """
    active = clock.current()
    if options.context_parallel_size == 1 or active.config.context_parallel_layout == "zigzag":
        return
    config = get_attr_wrapped_model(model[0], "config")
    keeps = _keeps_zigzag(options, config, forward_step)
    if keeps:
        logger.warning(
            "context parallelism keeps Megatron's zigzag, because %s",
            keeps,
            extra=SAME_ON_ALL_RANKS,
        )
        return
    active.layout_kind = Kind.WINDOW
    if active.config.mask == "sliding":
        logger.info("context parallelism shares out tokens by the sliding window")
        return
    if not active.config.intra_document:
        logger.info("context parallelism shares out tokens by the window")
        return
    window = _shares_by_window(options, config)
    if window:
        logger.info("context parallelism shares out tokens by the window alone, because %s", window)
        return
    active.layout_kind = Kind.SEQUENCE
    logger.info("context parallelism shares out tokens by the window and each sequence's documents")


def _keeps_zigzag(options: Any, config: Any, forward_step: Callable[..., Any]) -> str:
    """Return why batches cannot have another order than Megatron's; empty where they can."""
    if not (_is_ours(forward_step) or _calls(forward_step, ARRANGES)):
        return (
            "this forward step does not reorder sequences. Train with -m "
            "megatron_skyladder.pretrain_gpt, or patch the checkout (again): skyladder patch apply "
            "DIR."
        )
    if clock.current().config.recurrent_state:
        return "the recurrent layers of the pattern take tokens in the order of Megatron's cut."
    for name in _BY_PLACE:
        if getattr(options, name, None) is not None:
            return (
                f"--{name.replace('_', '-')} goes by a token's place in Megatron's cut: files have "
                "no positions."
            )
    positions = getattr(options, "position_embedding_type", "rope")
    if positions not in ("rope", "yarn", "learned_absolute", "none"):
        return f"--position-embedding-type {positions} takes its positions from elsewhere."
    latent = getattr(config, "multi_latent_attention", False)
    rope_type = config.rope_type if latent else None
    if rope_type == "yarn" and getattr(config, "apply_rope_fusion", False):
        return (
            "the fused rotary embedding of multi-latent attention counts positions by Megatron's "
            "cut. Add --no-rope-fusion to balance work."
        )
    if "yarn" in (positions, rope_type) and not _follows_yarn():
        return "YaRN's embeddings cannot have another order in this release of Megatron."
    return ""


def _follows_yarn() -> bool:
    from megatron.core.models.common import embeddings

    return hasattr(getattr(embeddings, "YarnRotaryEmbedding", None), "get_emb")


def _shares_by_window(options: Any, config: Any) -> str:
    """Return why every sequence of a step has to have the same layout; empty where it need not."""
    if getattr(options, "overlap_moe_expert_parallel_comm", False):
        return (
            "--overlap-moe-expert-parallel-comm makes rotary embeddings apart from the batch that "
            "they belong to."
        )
    if options.micro_batch_size > 1 and getattr(config, "apply_rope_fusion", False):
        return (
            "fused rotary embeddings have one order for all sequences of a micro-batch. Add "
            "--micro-batch-size 1 or --no-rope-fusion to balance documents as well."
        )
    return ""


def _is_ours(forward_step: Callable[..., Any]) -> bool:
    return _calls(forward_step, "megatron_skyladder.megatron_lm.batches")


def _calls(forward_step: Callable[..., Any], name: str) -> bool:
    """Return whether a function's code names something."""
    code = getattr(inspect.unwrap(forward_step), "__code__", None)
    return code is not None and name in code.co_names
