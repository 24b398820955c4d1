"""Attention under context parallelism: keys and values travel while what needs none is computed.

Shapes: T own tokens of a rank, R tokens received, H query heads, G key/value heads, D head size of
queries and keys, C of values.

    forward                                         backward, by autograd
    start:  send key/value slices (asynchronous)    <- gradients have come back: add them up
    own:    attention that needs no remote key      <- own attention, meanwhile
    arrive: wait for the remote keys                <- start sending their gradients back
    joined: attention that needs them               <- joined attention

Which slices go where is decided on the host (`context_parallel`), so no rank waits for its device,
and all ranks of the group come to the same decision whether there is an exchange at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megatron_skyladder.attention.segments import ParallelSegments, Segments
from megatron_skyladder.ladder.key_exchange import KernelCall, RankPlan
from megatron_skyladder.ladder.sequence_layout import Span

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Segments], torch.Tensor]


def attend(
    backend: Attend,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: ParallelSegments,
    group: Any,
) -> torch.Tensor:
    """Attend with the keys of other ranks; every rank of the group has to call this.

    Args:
        backend: see `backends`.
        query: [T, H, D]; key: [T, G, D]; value: [T, G, C]: this rank's tokens, sequence after
            sequence.
        segments: made from a plan of this rank with ``exchanges`` set.
        group: the context-parallel group.

    Returns:
        [T, H, C].
    """
    plan = segments.plan
    exchange = _Exchange(plan, group)
    received = _Start.apply(exchange, key, value)
    calls = [call for call in (plan.own, plan.joined) if call is not None]
    query = take(tuple(span for call in calls for span in call.queries), query)
    num_own = 0 if plan.own is None else int(plan.own.cu_seqlens_q[-1])
    own_query, joined_query = query.split((num_own, query.shape[0] - num_own))
    out = query.new_empty(0, query.shape[1], value.shape[-1])
    if plan.own is not None:
        assert segments.own is not None
        keys, values = (take(plan.own.keys, tensor) for tensor in (key, value))
        out = backend(own_query, keys, values, segments.own)
    # the output passes through, so that every rank takes part in the backward exchange
    received, out = _Arrive.apply(exchange, received, out)
    if plan.joined is None:
        return take(_restoring_spans(calls), out)
    assert segments.joined is not None
    received_key, received_value = received.split((key.shape[-1], value.shape[-1]), dim=-1)
    keys = take(plan.joined.keys, key, received_key)
    values = take(plan.joined.keys, value, received_value)
    joined_out = backend(joined_query, keys, values, segments.joined)
    return take(_restoring_spans(calls), out, joined_out)


def _restoring_spans(calls: list[KernelCall]) -> tuple[Span, ...]:
    """Return the spans that put the calls' outputs, one after the other, back in order."""
    placed = []
    offset = 0
    for start, stop in (span for call in calls for span in call.queries):
        placed.append((start, (offset, offset + stop - start)))
        offset += stop - start
    return tuple(span for _, span in sorted(placed))


def take(
    spans: tuple[Span, ...], first: torch.Tensor, second: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the spans of ``first`` and, counting on after it, of ``second``, one after the other.

    Copies slices, and adds them up in a fixed order in the backward pass, so that gradients are the
    same in every run; an index would have been added up by atomics.

    Args:
        spans: (start, stop) of tokens, those of ``second`` behind all of ``first``.
        first: [tokens, ...].
        second: [more tokens, ...]; None: there are none.

    Returns:
        [tokens of the spans, ...]; ``first`` itself where they are all of it.
    """
    if second is None and spans == ((0, first.shape[0]),):
        return first
    return _Take.apply(spans, first, first[:0] if second is None else second)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, spans: tuple[Span, ...], first: torch.Tensor, second: torch.Tensor
    ) -> torch.Tensor:
        ctx.spans, ctx.sizes = spans, (first.shape[0], second.shape[0])
        return torch.cat(_slices(spans, first, second))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        first, second = (grad.new_zeros(size, *grad.shape[1:]) for size in ctx.sizes)
        _add_slices(ctx.spans, grad, first, second)
        return None, first, second


def _slices(
    spans: tuple[Span, ...], first: torch.Tensor, second: torch.Tensor
) -> list[torch.Tensor]:
    size = first.shape[0]
    return [
        first[start:stop] if stop <= size else second[start - size : stop - size]
        for start, stop in spans
    ]


def _add_slices(
    spans: tuple[Span, ...], grad: torch.Tensor, first: torch.Tensor, second: torch.Tensor
) -> None:
    parts = grad.split([stop - start for start, stop in spans])
    for target, part in zip(_slices(spans, first, second), parts, strict=True):
        target += part


class _Exchange:
    """One forward exchange and, in the backward pass, its reverse; at most one under way."""

    def __init__(self, plan: RankPlan, group: Any) -> None:
        self.group = group
        self.sends = plan.sends
        self.send_sizes = [sum(stop - start for start, stop in spans) for spans in plan.sends]
        self.receive_sizes = list(plan.receives)
        self._under_way: tuple[Any, torch.Tensor, torch.Tensor] | None = None

    def start(
        self, outgoing: torch.Tensor, send_sizes: list[int], receive_sizes: list[int]
    ) -> torch.Tensor:
        """Send slices of the first dimension; return where the incoming ones will be."""
        incoming = outgoing.new_empty(sum(receive_sizes), *outgoing.shape[1:])
        work = torch.distributed.all_to_all_single(
            incoming, outgoing, receive_sizes, send_sizes, group=self.group, async_op=True
        )
        self._under_way = work, outgoing, incoming
        return incoming

    def wait(self) -> torch.Tensor:
        """Return the incoming tensor, usable by what is launched from here on."""
        assert self._under_way is not None
        work, _, incoming = self._under_way
        work.wait()
        self._under_way = None
        return incoming


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, exchange: _Exchange, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Send; returns [R, G, D + C], keys and values, not to be read before `_Arrive`."""
        ctx.exchange, ctx.dtype = exchange, key.dtype
        ctx.shapes = key.shape, value.shape
        spans = [span for destination in exchange.sends for span in destination]
        # as many launches for hundreds of spans as for one
        chosen = [
            torch.cat([tensor[start:stop] for start, stop in spans] or [tensor[:0]])
            for tensor in (key, value)
        ]
        outgoing = torch.cat(chosen, dim=-1)
        return exchange.start(outgoing, exchange.send_sizes, exchange.receive_sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Add up what the other ranks' queries say about this rank's keys, in float32 at least."""
        returned = ctx.exchange.wait()
        (num_tokens, num_groups, key_size), (*_, value_size) = ctx.shapes
        total = torch.zeros(
            (num_tokens, num_groups, key_size + value_size),
            dtype=torch.promote_types(ctx.dtype, torch.float32),
            device=returned.device,
        )
        spans = tuple(span for destination in ctx.exchange.sends for span in destination)
        _add_slices(spans, returned, total, total[:0])
        total = total.to(ctx.dtype)
        return None, *total.split((key_size, value_size), dim=-1)


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, exchange: _Exchange, received: torch.Tensor, out: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.exchange = exchange
        exchange.wait()
        return received.view_as(received), out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Start sending the gradients back; `_Start` collects them from the exchange."""
        grad_received, grad_out = grads
        exchange = ctx.exchange
        exchange.start(grad_received.contiguous(), exchange.receive_sizes, exchange.send_sizes)
        return None, grad_received, grad_out
