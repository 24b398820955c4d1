"""The mean loss of a micro-batch under context parallelism: over whole sequences, not over parts.

A loss function returns the sum of its losses and the number of tokens that count; Megatron divides
one by the other, and data parallelism then averages the gradients over all ranks. Context-parallel
ranks hold parts of the same sequences, so that is the mean of the parts' means. It equals the mean
of the micro-batch only where every part counts equally many tokens; with ``--eod-mask-loss``,
padding, or any other loss mask it does not. Two ranks, ``x`` does not count:

    tokens     a b c d | e x x x       the sequence's mean    (a+b+c+d+e) / 5
    rank       0       | 1             the mean of the means  ((a+b+c+d) / 4 + e / 1) / 2

So each rank divides by the count of all of them instead, times their number, because the average
over ranks that follows divides by it again. A loss function may count over all ranks by itself (a
fork's, or Megatron's up to 0.12): then both are larger by the same factor, and their quotient
stays. ``--calculate-per-token-loss`` needs none of this. What is logged is a sum over all ranks
divided by a count over all ranks, in any case.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_skyladder.runtime import trainer


def over_sequences(loss_func: Callable[..., Any]) -> Callable[..., Any]:
    """Return a loss function that counts the tokens of whole sequences.

    Where there is no context parallelism it is returned as it is.
    """
    if trainer.current().groups.cp.size() == 1:
        return loss_func
    return functools.partial(_loss, loss_func)


def with_mean_over_sequences(forward_step: Callable[..., Any]) -> Callable[..., Any]:
    """Return Megatron's ``forward_step_func`` with such a loss function."""
    if trainer.current().groups.cp.size() == 1:
        return forward_step

    @functools.wraps(forward_step)
    def wrapped(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        output, loss_func = forward_step(*args, **kwargs)
        return output, over_sequences(loss_func)

    return wrapped


def _loss(loss_func: Callable[..., Any], losses: torch.Tensor, **kwargs: Any) -> Any:
    """Call the loss function and return its values, summed loss and count corrected.

    Args:
        loss_func: returns a summed loss, a count and what is logged; or two values, of which the
            first is a mean already.
        losses: per token, of this rank's part of the sequences.
    """
    values = loss_func(losses, **kwargs)
    if not isinstance(values, (tuple, list)) or len(values) != 3:
        return values
    loss, num_tokens, report = values
    total = torch.as_tensor(num_tokens, device=loss.device).detach().clone()
    group = trainer.current().groups.cp
    torch.distributed.all_reduce(total, group=group)
    return loss * group.size(), total, report
