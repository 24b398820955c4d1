"""Collectives on tensors of unequal lengths, which NCCL takes and gloo does not.

Experts that are tensor parallel exchange as many tokens as the router has sent to each rank. gloo's
all-to-all takes unequal parts, so the others are made of it. Part of the CPU engine.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def install() -> None:
    """Replace ``all_gather`` and ``reduce_scatter`` in this process."""
    torch_distributed: Any = dist
    all_gather, reduce_scatter = dist.all_gather, dist.reduce_scatter

    def any_all_gather(
        outputs: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        if async_op or _equal(outputs):
            return all_gather(outputs, tensor, group=group, async_op=async_op)
        _exchange(outputs, [tensor] * len(outputs), group)
        return None

    def any_reduce_scatter(
        output: torch.Tensor,
        inputs: list[torch.Tensor],
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if async_op or op != dist.ReduceOp.SUM or _equal(inputs):
            return reduce_scatter(output, inputs, op=op, group=group, async_op=async_op)
        parts = [torch.empty_like(output) for _ in inputs]
        _exchange(parts, inputs, group)
        output.copy_(torch.stack(parts).sum(dim=0))
        return None

    torch_distributed.all_gather = any_all_gather
    torch_distributed.reduce_scatter = any_reduce_scatter


def _equal(tensors: list[torch.Tensor]) -> bool:
    return len({tensor.shape for tensor in tensors}) == 1


def _exchange(outputs: list[torch.Tensor], inputs: list[torch.Tensor], group: Any) -> None:
    """Send ``inputs[i]`` to rank i and receive ``outputs[i]`` from it; lengths may differ."""
    received = [output.shape[0] for output in outputs]
    sent = [tensor.shape[0] for tensor in inputs]
    message = outputs[0].new_empty((sum(received), *outputs[0].shape[1:]))
    dist.all_to_all_single(message, torch.cat(inputs), received, sent, group=group)
    for output, part in zip(outputs, message.split(received), strict=True):
        output.copy_(part)
