"""What Transformer Engine's own checks accept, refuse and silently get wrong for thd attention."""

from __future__ import annotations

import types

import pytest
import torch
from cases import CASES, SEQ_LENGTH, dense_attention
from checks import HEAD_DIM, HEADS, make_qkv
from reference_kernels import CALLS

pytestmark = [pytest.mark.te, pytest.mark.usefixtures("exact")]

WINDOW = CASES[1]
KV_HEADS = 2


def call(**changes: object) -> torch.Tensor:
    """Call DotProductAttention as README.md says, with some arguments changed."""
    from transformer_engine.pytorch import DotProductAttention

    q, k, v = changes.pop("qkv", None) or make_qkv(KV_HEADS)
    cu, _, _ = WINDOW.segments()
    arguments = {
        "qkv_format": "thd",
        "attn_mask_type": "padding_causal",
        "window_size": (-1, 0),
        "cu_seqlens_q": cu,
        "cu_seqlens_kv": cu,
        "max_seqlen_q": WINDOW.window_len,
        "max_seqlen_kv": WINDOW.window_len,
        **changes,
    }
    module = DotProductAttention(
        HEADS, HEAD_DIM, num_gqa_groups=KV_HEADS, attn_mask_type="padding_causal"
    )
    return module(q, k, v, **arguments)


def test_returns_heads_flattened():
    assert call().shape == (SEQ_LENGTH, HEADS * HEAD_DIM)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cu_seqlens_q": WINDOW.segments()[0].long()}, "int32"),
        ({"cu_seqlens_q": WINDOW.segments()[0][None]}, "batch_size \\+ 1"),
        ({"cu_seqlens_kv": None}, "can not be None"),
        ({"cu_seqlens_kv": WINDOW.segments()[0][:-1]}, "batch_size \\+ 1"),
        ({"qkv": [x[None] for x in make_qkv(KV_HEADS)]}, "3D tensors"),
        ({"qkv": make_qkv(HEADS)}, "num_gqa_group"),
        ({"attn_mask_type": "causal"}, "padding or padding_causal"),
    ],
    ids=["int64", "two_dimensions", "no_kv", "other_count", "4d", "heads", "mask_type"],
)
def test_refuses(changes, message):
    with pytest.raises(AssertionError, match=message):
        call(**changes)


def test_padded_offsets_switch_the_backend_off():
    """A second tensor of the same offsets means padding between segments; the same object not."""
    cu, _, _ = WINDOW.segments()
    same = call(cu_seqlens_q=cu, cu_seqlens_q_padded=cu, cu_seqlens_kv=cu, cu_seqlens_kv_padded=cu)
    assert torch.equal(same, call())
    with pytest.raises(ValueError, match="No dot product attention backend"):
        call(cu_seqlens_q_padded=cu.clone(), cu_seqlens_kv_padded=cu.clone())


def test_larger_max_seqlen_and_empty_segments_change_nothing():
    cu, _, _ = WINDOW.segments()
    cu = torch.cat([cu, cu[-1:].expand(7)])
    padded = call(cu_seqlens_q=cu, cu_seqlens_kv=cu, max_seqlen_q=50, max_seqlen_kv=50)
    torch.testing.assert_close(padded, call(), rtol=0, atol=1e-6)


def test_wrong_offsets_are_accepted_by_transformer_engine():
    """Its Python does not notice; here the stub does, on a GPU the output is just wrong."""
    cu, _, _ = WINDOW.segments()
    short = cu.clone()
    short[-1] -= 1
    with pytest.raises(RuntimeError, match="ends before"):
        call(cu_seqlens_q=short, cu_seqlens_kv=short)


def test_slices_are_refused_where_copies_are_not():
    """It finds out q, k and v's common layout from their addresses, which a slice confuses."""
    case = CASES[2]
    cu, _, _ = case.segments()
    sliced = [x[8:] for x in (x.new_zeros(SEQ_LENGTH + 8, *x.shape[1:]) for x in make_qkv(2))]
    assert all(x.is_contiguous() for x in sliced)
    with pytest.raises(RuntimeError, match="memory layout is not supported"):
        call(qkv=sliced, cu_seqlens_q=cu, cu_seqlens_kv=cu, max_seqlen_q=36, max_seqlen_kv=36)


def chunk_inputs():
    """Queries of the second half of a window and keys of the whole: more keys than queries."""
    case = CASES[2]
    start, stop = 18, 54
    cu_q, cu_k, keys = case.segments(start, stop)
    q, k, v = (x.detach() for x in make_qkv(KV_HEADS))
    expected = dense_attention(q[start:stop], k[keys], v[keys], case.dense()[start:stop, keys])
    return [x.clone() for x in (q[start:stop], k[keys], v[keys])], (cu_q, cu_k), expected.flatten(1)


def test_padding_causal_is_aligned_to_the_top_left():
    """With more keys than queries it is the wrong mask, and nothing says so."""
    from transformer_engine.pytorch import DotProductAttention

    qkv, (cu_q, cu_k), expected = chunk_inputs()
    outputs = {}
    for mask_type in ("padding_causal", "padding_causal_bottom_right"):
        module = DotProductAttention(
            HEADS, HEAD_DIM, num_gqa_groups=KV_HEADS, attention_type="cross"
        )
        outputs[mask_type] = module(
            *qkv,
            qkv_format="thd",
            attn_mask_type=mask_type,
            cu_seqlens_q=cu_q,
            cu_seqlens_kv=cu_k,
            max_seqlen_q=36,
            max_seqlen_kv=36,
        )
    torch.testing.assert_close(
        outputs["padding_causal_bottom_right"], expected, rtol=1e-5, atol=2e-6
    )
    assert (outputs["padding_causal"] - expected).abs().max() > 1e-2


def megatron_module(config_changes: dict[str, object] | None = None):
    """Build Megatron's TEDotProductAttention as a layer of a small model would."""
    from megatron.core.extensions.transformer_engine import TEDotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        num_query_groups=KV_HEADS,
        attention_dropout=0.0,
        **(config_changes or {}),
    )
    groups = types.SimpleNamespace(tp=None, cp=None, hcp=None)
    return TEDotProductAttention(config, 1, AttnMaskType.causal, "self", pg_collection=groups)


def test_megatrons_wrapper_with_packed_sequences():
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.enums import AttnMaskType

    cu, _, _ = WINDOW.segments()
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu,
        cu_seqlens_kv=cu,
        max_seqlen_q=WINDOW.window_len,
        max_seqlen_kv=WINDOW.window_len,
    )
    q, k, v = make_qkv(KV_HEADS)
    out = megatron_module()(q, k, v, None, AttnMaskType.causal, packed_seq_params=packed)
    expected = dense_attention(q, k, v, WINDOW.dense()).flatten(1)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_flash_attention_under_transformer_engine(case):
    """In bf16 Transformer Engine picks flash-attn 2 where it can, as on a GPU before Hopper."""
    from transformer_engine.pytorch import DotProductAttention

    start, stop = 24, 96
    cu_q, cu_k, keys = case.segments(start, stop)
    qkv = make_qkv(KV_HEADS, torch.bfloat16)
    q, k, v = qkv[0][start:stop], qkv[1][keys], qkv[2][keys]
    CALLS.clear()
    out = DotProductAttention(HEADS, HEAD_DIM, num_gqa_groups=KV_HEADS)(
        *(x.clone() for x in (q, k, v)),
        qkv_format="thd",
        attn_mask_type="padding_causal_bottom_right",
        window_size=case.window_size,
        cu_seqlens_q=cu_q,
        cu_seqlens_kv=cu_k,
        max_seqlen_q=SEQ_LENGTH,
        max_seqlen_kv=SEQ_LENGTH,
    )
    out.float().square().sum().backward()
    assert CALLS["flash_forward"] == 1 and CALLS["flash_backward"] == 1
    expected = dense_attention(*(x.float() for x in (q, k, v)), case.dense()[start:stop, keys])
    torch.testing.assert_close(out.float(), expected.flatten(1), rtol=2e-2, atol=2e-2)
