"""A model in which nothing follows the window is refused before its first step, probe or not.

Scripts other than those of GPTModel and HybridModel (BERT, T5) build layers that no integration
reaches; they would train as without SkyLadder while the log shows a growing window.

Kernels are chosen by each process from what its node has: where nodes differ, it is said.
"""

from __future__ import annotations

import logging
import socket
from collections import Counter
from typing import Any

import torch

from megatron_skyladder.attention.backends.choose import made
from megatron_skyladder.attention.core_attention import SkyLadderAttention
from megatron_skyladder.errors import UsageError

logger = logging.getLogger(__name__)


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
        _compare_kernels()
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


def _compare_kernels() -> None:
    """Warn, on the first rank, of ranks whose kernels are others than most have."""
    mine = {call: (it.name, it.reason) for call, it in made().items()}
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, (socket.gethostname(), mine))
    if torch.distributed.get_rank() != 0:
        return
    for call in sorted({call for _, theirs in everyone for call in theirs}):
        chosen = [
            (theirs[call], rank, host)
            for rank, (host, theirs) in enumerate(everyone)
            if call in theirs
        ]
        usual, _ = Counter(name for (name, _), _, _ in chosen).most_common(1)[0]
        odd = [each for each in chosen if each[0][0] != usual]
        if odd:
            (name, reason), rank, host = odd[0]
            logger.warning(
                "attention for %s is computed by %s, but on %d of %d ranks by another kernel, "
                "first on rank %d (%s) by %s: %s. Every step waits for the slowest rank. Install "
                "the same on all nodes, or name one kernel with --skyladder-attention-backend.",
                *(call, usual, len(odd), len(chosen), rank, host, name, reason),
            )


def _unwrapped(chunk: Any) -> Any:
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def _name(module: Any) -> str:
    kind = type(module)
    return f"{kind.__module__}.{kind.__name__}"
