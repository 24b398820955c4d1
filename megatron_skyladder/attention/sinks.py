"""Softmax sinks around a kernel that has none: exact, from its output and its log-sum-exp.

Shapes: T query tokens, H query heads, C channels of a value head.

A sink is one more logit for each head, which takes weight and gives no value. Beside the
denominator exp(lse) of a query stands exp(sink), so that

    lse' = log(exp(lse) + exp(sink))        out' = out * exp(lse - lse')

A kernel's backward pass knows the forward one by these two alone: a weight is exp(logit - lse), and
the gradient of a logit is weight * (gradient of the weight - (gradient of out) . out). With lse'
and out' in their place both are those of the softmax with a sink, since the sink's value is zero.
What is left is the sink's own gradient, by the same formula with a weight of exp(sink - lse') and
no gradient of that weight. So the kernel runs as often as it does without a sink.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Passes(NamedTuple):
    """Both passes of one call of a kernel, which autograd does not record.

    Args:
        forward: (query, key, value) -> output [T, H, C], lse float32 [H, T], and what the backward
            pass wants beside them.
        backward: (gradient of the output, query, key, value, and what forward gave) -> the
            gradients of query, key and value.
    """

    forward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Tensors]
    backward: Callable[..., Tensors]


def attend_with_sink(
    passes: Passes,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sink: torch.Tensor,
) -> torch.Tensor:
    """Attend where each head has one more logit.

    Args:
        passes: of a call without it.
        query: [T, H, D]; key: [Tk, G, D]; value: [Tk, G, C].
        sink: [H], in float32 at least; the factor on the logits is not applied to it.

    Returns:
        [T, H, C].
    """
    out: torch.Tensor = _WithSink.apply(passes, query, key, value, sink)
    return out


class _WithSink(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, passes: Passes, *tensors: torch.Tensor) -> torch.Tensor:
        query, key, value, sink = tensors
        out, lse, rest = passes.forward(query, key, value)
        logits = sink[:, None]
        # in place: rounded to the output's type once more, and no wider copy of it is made
        out.mul_(torch.sigmoid(lse - logits).T.unsqueeze(-1))
        ctx.passes = passes
        raised = torch.logaddexp(lse, logits)
        ctx.save_for_backward(sink, query, key, value, out, raised, rest)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        sink, *saved = ctx.saved_tensors
        out, lse, _ = saved[3:]
        grad_sink = None
        if ctx.needs_input_grad[4]:
            mean = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(dim=-1)  # [T, H]
            grad_sink = -(torch.exp(sink[:, None] - lse) * mean.T).sum(dim=-1)
        return None, *ctx.passes.backward(grad, *saved), grad_sink
