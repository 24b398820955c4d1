"""Recipes of one's own: those of Bridge and of the examples, with layers that need no TE."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from megatron.bridge.models.gpt_provider import local_layer_spec
from megatron.bridge.recipes.llama import llama32_1b_pretrain_config

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "bridge"))

import recipes


def _without_te(cfg: Any) -> Any:
    cfg.model.transformer_layer_spec = local_layer_spec
    return cfg


def llama_without_te() -> Any:
    """Return Bridge's configuration; its sizes come from the Hub's config.json."""
    return _without_te(llama32_1b_pretrain_config())


def pretrain_1b_4k() -> Any:
    return _without_te(recipes.pretrain_1b_4k())


def pretrain_1b_8k() -> Any:
    return _without_te(recipes.pretrain_1b_8k())


def extend_to_32k() -> Any:
    return _without_te(recipes.extend_to_32k())


def extend_to_128k() -> Any:
    return _without_te(recipes.extend_to_128k())
