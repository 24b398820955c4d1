"""Softmax sinks in the kernels' backends, on the stubs: values, gradients, what is called.

FlashAttention 4 has no stub; tests/unit checks what it is called with, tests/fa4 compiles it.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import CASES, SEQ_LENGTH, Case
from checks import (
    HEAD_DIM,
    HEADS,
    PARTS,
    SINKS,
    answers,
    build,
    build_with_sink,
    check_sink_bf16,
    dense_with_sink,
    make_qkv,
    model_config,
    no_look_at_the_device,
    segments,
    sink_answers,
)
from reference_kernels import CALLS

from megatron_skyladder.attention.backends import choose
from megatron_skyladder.attention.segments import Rows, grid_segments
from megatron_skyladder.ladder.fragments import dense_mask
from megatron_skyladder.ladder.kernels import TransformerEngine

pytestmark = [pytest.mark.te, pytest.mark.usefixtures("hopper")]
KERNELS = ["te", "varlen", "flash"]


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where every kernel takes sinks in every kind of call; TE attends unfused all the same."""
    monkeypatch.setattr(choose, "_capability", lambda: (9, 0))
    monkeypatch.setattr(choose, "_te", lambda: TransformerEngine((2, 20), (9, 26, 0)))
    choose._choose.cache_clear()
    yield
    choose._choose.cache_clear()


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("name", [*KERNELS, "sdpa"])
def test_equals_the_dense_oracle(name: str, case: Case, part: tuple[int, int]) -> None:
    """Keys longer than queries, too, as they are where keys come from other ranks."""
    for kv_heads in (HEADS, 2):
        found, expected, _ = sink_answers(name, case, part, kv_heads, torch.float32)
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("name", ["varlen", "flash"])
def test_bf16_is_as_exact_as_plain_attention(name: str, case: Case, part: tuple[int, int]) -> None:
    check_sink_bf16(name, case, part, "cpu")


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("num_sequences", [1, 3])
@pytest.mark.parametrize("window", [24, 40, SEQ_LENGTH])
@pytest.mark.parametrize("name", [*KERNELS, "sdpa"])
def test_one_parameter_serves_windows_and_the_full_window_of_all_sequences(
    name: str, window: int, num_sequences: int
) -> None:
    """Sequences join the heads, which the sinks have to follow, and their gradients add up."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(SEQ_LENGTH, num_sequences, heads, HEAD_DIM) for heads in (HEADS, 2, 2)]
    leaves = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    leaves.append(torch.tensor(SINKS).requires_grad_())
    grid = grid_segments(Rows(SEQ_LENGTH, num_sequences, window, False, torch.device("cpu")))
    backend = build_with_sink(name, 2, leaves[3])
    mask = torch.from_numpy(dense_mask(SEQ_LENGTH, window_len=window))

    def kernel(q: Any, k: Any, v: Any, _: Any) -> torch.Tensor:
        attend = backend.attend_full if window == SEQ_LENGTH else backend.attend_windows
        return attend(q, k, v, grid)

    def plain(q: Any, k: Any, v: Any, sink: Any) -> torch.Tensor:
        parts = [
            dense_with_sink(q[:, index], k[:, index], v[:, index], mask, sink).flatten(1)
            for index in range(num_sequences)
        ]
        return torch.stack(parts, dim=1)

    for _ in range(2):  # a module that was called before has no sinks of the last call
        for x, y in zip(answers(kernel, leaves), answers(plain, leaves), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    assert not list(backend.parameters())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("name", ["varlen", "flash"])
def test_the_passes_are_called_as_the_library_calls_them(
    monkeypatch: pytest.MonkeyPatch, name: str, case: Case
) -> None:
    """Argument for argument, but for the output and the log-sum-exp of the backward pass.

    The public functions are those of the installed releases: flash-attn 2.8.3 and torch 2.15.
    """
    calls = recorded_passes(monkeypatch, name)
    start, stop = PARTS["second_chunk"]
    cu_q, cu_k, keys = case.segments(start, stop)
    offsets = segments(cu_q, cu_k, case.window_size)
    q, k, v = (x.detach() for x in make_qkv(2, torch.bfloat16))
    given = [x.clone().requires_grad_() for x in (q[start:stop], k[keys], v[keys])]
    for deterministic in (False, True):
        without = build(name, 2, deterministic_mode=deterministic)
        sink = torch.tensor(SINKS)
        for backend in (without, build_with_sink(name, 2, sink, deterministic_mode=deterministic)):
            backend(*given, offsets).backward(torch.ones_like(given[0]))
        plain, ours = calls[:2], calls[2:]
        for (_, theirs), (_, mine) in zip(plain, ours, strict=True):
            assert theirs == mine
        changed = [
            [not torch.equal(x, y) for x, y in zip(theirs, mine, strict=True)]
            for (theirs, _), (mine, _) in zip(plain, ours, strict=True)
        ]
        out_and_lse = slice(4, 6)
        assert not any(changed[0])
        assert changed[1][out_and_lse] == [True, True]
        del changed[1][out_and_lse]
        assert not any(changed[1])
        calls.clear()


def recorded_passes(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> list[tuple[list[torch.Tensor], list[Any]]]:
    """Return a list that fills with (tensors, everything else) of each pass that is called."""
    calls: list[tuple[list[torch.Tensor], list[Any]]] = []

    def recording(function: Any, *, unset: tuple[int, ...] = ()) -> Any:
        def record(*args: Any, **kwargs: Any) -> Any:
            given = [*args, *(kwargs[key] for key in sorted(kwargs))]
            tensors = [
                x.clone()
                for index, x in enumerate(given)
                if isinstance(x, torch.Tensor) and index not in unset
            ]
            others = [repr(x) for x in given if not isinstance(x, torch.Tensor)]
            calls.append((tensors, [*others, sorted(kwargs)]))
            return function(*args, **kwargs)

        return record

    if name == "flash":
        import flash_attn_2_cuda as compiled

        monkeypatch.setattr(compiled, "varlen_fwd", recording(compiled.varlen_fwd))
        where_gradients_go = (6, 7, 8)
        monkeypatch.setattr(
            compiled, "varlen_bwd", recording(compiled.varlen_bwd, unset=where_gradients_go)
        )
    else:
        from torch.nn.attention import varlen

        for pass_ in (varlen._varlen_attn, varlen._varlen_attn_backward):
            kernel = pass_._backend_fns["cpu"]
            pass_.register_kernel("cpu", recording(kernel))
    return calls


@pytest.mark.usefixtures("exact")
def test_the_full_window_is_stocks_call_with_stocks_sink(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Transformer Engine gets from a stock layer's core attention, and from ours."""
    from megatron.core.extensions.transformer_engine import TEDotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from transformer_engine.pytorch import DotProductAttention

    built, called = [], []
    init, forward = DotProductAttention.__init__, DotProductAttention.forward

    @functools.wraps(init)  # its signature is looked at
    def recorded_init(self, *args, **kwargs):
        built.append((args, kwargs))
        init(self, *args, **kwargs)

    def recorded_forward(self, *args, **kwargs):
        sink = self.softmax_offset.detach().float()
        called.append((self.window_size, self.qkv_format, self.softmax_type, sink, args, kwargs))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(DotProductAttention, "__init__", recorded_init)
    monkeypatch.setattr(DotProductAttention, "forward", recorded_forward)
    stock = TEDotProductAttention(
        config=model_config(2, softmax_type="learnable"),
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        softmax_scale=None,
        pg_collection=types.SimpleNamespace(tp=None, cp=None, hcp=None),
    )
    sink = torch.tensor(SINKS).requires_grad_()
    with torch.no_grad():
        stock.softmax_offset.copy_(sink)
    backend = build_with_sink("te", 2, sink)
    shapes = [(SEQ_LENGTH, 2, heads, HEAD_DIM) for heads in (HEADS, 2, 2)]
    qkv = [torch.randn(shape) for shape in shapes]
    expected = stock(*qkv, None, attn_mask_type=AttnMaskType.causal)
    grid = grid_segments(Rows(SEQ_LENGTH, 2, SEQ_LENGTH, False, torch.device("cpu")))
    got = backend.attend_full(*qkv, grid)
    assert torch.equal(got, expected)
    direction = torch.randn(got.shape)
    (mine,) = torch.autograd.grad(got, [sink], direction)
    (theirs,) = torch.autograd.grad(expected, [stock.softmax_offset], direction)
    assert torch.equal(mine, theirs)
    assert built[0] == built[1]
    (*theirs_set, their_sink, their_args, their_kwargs) = called[0]
    (*mine_set, my_sink, my_args, my_kwargs) = called[1]
    assert theirs_set == mine_set and their_kwargs == my_kwargs
    assert torch.equal(their_sink, my_sink)
    assert all(x is y for x, y in zip(their_args, my_args, strict=True))


@pytest.mark.parametrize("name", ["varlen", "flash"])
def test_no_value_is_asked_for(name: str) -> None:
    """In bf16, forward and backward; TE has no stub of a fused kernel with a sink."""
    case = CASES[5]
    cu_q, cu_k, keys = case.segments(24, 72)
    offsets = segments(cu_q, cu_k, case.window_size)
    sink = torch.tensor(SINKS, dtype=torch.bfloat16).requires_grad_()
    backend = build_with_sink(name, 2, sink)
    qkv = make_qkv(2, torch.bfloat16)
    CALLS.clear()
    with no_look_at_the_device():
        out = backend(qkv[0][24:72], qkv[1][keys], qkv[2][keys], offsets)
        out.backward(torch.ones_like(out))
    assert all(x.grad is not None for x in (*qkv, sink))
    assert CALLS[f"{name}_forward"] == CALLS[f"{name}_backward"] == 1
