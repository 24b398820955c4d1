"""A model in which nothing follows the window is refused before its first step, probe or not.

Scripts other than those of GPTModel and HybridModel (BERT, T5) build layers that no integration
reaches; they would train as without SkyLadder while the log shows a growing window.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_skyladder.attention.core_attention import SkyLadderAttention
from megatron_skyladder.errors import UsageError


def check(model: list[Any]) -> None:
    """Refuse a model that has SkyLadder's attention on no rank; all ranks have to call this.

    A pipeline stage may have none, as in a hybrid model whose attention is elsewhere.

    Args:
        model: this rank's model chunks, as the trainer wraps them.

    Raises:
        UsageError: on all ranks.
    """
    modules = [module for chunk in model for module in chunk.modules()]
    found = torch.tensor(
        sum(isinstance(module, SkyLadderAttention) for module in modules), device="cuda"
    )
    torch.distributed.all_reduce(found)
    if int(found):
        return
    attention = (getattr(module, "core_attention", None) for module in modules)
    others = dict.fromkeys(_name(each) for each in attention if each is not None)
    raise UsageError(
        f"no layer of the model, a {_name(_unwrapped(model[0]))}, has SkyLadder's attention on any "
        "rank, so every step would see whole sequences, whatever window the log has"
        + (f"; its own is {', '.join(others)}, which knows nothing of windows" if others else "")
        + ". Windows reach GPTModel and, from Megatron 0.18 on, HybridModel: train one of these, "
        "or leave SkyLadder out."
    )


def _unwrapped(chunk: Any) -> Any:
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def _name(module: Any) -> str:
    kind = type(module)
    return f"{kind.__module__}.{kind.__name__}"
