"""A recipe of one's own: Bridge's Llama 3.2 1B, with layers that need no Transformer Engine."""

from __future__ import annotations

from typing import Any

from megatron.bridge.models.gpt_provider import local_layer_spec
from megatron.bridge.recipes.llama import llama32_1b_pretrain_config


def llama_without_te() -> Any:
    """Return Bridge's configuration; its sizes come from the Hub's config.json."""
    cfg = llama32_1b_pretrain_config()
    cfg.model.transformer_layer_spec = local_layer_spec
    return cfg
