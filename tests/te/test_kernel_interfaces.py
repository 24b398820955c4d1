"""The three packages' own interfaces, called as README.md says, against the dense oracle."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import CASES, SEQ_LENGTH, Case, dense_attention
from reference_kernels import CALLS

pytestmark = [pytest.mark.te, pytest.mark.usefixtures("exact")]

HEADS, HEAD_DIM = 4, 16
PARTS = {"whole_row": (0, SEQ_LENGTH), "second_chunk": (24, 48), "last_chunk": (72, 96)}


def varlen(q, k, v, cu_q, cu_k, max_q, max_k, window_size):
    from torch.nn.attention.varlen import varlen_attn

    gqa = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    return varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, window_size=window_size, **gqa)


def flash(q, k, v, cu_q, cu_k, max_q, max_k, window_size):
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, max_q, max_k, causal=True, window_size=window_size
    )


def transformer_engine(q, k, v, cu_q, cu_k, max_q, max_k, window_size):
    from transformer_engine.pytorch import DotProductAttention

    same = cu_q is cu_k
    q, k, v = (x if x.storage_offset() == 0 else x.clone() for x in (q, k, v))
    module = DotProductAttention(
        q.shape[1],
        q.shape[2],
        num_gqa_groups=k.shape[1],
        attn_mask_type="padding_causal",
        attention_type="self" if same else "cross",
    )
    out = module(
        q,
        k,
        v,
        qkv_format="thd",
        attn_mask_type="padding_causal" if same else "padding_causal_bottom_right",
        window_size=window_size,
        cu_seqlens_q=cu_q,
        cu_seqlens_kv=cu_k,
        max_seqlen_q=max_q,
        max_seqlen_kv=max_k,
    )
    return out.view(*q.shape)


INTERFACES = [varlen, flash, transformer_engine]
COUNTERS = {varlen: "varlen_forward", flash: "flash_forward", transformer_engine: "thd_to_bshd"}


def make_qkv(kv_heads: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(SEQ_LENGTH, heads, HEAD_DIM, generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
        for heads in (HEADS, kv_heads, kv_heads)
    ]


def run(
    attend: Callable[..., torch.Tensor], case: Case, part: tuple[int, int], kv_heads: int, pad: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return [output, gradients of q, k, v] of an interface and of the oracle."""
    start, stop = part
    cu_q, cu_k, keys = case.segments(start, stop)
    max_q, max_k = int(cu_q.diff().max()), int(cu_k.diff().max())
    if torch.equal(cu_q, cu_k):
        cu_q = cu_k = torch.cat([cu_q, cu_q[-1:].expand(pad)])
    else:
        cu_q, cu_k = (torch.cat([cu, cu[-1:].expand(pad)]) for cu in (cu_q, cu_k))
    weights = torch.randn(stop - start, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(2))
    results = []
    for oracle in (False, True):
        qkv = make_qkv(kv_heads)
        q, k, v = qkv[0][start:stop], qkv[1][keys], qkv[2][keys]
        if oracle:
            out = dense_attention(q, k, v, case.dense()[start:stop, keys])
        else:
            out = attend(q, k, v, cu_q, cu_k, max_q + pad, max_k + pad, case.window_size)
        (out * weights).sum().backward()
        results.append([out, *(x.grad for x in qkv)])
    return results[0], results[1]


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("attend", INTERFACES, ids=lambda attend: attend.__name__)
def test_equals_the_dense_oracle(attend, case, part):
    CALLS.clear()
    for kv_heads, pad in ((HEADS, 0), (2, 5)):
        got, expected = run(attend, case, part, kv_heads, pad)
        for name, x, y in zip(("out", "q", "k", "v"), got, expected, strict=True):
            torch.testing.assert_close(
                x, y, rtol=1e-5, atol=5e-6, msg=lambda m, name=name: f"{name}: {m}"
            )
    assert CALLS[COUNTERS[attend]] >= 2


@pytest.mark.parametrize("attend", INTERFACES, ids=lambda attend: attend.__name__)
def test_full_causal_attention_differs(attend):
    """The control: without it, an oracle that ignored its mask would pass everything."""
    whole = PARTS["whole_row"]
    full, _ = run(attend, CASES[0], whole, HEADS, 0)
    for case in CASES[1:]:
        windowed, _ = run(attend, case, whole, HEADS, 0)
        assert (full[0] - windowed[0]).abs().max() > 1e-2, case.name
