"""The three packages' own interfaces, called as README.md says, against the dense oracle."""

from __future__ import annotations

import pytest
import torch
from cases import CASES
from checks import HEADS, PARTS, run
from reference_kernels import CALLS

pytestmark = [pytest.mark.te, pytest.mark.usefixtures("exact")]


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
