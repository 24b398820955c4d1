"""What a backend has to do, on whatever device: for the stubs here and for tests/gpu.

Shapes: M queries of a part of a row, K keys that they may see, H query heads, G key/value heads,
D head size.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, SEQ_LENGTH, Case, dense_attention

from megatron_skyladder.attention.backends import make_backend
from megatron_skyladder.attention.segments import Segments
from megatron_skyladder.ladder.fragments import fragment_cu_seqlens, rows_cu_seqlens

HEADS, HEAD_DIM = 4, 16
PARTS = {"whole_row": (0, SEQ_LENGTH), "second_chunk": (24, 48), "last_chunk": (72, 96)}
EXACT_ZERO = 1e-4  # what plain attention gets exactly right, in bf16 of values around 1


def make_qkv(
    kv_heads: int, dtype: torch.dtype = torch.float32, *, seq_length: int = SEQ_LENGTH
) -> list[torch.Tensor]:
    """Return random q, k, v of a whole row, leaves that want gradients."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(seq_length, heads, HEAD_DIM, generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
        for heads in (HEADS, kv_heads, kv_heads)
    ]


def run(
    attend: Callable[..., torch.Tensor], case: Case, part: tuple[int, int], kv_heads: int, pad: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return [output, gradients of q, k, v] of an interface and of the oracle, in float32.

    Args:
        attend: (q, k, v, cu_q, cu_k, max_q, max_k, window_size) -> [M, H, D].
        part: start and end of the queries.
        pad: empty segments at the end; also how much max_seqlen is above the longest.
    """
    start, stop = part
    cu_q, cu_k, keys = case.segments(start, stop)
    max_q, max_k = int(cu_q.diff().max()), int(cu_k.diff().max())
    if torch.equal(cu_q, cu_k):
        cu_q = cu_k = torch.cat([cu_q, cu_q[-1:].expand(pad)])
    else:
        cu_q, cu_k = (torch.cat([cu, cu[-1:].expand(pad)]) for cu in (cu_q, cu_k))

    def kernel(q, k, v):
        return attend(q, k, v, cu_q, cu_k, max_q + pad, max_k + pad, case.window_size)

    def oracle(q, k, v):
        return dense_attention(q, k, v, case.dense()[start:stop, keys])

    qkv = make_qkv(kv_heads)
    return tuple(with_gradients(f, qkv, (slice(start, stop), keys)) for f in (kernel, oracle))


def with_gradients(
    attend: Callable[..., torch.Tensor], qkv: list[torch.Tensor], part: tuple[slice, slice]
) -> list[torch.Tensor]:
    """Return [output, gradients of q, k, v] for the queries and keys of a part of the row."""
    leaves = [x.detach().requires_grad_() for x in qkv]
    out = attend(leaves[0][part[0]], leaves[1][part[1]], leaves[2][part[1]])
    generator = torch.Generator().manual_seed(2)
    direction = torch.randn(out.shape, generator=generator).to(out)
    return [out, *torch.autograd.grad(out, leaves, direction)]


def build(name: str, kv_heads: int, **config_changes: Any) -> torch.nn.Module:
    """Build the backend as a layer of a model would."""
    return make_backend(
        name,
        config=model_config(kv_heads, **config_changes),
        scale=HEAD_DIM**-0.5,
        layer_number=1,
        softmax_scale=None,
        pg_collection=types.SimpleNamespace(tp=None, cp=None, hcp=None),
    )


def model_config(kv_heads: int, **changes: Any) -> Any:
    """Return the configuration of a model as small as the tensors here."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        num_query_groups=kv_heads,
        attention_dropout=0.0,
        params_dtype=torch.bfloat16,
        **changes,
    )


def segments(
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    window_size: tuple[int, int],
    device: str = "cpu",
) -> Segments:
    """Wrap offsets as the attention module does: one array where queries and keys are the same."""
    host_q = cu_q.numpy()
    return Segments(
        cu_seqlens_q=host_q,
        cu_seqlens_k=host_q if np.array_equal(host_q, cu_k.numpy()) else cu_k.numpy(),
        sliding_window=None if window_size[0] < 0 else window_size[0] + 1,
        grid=None,
        device=torch.device(device),
    )


def check_bf16(name: str, case: Case, part: tuple[int, int], device: str) -> None:
    """Check that the error against float32 is at most twice that of plain attention in bf16.

    Output and gradients, in the root mean square; the largest single error, which is a matter of
    luck but shows a wrong mask at once, at most four times. The queries are a part of the row and
    lie at the end of their keys.
    """
    start, stop = part
    cu_q, cu_k, keys = case.segments(start, stop)
    offsets = segments(cu_q, cu_k, case.window_size, device)
    backend = build(name, 2)
    mask = case.dense()[start:stop, keys].to(device)
    half = [x.detach().to(device) for x in make_qkv(2, torch.bfloat16, seq_length=case.seq_length)]

    def dense(q, k, v):
        return dense_attention(q, k, v, mask)

    at = slice(start, stop), keys
    got = with_gradients(lambda q, k, v: backend(q, k, v, offsets), half, at)
    plain = with_gradients(dense, half, at)
    exact = with_gradients(dense, [x.float() for x in half], at)
    for what, x, low, truth in zip(("out", "q", "k", "v"), got, plain, exact, strict=True):
        assert x.dtype == torch.bfloat16, x.dtype
        errors, bars = ((y.float() - truth).abs() for y in (x, low))
        for most, norm in ((2, lambda y: y.square().mean().sqrt()), (4, torch.max)):
            error, bar = norm(errors).item(), norm(bars).item()
            assert error <= most * bar + EXACT_ZERO, f"{what}: {error}, plain attention {bar}"


# ---------------------------------------------------------------- softmax sinks

SINKS = (-3.0, 0.0, 1.0, 4.0)  # logits, one for each head


def build_with_sink(
    name: str, kv_heads: int, sink: torch.Tensor, **changes: Any
) -> torch.nn.Module:
    backend = build(name, kv_heads, softmax_type="learnable", **changes)
    backend.use_sink(lambda: sink)
    return backend


def dense_with_sink(q: Any, k: Any, v: Any, mask: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
    """[M, H, D] in the type of the inputs: a softmax with a last key, whose value is zero."""
    keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    logits = torch.einsum("mhd,khd->hmk", q, keys) * q.shape[-1] ** -0.5
    logits = logits.masked_fill(~mask, float("-inf"))
    column = sink.to(logits.dtype)[:, None, None].expand(-1, logits.shape[1], 1)
    weights = torch.cat([logits, column], -1).softmax(-1)[..., :-1]
    return torch.einsum("hmk,khd->mhd", weights, values)


def answers(
    attend: Callable[..., torch.Tensor], leaves: list[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """Return the output and the gradients of all leaves."""
    out = attend(*leaves)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    return (out, *torch.autograd.grad(out, leaves, direction))


def sink_answers(
    name: str,
    case: Case,
    part: tuple[int, int],
    kv_heads: int,
    dtype: torch.dtype,
    device: str = "cpu",
) -> list[tuple[torch.Tensor, ...]]:
    """Return what the backend answers, and the same of plain attention in this type and float32."""
    start, stop = part
    cu_q, cu_k, keys = case.segments(start, stop)
    offsets = segments(cu_q, cu_k, case.window_size, device)
    mask = case.dense()[start:stop, keys].to(device)

    def kernel(q: Any, k: Any, v: Any, sink: Any) -> torch.Tensor:
        return build_with_sink(name, kv_heads, sink)(q[start:stop], k[keys], v[keys], offsets)

    def plain(q: Any, k: Any, v: Any, sink: Any) -> torch.Tensor:
        return dense_with_sink(q[start:stop], k[keys], v[keys], mask, sink)

    qkv = make_qkv(kv_heads, dtype, seq_length=case.seq_length)
    leaves = [x.detach().to(device) for x in (*qkv, torch.tensor(SINKS, dtype=dtype))]
    exact = [x.float() for x in leaves]
    return [
        answers(attend, [x.requires_grad_() for x in given])
        for attend, given in ((kernel, leaves), (plain, leaves), (plain, exact))
    ]


def check_sink_bf16(name: str, case: Case, part: tuple[int, int], device: str) -> None:
    """Check by the bar of `check_bf16`, the gradient of the parameter too, which is bf16 as well.

    That is but four numbers, of which plain attention may get some right by luck: a step of bf16
    is added there.
    """
    found = sink_answers(name, case, part, 2, torch.bfloat16, device)
    for what, x, low, truth in zip(("out", "q", "k", "v", "sink"), *found, strict=True):
        assert x.dtype == torch.bfloat16
        errors, bars = ((y.float() - truth).abs() for y in (x, low))
        for most, norm in ((2, lambda y: y.square().mean().sqrt()), (4, torch.max)):
            error, bar = norm(errors).item(), norm(bars).item()
            luck = truth.abs().max().item() / 128 if what == "sink" else EXACT_ZERO
            assert error <= most * bar + luck, f"{what}: {error}, plain attention {bar}"


# ---------------------------------------------------------------- the attention module

ROW, WINDOW = 64, 24


def make_attention(backend: str, mask: str) -> torch.nn.Module:
    """Build the core-attention module as a layer of a model would."""
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_skyladder.attention.core_attention import SkyLadderAttention
    from megatron_skyladder.ladder import clock
    from megatron_skyladder.ladder.config import SkyLadderConfig
    from megatron_skyladder.ladder.schedules import WindowSchedule

    config = SkyLadderConfig(
        schedule=WindowSchedule(start_window=WINDOW, final_window=ROW, alpha=1),
        seq_length=ROW,
        step_samples=1,
        mask=mask,
        attention_backend=backend,
    )
    clock.install(config, lambda: 0)
    return SkyLadderAttention(
        model_config(2),
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        pg_collection=types.SimpleNamespace(tp=None, cp=None, hcp=None),
    )


def document_mask(num_rows: int, ends: tuple[int, ...] = (5, 40)) -> torch.Tensor:
    """int32 cu_seqlens on the host, as the trainer hands them over."""
    row = fragment_cu_seqlens(np.array(ends, np.int32), seq_length=ROW, window_len=WINDOW)
    return torch.from_numpy(rows_cu_seqlens([row] * num_rows))


def call_attention(
    attention: torch.nn.Module, num_rows: int, mask: torch.Tensor | None, **mixed_options: Any
) -> torch.Tensor:
    """Call the module as Megatron does: on three views of one projection, on the device "cuda"."""
    mixed = torch.empty(
        ROW, num_rows, HEADS + 4, HEAD_DIM, dtype=torch.bfloat16, device="cuda", **mixed_options
    )
    out = attention(*mixed.split([HEADS, 2, 2], dim=2), mask)
    assert out.shape == (ROW, num_rows, HEADS * HEAD_DIM), out.shape
    assert out.device.type == "cuda" and out.dtype == torch.bfloat16, (out.device, out.dtype)
    return out


# ---------------------------------------------------------------- nothing waits for the device


LOOKS = ("item", "tolist", "cpu", "numpy", "nonzero", "unique", "masked_select", "__bool__",
         "__int__", "__float__", "__index__", "__array__")  # fmt: skip


@contextlib.contextmanager
def no_look_at_the_device() -> Iterator[None]:
    """Fail where Python asks for a tensor's value, as on a GPU it would be waited for.

    The methods themselves are replaced: a function mode is not asked in the backward pass, and a
    dispatch mode does not see tolist() or cpu() where all tensors are on the CPU. The reference
    kernels have their own way to the values.
    """

    def refusing(name: str) -> Callable[..., None]:
        def refuse(*_: object, **__: object) -> None:
            raise AssertionError(f"{name} waits for the device")

        return refuse

    with pytest.MonkeyPatch.context() as patch:
        for name in LOOKS:
            patch.setattr(torch.Tensor, name, refusing(name))
        yield


def attend_without_a_look(name: str) -> None:
    """Attend to a part of a row, forward and backward, while nothing looks at the device.

    In bf16, where Transformer Engine goes to flash-attn as it does on a GPU.
    """
    case = CASES[5]
    cu_q, cu_k, keys = case.segments(24, 72)
    offsets = segments(cu_q, cu_k, case.window_size)
    backend = build(name, 2)
    qkv = make_qkv(2, torch.bfloat16)
    with no_look_at_the_device():
        out = backend(qkv[0][24:72], qkv[1][keys], qkv[2][keys], offsets)
        out.backward(torch.ones_like(out))
    assert all(x.grad is not None for x in qkv)


def exchange_without_a_look(names: list[str]) -> None:
    """The same as one of several context-parallel ranks, with keys that travel."""
    from megatron_skyladder.attention import context_parallel
    from megatron_skyladder.attention.segments import MaskCache, ParallelSegments, Rows

    torch.distributed.init_process_group("gloo")
    group = torch.distributed.group.WORLD
    rank, size = group.rank(), group.size()
    rows = Rows(ROW, 2, WINDOW, False, torch.device("cpu"), cp_size=size, cp_rank=rank)
    parallel = MaskCache().get(document_mask(2), rows)
    assert isinstance(parallel, ParallelSegments)
    for name in names:
        backend = build(name, 2, context_parallel_size=size)
        qkv = make_qkv(2, torch.bfloat16, seq_length=ROW * 2 // size)
        with no_look_at_the_device():
            out = context_parallel.attend(backend, *qkv, parallel, group)
            out.backward(torch.ones_like(out))
        assert all(x.grad is not None for x in qkv)
