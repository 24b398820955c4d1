"""Which of its attentions Transformer Engine takes for our calls, device by device; never unfused.

TE's own selection (get_attention_backend, Python) is asked, with the parameters that it makes of
the calls which our backend really makes: they are recorded on the stubs. Faked are the compute
capability and one compiled function, whether cuDNN can run a call: from TE 2.20 on it builds cuDNN
graphs and needs a device. Its place takes the table that the function was before
(``nvte_get_fused_attn_backend`` in common/fused_attn/fused_attn.cpp, commit d0067d0 of August
2026), for 16 bits, no bias, no dropout and cuDNN 9.18.1 or later (with a sink, 9.13 or later). What
this cannot show: that cuDNN agrees with that table.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import Case
from checks import HEAD_DIM, HEADS, build, make_qkv, segments

from megatron_skyladder.attention.backends import choose, facts
from megatron_skyladder.attention.segments import Rows, grid_segments
from megatron_skyladder.cpu import engine as cpu_engine
from megatron_skyladder.ladder.kernels import Call, TransformerEngine

pytestmark = pytest.mark.te
CAPABILITIES = [(8, 0), (8, 9), (9, 0), (10, 0)]
CUDNN = "cuDNN (FusedAttention)"
FLASH = "FlashAttention 2"


@pytest.fixture
def utils() -> Any:
    from transformer_engine.pytorch.attention.dot_product_attention import utils

    return utils


def cudnn_runs(asked: Any, capability: tuple[int, int], cudnn: tuple[int, int, int]) -> bool:
    """The table, cuDNN 9.13 or later, in 16 bits, without bias and dropout."""
    import transformer_engine_torch as tex

    mask, layout = tex.NVTE_Mask_Type, str(asked.qkv_layout)
    architecture = 10 * capability[0] + capability[1]
    packed = "THD" in layout
    sizes = (asked.head_dim_qk, asked.head_dim_v)
    sink = asked.softmax_type != tex.NVTE_Softmax_Type.NVTE_VANILLA_SOFTMAX
    if sink and cudnn < (9, 13, 1):
        return False
    large = (
        (max(sizes) <= 256 and capability[0] == 9 and sizes[0] == sizes[1])
        or (sizes == (192, 128) and capability[0] >= 10)
        or (sizes == (256, 256) and capability[0] == 10 and not sink and cudnn >= (9, 25, 0))
    )
    if any(size % 8 for size in sizes) or (max(sizes) > 128 and not large):
        return False
    padded = asked.attn_mask_type in (
        mask.NVTE_PADDING_CAUSAL_MASK,
        mask.NVTE_PADDING_CAUSAL_BOTTOM_RIGHT_MASK,
    )
    if packed and (architecture < 90 or not padded):
        return False
    if asked.attn_mask_type == mask.NVTE_PADDING_CAUSAL_BOTTOM_RIGHT_MASK:
        return bool(asked.max_seqlen_q <= asked.max_seqlen_kv)
    slides = asked.window_size_left >= 0
    return bool(not slides or asked.max_seqlen_q <= asked.max_seqlen_kv)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, utils: Any) -> Iterator[Any]:
    """A function that gives the process a device, and TE a flash-attn or none."""
    import transformer_engine_torch as tex

    def become(
        capability: tuple[int, int],
        *,
        flash_attn: bool = True,
        cudnn: tuple[int, int, int] = (9, 18, 1),
    ) -> None:
        backends = tex.NVTE_Fused_Attn_Backend

        def fused(asked: Any) -> tuple[int, str]:
            if cudnn_runs(asked, capability, cudnn):
                return int(backends.NVTE_F16_arbitrary_seqlen), ""
            return int(backends.NVTE_No_Backend), "not in the table"

        monkeypatch.setattr(utils, "get_device_compute_capability", lambda: capability)
        monkeypatch.setattr(utils, "get_cudnn_version", lambda: cudnn)
        monkeypatch.setattr(utils.tex, "get_fused_attn_backend", fused)
        monkeypatch.setattr(utils.FlashAttentionUtils, "is_installed", flash_attn)
        monkeypatch.setattr(choose, "_capability", lambda: capability)
        choose._choose.cache_clear()

    monkeypatch.setattr(cpu_engine, "is_installed", lambda: False)
    monkeypatch.setattr(cpu_engine, "is_requested", lambda: False)
    yield become
    choose._choose.cache_clear()


# --- the parameters of our calls ----------------------------------------------------------------

DOCUMENTS = Case("", 36, (7, 40, 64, 95))
SLIDING = Case("", 20, (7, 60), sliding=True)


def attend(backend: Any, name: str, dtype: torch.dtype) -> None:
    """Make one kind of call, on 96 tokens of two sequences or one."""
    seq_length = 96
    if name in ("full", "windows"):
        window = seq_length if name == "full" else 32
        qkv = [x.detach()[:, None].repeat(1, 2, 1, 1) for x in make_qkv(2, dtype)]
        rows = grid_segments(Rows(seq_length, 2, window, False, torch.device("cpu")))
        (backend.attend_full if name == "full" else backend.attend_windows)(*qkv, rows)
        return
    case = SLIDING if "sliding" in name else DOCUMENTS
    start, stop = (48, 72) if "other ranks" in name else (0, seq_length)
    cu_q, cu_k, keys = case.segments(start, stop)
    qkv = make_qkv(2, dtype)
    tensors = qkv[0][start:stop].clone(), qkv[1][keys].clone(), qkv[2][keys].clone()
    backend(*tensors, segments(cu_q, cu_k, case.window_size))


CALLS = [
    "full",
    "windows",
    "documents",
    "sliding",
    "documents, other ranks",
    "sliding, other ranks",
]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch, utils: Any) -> Any:
    """A function that returns the parameters TE makes of a call of ours."""
    select = utils.get_attention_backend

    def record(name: str, dtype: torch.dtype, softmax_type: str = "vanilla") -> Any:
        seen: list[Any] = []

        def selecting(params: Any) -> Any:
            seen.append(params)
            return select(params)

        from transformer_engine.pytorch.attention.dot_product_attention import (
            dot_product_attention as module,
        )

        with monkeypatch.context() as patch:
            patch.setitem(module._attention_backends, "attention_params", None)
            patch.setattr(utils, "get_attention_backend", selecting)
            backend = build("te", 2, softmax_type=softmax_type)
            if softmax_type != "vanilla":
                backend.use_sink(lambda: torch.zeros(HEADS))
            attend(backend, name, dtype)
        return seen[-1]

    return record


def enlarged(params: Any, size: int, *, deterministic: bool) -> Any:
    """Give the recorded parameters a real model's sizes; what was chosen by us stays."""
    scale = 4096 // 96
    changed = {
        "num_heads": params.num_heads // HEADS * 32,
        "num_gqa_groups": params.num_gqa_groups // 2 * 4,
        "head_dim_qk": size,
        "head_dim_v": size,
        "max_seqlen_q": params.max_seqlen_q * scale,
        "max_seqlen_kv": params.max_seqlen_kv * scale,
        "num_tokens_q": params.num_tokens_q * scale,
        "num_tokens_kv": params.num_tokens_kv * scale,
        "deterministic": deterministic,
    }
    assert params.head_dim_qk == HEAD_DIM
    copy = type(params)(**{**vars(params), **changed})
    return copy


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_what_transformer_engine_takes(
    device: Any, utils: Any, recorded: Any, call: str, deterministic: bool, size: int, dtype: Any
) -> None:
    """By hand: FlashAttention before Hopper, cuDNN from there on, but for packed calls in
    deterministic mode, whose workspace TE itself finds too large on Hopper."""
    params = enlarged(recorded(call, dtype), size, deterministic=deterministic)
    assert params.qkv_dtype == dtype and params.context_parallel is False
    expected = {(8, 0): FLASH, (8, 9): FLASH, (9, 0): CUDNN, (10, 0): CUDNN}
    packed = call not in ("full", "windows")
    for capability in CAPABILITIES:
        device(capability)
        found = facts._name(utils.get_attention_backend(params))
        too_large = (
            params.batch_size * params.num_heads * params.max_seqlen_q * params.max_seqlen_kv
            >= 1 << 30
        )
        flash_instead = packed and deterministic and capability == (9, 0) and too_large
        assert found.startswith(FLASH if flash_instead else expected[capability]), capability
        assert found != facts.UNFUSED


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_where_it_would_attend_unfused_we_do_not_take_it(
    device: Any, utils: Any, recorded: Any, capability: tuple[int, int], call: str
) -> None:
    """Without flash-attn packed calls have no fused kernel before Hopper, and are not made."""
    params = enlarged(recorded(call, torch.bfloat16), 64, deterministic=False)
    device(capability, flash_attn=False)
    found = facts._name(utils.get_attention_backend(params))
    packed = call not in ("full", "windows")
    unfused = packed and capability < (9, 0)
    assert (found == facts.UNFUSED) == unfused
    refused = choose.unfit("te", Call.PACKED if packed else Call.WINDOWS, deterministic=False)
    assert (refused is not None) == unfused


@pytest.mark.parametrize("softmax_type", ["off-by-one", "learnable"])
@pytest.mark.parametrize("call", CALLS)
def test_with_a_sink_we_take_it_just_where_it_has_a_fused_kernel(
    monkeypatch: pytest.MonkeyPatch,
    device: Any,
    utils: Any,
    recorded: Any,
    call: str,
    softmax_type: str,
) -> None:
    """FlashAttention has no sink there, so the rest would attend unfused, with all logits."""
    with monkeypatch.context() as patch:  # parameters are recorded where everything is taken
        patch.setattr(choose, "_capability", lambda: (9, 0))
        patch.setattr(choose, "_te", lambda: TransformerEngine((2, 20), (9, 26, 0)))
        choose._choose.cache_clear()
        recorded_params = recorded(call, torch.bfloat16, softmax_type)
    assert recorded_params.softmax_type == softmax_type
    kind = Call.PACKED if call not in ("full", "windows") else Call.WINDOWS
    taken = []
    for size in (64, 128, 256):
        for deterministic in (False, True):
            params = enlarged(recorded_params, size, deterministic=deterministic)
            for capability in [*CAPABILITIES, (12, 0)]:
                for cudnn in (
                    (9, 13, 0),
                    (9, 13, 1),
                    (9, 17, 1),
                    (9, 18, 0),
                    (9, 18, 1),
                    (9, 26, 0),
                ):
                    device(capability, cudnn=cudnn)
                    found = facts._name(utils.get_attention_backend(params))
                    why = choose.unfit(
                        "te",
                        kind,
                        deterministic=deterministic,
                        heads=choose.Heads(size, size),
                        softmax_type=softmax_type,
                    )
                    if capability == (12, 0) and cudnn < (9, 18, 1):
                        assert why is not None  # not in the table above
                        continue
                    at = (size, deterministic, capability, cudnn, found, why)
                    assert (found == CUDNN) == (why is None), at
                    taken.append(found == CUDNN)
    assert 0 < sum(taken) < len(taken)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_what_doctor_says(device: Any, capability: tuple[int, int]) -> None:
    device(capability)
    expected = FLASH if capability < (9, 0) else CUDNN
    for dtype in (torch.bfloat16, torch.float16):
        for size in (64, 128):
            found = facts.te_sub_backends((32, 4, size), qkv_dtype=dtype)
            assert found is not None
            assert set(found) == {"batched", "packed", "packed, other ranks"}
            assert all(name.startswith(expected) for name in found.values())
    device(capability, flash_attn=False)
    found = facts.te_sub_backends()
    assert found is not None and (found["packed"] == facts.UNFUSED) == (capability < (9, 0))
    assert found["batched"] == CUDNN
