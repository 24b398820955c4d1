"""The probe leaves everything as it was: what it needs in the model it changes for a while."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_skyladder.attention.core_attention import SkyLadderAttention
from megatron_skyladder.runtime import metrics


@contextlib.contextmanager
def none_left(model: list[Any]) -> Iterator[None]:
    """Leave the model, random states and counters as they were.

    Within, layers are in evaluation mode (no dropout, no auxiliary losses), quantisation is off
    (so no amax history moves), no timer runs, and the hooks are off by which Megatron's DDP gathers
    parameters before a layer (as in its own evaluation).

    Args:
        model: this rank's model chunks, as the trainer wraps them.
    """
    modules = [module for chunk in model for module in chunk.modules()]
    with contextlib.ExitStack() as undo:
        for module in modules:
            undo.callback(setattr, module, "training", module.training)
            for _, buffer in module.named_buffers(recurse=False):
                undo.callback(_put_back, buffer, buffer.detach().clone())
        configs = {id(module.config): module.config for module in modules if _has_config(module)}
        for config in configs.values():
            for name in ("timers", "fp8", "fp4"):
                _without(undo, config, name)
        for module in modules:
            if isinstance(module, SkyLadderAttention):
                _without(undo, module, "_statistics")
        undo.callback(metrics.meter().restore, metrics.meter().snapshot())
        _keep_random_states(undo)
        for chunk in model:
            if getattr(chunk, "remove_forward_pre_hook_handles", None):
                chunk.disable_forward_pre_hook(param_sync=False)
                undo.callback(chunk.enable_forward_pre_hook)
            chunk.eval()
        yield


def _has_config(module: torch.nn.Module) -> bool:
    return hasattr(module, "config") and hasattr(module.config, "timers")


def _without(undo: contextlib.ExitStack, owner: Any, name: str) -> None:
    value = getattr(owner, name, None)
    if value is not None:
        undo.callback(setattr, owner, name, value)
        setattr(owner, name, None)


def _put_back(buffer: torch.Tensor, before: torch.Tensor) -> None:
    with torch.no_grad():
        buffer.copy_(before)


def _keep_random_states(undo: contextlib.ExitStack) -> None:
    undo.callback(random.setstate, random.getstate())
    undo.callback(np.random.set_state, np.random.get_state())
    undo.callback(torch.set_rng_state, torch.get_rng_state())
    undo.callback(torch.cuda.set_rng_state, torch.cuda.get_rng_state())
    tracker = get_cuda_rng_tracker()
    states = dict(tracker.get_states())
    for state in states.values():
        if isinstance(state, torch.Generator):  # of graphs: the object stays, its state moves
            undo.callback(state.set_state, state.get_state())
    if not any(isinstance(state, torch.Generator) for state in states.values()):
        undo.callback(tracker.set_states, states)
