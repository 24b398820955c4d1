"""Sinks around a kernel without them, in float64 against a dense softmax with one more key."""

from __future__ import annotations

import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from megatron_skyladder.attention import sinks  # noqa: E402

TOKENS, KEYS, HEADS, GROUPS, SIZE, VALUE_SIZE = 11, 15, 4, 2, 8, 6
SCALE = 0.3
MASK = torch.ones(TOKENS, KEYS).tril(KEYS - TOKENS).bool()  # the last query sees the last key


def kernel(calls: list[str]) -> sinks.Passes:
    """A kernel that knows nothing of sinks: out and lse, and the gradients from these two."""

    def logits(query: Any, key: Any) -> Any:
        keys = key.repeat_interleave(HEADS // GROUPS, 1)
        found = torch.einsum("thd,khd->htk", query, keys) * SCALE
        return found.masked_fill(~MASK, -math.inf)

    def forward(query: Any, key: Any, value: Any) -> Any:
        calls.append("forward")
        found = logits(query, key)
        values = value.repeat_interleave(HEADS // GROUPS, 1)
        out = torch.einsum("htk,khc->thc", found.softmax(-1), values)
        return out, found.logsumexp(-1), torch.tensor(7)

    def backward(grad: Any, query: Any, key: Any, value: Any, out: Any, lse: Any, rest: Any) -> Any:
        calls.append("backward")
        assert rest == 7
        keys, values = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (key, value))
        weights = (logits(query, key) - lse[..., None]).exp()
        grad_weights = torch.einsum("thc,khc->htk", grad, values)
        mean = (grad * out).sum(-1).T[..., None]
        grad_logits = weights * (grad_weights - mean) * SCALE
        per_head = (
            torch.einsum("htk,thd->khd", grad_logits, query),
            torch.einsum("htk,thc->khc", weights, grad),
        )
        of_keys, of_values = (x.unflatten(1, (GROUPS, -1)).sum(2) for x in per_head)
        return torch.einsum("htk,khd->thd", grad_logits, keys), of_keys, of_values

    return sinks.Passes(forward, backward)


def dense(query: Any, key: Any, value: Any, sink: Any) -> Any:
    """One query and one head at a time, from the definition."""
    rows = []
    for token in range(TOKENS):
        heads = []
        for head in range(HEADS):
            group = head * GROUPS // HEADS
            seen = [index for index in range(KEYS) if MASK[token, index]]
            terms = [(SCALE * query[token, head] @ key[index, group]).exp() for index in seen]
            total = sum(terms) + sink[head].exp()
            heads.append(sum(t * value[i, group] for t, i in zip(terms, seen, strict=True)) / total)
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def inputs() -> list[Any]:
    generator = torch.Generator().manual_seed(5)
    shapes = [(TOKENS, HEADS, SIZE), (KEYS, GROUPS, SIZE), (KEYS, GROUPS, VALUE_SIZE)]
    qkv = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [*qkv, torch.tensor([-3.0, 0.0, 1.0, 4.0], dtype=torch.float64)]


def test_values_and_all_gradients_are_those_of_a_softmax_with_one_more_key() -> None:
    leaves: Any = [x.requires_grad_() for x in inputs()]
    calls: list[str] = []
    out = sinks.attend_with_sink(kernel(calls), *leaves)
    expected = dense(*leaves)
    torch.testing.assert_close(out, expected)
    direction = torch.randn(out.shape, dtype=torch.float64)
    found = torch.autograd.grad(out, leaves, direction)
    torch.testing.assert_close(found, torch.autograd.grad(expected, leaves, direction))
    assert calls == ["forward", "backward"]


def test_a_sink_that_is_not_trained_costs_nothing_in_the_backward_pass() -> None:
    *qkv, sink = inputs()
    leaves: Any = [x.requires_grad_() for x in qkv]
    direction = torch.randn(TOKENS, HEADS, VALUE_SIZE, dtype=torch.float64)
    out = sinks.attend_with_sink(kernel([]), *leaves, sink)  # type: ignore[call-arg]
    found = torch.autograd.grad(out, leaves, direction)
    torch.testing.assert_close(found, torch.autograd.grad(dense(*leaves, sink), leaves, direction))  # type: ignore[call-arg]
    assert sink.grad is None


def test_a_sink_that_is_off_changes_no_bit() -> None:
    """The probe asks the keys alone: exp(-1e4) is 0."""
    *qkv, sink = inputs()
    out, _, _ = kernel([]).forward(*qkv)
    off = torch.full_like(sink, -1e4)
    assert torch.equal(sinks.attend_with_sink(kernel([]), *qkv, off), out)  # type: ignore[call-arg]


def test_bf16_keeps_the_gradient_of_a_sink_in_float32() -> None:
    """Its terms cancel: rounded one by one, thousands of tokens would drown them."""
    leaves: Any = [x.requires_grad_() for x in inputs()]
    half: Any = [x.detach().bfloat16().requires_grad_() for x in leaves[:3]]
    sink = leaves[3].detach().float().requires_grad_()
    exact, low = kernel([]), kernel([])

    def forward(*qkv: Any) -> Any:
        wide: Any = [x.float() for x in qkv]
        out, lse, rest = exact.forward(*wide)
        return out.bfloat16(), lse, rest

    def backward(grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, rest: Any) -> Any:
        wide: Any = [x.float() for x in (grad, q, k, v, out)]
        wide = low.backward(*wide, lse, rest)  # type: ignore[call-arg]
        return tuple(x.bfloat16() for x in wide)

    out = sinks.attend_with_sink(sinks.Passes(forward, backward), *half, sink)  # type: ignore[call-arg]
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert sink.grad is not None and sink.grad.dtype == torch.float32
    expected = torch.autograd.grad(dense(*leaves).sum(), leaves[3])[0]
    torch.testing.assert_close(sink.grad.double(), expected, rtol=2e-2, atol=2e-2)


def test_bf16_sink_gradient_is_that_of_the_rounded_output() -> None:
    """Of 500 tokens, by definition in float64: products rounded to bfloat16 would not cancel."""
    generator = torch.Generator().manual_seed(0)
    out, grad = (torch.randn(500, HEADS, 64, generator=generator).bfloat16() for _ in range(2))
    lse, sink = torch.randn(HEADS, 500, generator=generator), torch.zeros(HEADS).requires_grad_()
    passes = sinks.Passes(
        lambda *_: (out.clone(), lse, torch.tensor(7)), lambda *_: (None, None, None)
    )
    unread: Any = torch.zeros(1)
    found: Any = sinks.attend_with_sink(passes, unread, unread, unread, sink)
    found.backward(grad)
    weights = torch.sigmoid(-lse.double())  # exp(sink) / (exp(lse) + exp(sink)), of a sink of 0
    expected = -(weights * (grad.double() * found.double()).sum(-1).T).sum(-1)
    assert sink.grad is not None
    torch.testing.assert_close(sink.grad.double(), expected.detach(), rtol=1e-4, atol=1e-4)
