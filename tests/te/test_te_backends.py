"""The package's backends on the stubs: numerics, devices, nothing waits for the device."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from cases import CASES, SEQ_LENGTH, Case, dense_attention
from checks import (
    HEAD_DIM,
    HEADS,
    PARTS,
    ROW,
    attend_without_a_look,
    build,
    check_bf16,
    make_attention,
    make_qkv,
    model_config,
    no_look_at_the_device,
    run,
    segments,
)

from megatron_skyladder.attention.backends import BACKENDS, choose, choose_backends
from megatron_skyladder.attention.segments import Rows, grid_segments
from megatron_skyladder.cpu import engine as cpu_engine
from megatron_skyladder.ladder import clock
from megatron_skyladder.ladder.fragments import dense_mask

pytestmark = pytest.mark.te
HERE = Path(__file__).resolve().parent
KERNEL_BACKENDS = ["te", "varlen", "flash"]


def test_every_backend_is_tried():
    """FlashAttention 3 and 4 have no stub; tests/unit checks what they are called with."""
    assert {*KERNEL_BACKENDS, "sdpa", "fa3", "fa4"} == set(BACKENDS)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("name", [*KERNEL_BACKENDS, "sdpa"])
def test_equals_the_dense_oracle(name: str, case: Case, part: tuple[int, int]) -> None:
    def attend(q, k, v, *offsets):
        cu_q, cu_k, _, _, window = offsets
        return build(name, k.shape[1])(q, k, v, segments(cu_q, cu_k, window))

    for kv_heads, pad in ((HEADS, 0), (2, 5)):
        got, expected = run(attend, case, part, kv_heads, pad)
        for x, y in zip(got, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("name", KERNEL_BACKENDS)
def test_bf16_is_as_exact_as_plain_attention(name: str, case: Case, part: tuple[int, int]) -> None:
    check_bf16(name, case, part, "cpu")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_stretched_case_is_the_same_mask(case: Case) -> None:
    """tests/gpu runs rows longer than a kernel's tile."""
    assert torch.equal(case.stretched(3).dense()[::3, ::3], case.dense())


def test_auto_takes_stocks_call_at_the_full_window(monkeypatch) -> None:
    """With the stubs' flash-attn beside it; tests/unit has the whole table."""
    monkeypatch.setattr(cpu_engine, "is_installed", lambda: False)
    monkeypatch.setattr(cpu_engine, "is_requested", lambda: False)
    choose._choose.cache_clear()
    assert [choice.name for choice in choose_backends("auto")] == ["te", "flash", "flash"]
    choose._choose.cache_clear()


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("num_sequences", [1, 3])
@pytest.mark.parametrize("window", [24, 40, 96])
@pytest.mark.parametrize("name", [*KERNEL_BACKENDS, "sdpa"])
def test_windows_and_the_full_window_equal_the_dense_oracle(
    name: str, window: int, num_sequences: int
) -> None:
    """[S, b, h, d] as the model hands them over: 40 leaves a shorter last window."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(SEQ_LENGTH, num_sequences, heads, HEAD_DIM) for heads in (HEADS, 2, 2)]
    qkv = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    grid = grid_segments(Rows(SEQ_LENGTH, num_sequences, window, False, torch.device("cpu")))
    backend = build(name, 2)
    attend = backend.attend_full if window == SEQ_LENGTH else backend.attend_windows
    got = attend(*qkv, grid)
    mask = torch.from_numpy(dense_mask(SEQ_LENGTH, window_len=window))
    parts = [
        dense_attention(*(x[:, index] for x in qkv), mask).flatten(1)
        for index in range(num_sequences)
    ]
    expected = torch.stack(parts, dim=1)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=5e-6)
    direction = torch.randn(expected.shape, generator=generator)
    for x, y in zip(
        torch.autograd.grad(got, qkv, direction),
        torch.autograd.grad(expected, qkv, direction),
        strict=True,
    ):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=5e-6)


@pytest.mark.usefixtures("exact")
def test_the_full_window_is_stocks_call_argument_for_argument(monkeypatch) -> None:
    """What Transformer Engine gets from a stock layer's core attention, and from ours."""
    from megatron.core.extensions.transformer_engine import TEDotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from transformer_engine.pytorch import DotProductAttention

    built, called = [], []
    init, forward = DotProductAttention.__init__, DotProductAttention.forward

    def recorded_init(self, *args, **kwargs):
        built.append((args, kwargs))
        init(self, *args, **kwargs)

    def recorded_forward(self, *args, **kwargs):
        called.append((self.window_size, self.qkv_format, args, kwargs))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(DotProductAttention, "__init__", recorded_init)
    monkeypatch.setattr(DotProductAttention, "forward", recorded_forward)
    groups = types.SimpleNamespace(tp=None, cp=None, hcp=None)
    stock = TEDotProductAttention(
        config=model_config(2),
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        cp_comm_type=None,
        softmax_scale=None,
        pg_collection=groups,
    )
    ours = make_attention("te", "local")
    shapes = [(ROW, 2, heads, HEAD_DIM) for heads in (HEADS, 2, 2)]
    qkv = [torch.randn(shape) for shape in shapes]
    expected = stock(*qkv, None, attn_mask_type=AttnMaskType.causal)
    with clock.current().override(ROW):
        got = ours(*qkv, None, attn_mask_type=AttnMaskType.causal)
    assert torch.equal(got, expected)
    assert len(called) == 2 and built[0][0] == built[1][0] == ()
    assert built[0][1] == built[1][1]
    (*theirs, their_args, their_kwargs), (*mine, my_args, my_kwargs) = called
    assert theirs == mine and their_kwargs == my_kwargs
    assert all(x is y for x, y in zip(their_args, my_args, strict=True))


def test_deterministic_mode_reaches_the_kernels(monkeypatch) -> None:
    """flash is given it, varlen keeps to FlashAttention, and for te Megatron wants TE set up."""
    import flash_attn
    import torch.nn.attention.varlen

    def record(*_, deterministic=None, window_size, scale=None, enable_gqa=None, **__):
        return deterministic, torch._C._get_cudnn_sdp_enabled()

    monkeypatch.setattr(flash_attn, "flash_attn_varlen_func", record)
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", record)
    cu, _, _ = CASES[0].segments()
    offsets = segments(cu, cu, (-1, 0))
    expected = {"flash": [(False, True), (True, True)], "varlen": [(None, False)] * 2}
    for name, answers in expected.items():
        for mode, answer in zip((False, True), answers, strict=True):
            assert build(name, 2, deterministic_mode=mode)(*make_qkv(2), offsets) == answer
    with pytest.raises(RuntimeError, match="NVTE_ALLOW_NONDETERMINISTIC_ALGO"):
        build("te", 2, deterministic_mode=True)


def test_fake_cuda_tensors_go_through() -> None:
    """No device is mixed with the host, and no value of the device is waited for."""
    answer = subprocess.run(
        [sys.executable, str(HERE / "fake_cuda.py"), "varlen", "flash", "sdpa"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parents[1]}"},
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    for name in ("varlen", "flash", "sdpa"):
        assert f"{name}: mask sliding, 2 rows, documents True" in answer.stderr


@pytest.mark.parametrize("name", KERNEL_BACKENDS)
def test_no_value_is_asked_for(name: str) -> None:
    attend_without_a_look(name)


def test_no_value_is_asked_for_where_keys_travel(pool, tmp_path) -> None:
    pool.run(
        "checks:exchange_without_a_look",
        num_processes=2,
        folder=tmp_path,
        arguments={"names": KERNEL_BACKENDS},
    )


class Peeks(torch.autograd.Function):
    """Looks at the device in the backward pass."""

    @staticmethod
    def forward(ctx, x, look):
        ctx.look = look
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        getattr(grad.sum(), ctx.look)()
        return grad, None


@pytest.mark.parametrize("look", ["item", "cpu", "tolist", "__bool__"])
def test_the_watch_notices_in_both_passes(look) -> None:
    x = torch.ones(1, requires_grad=True)
    with no_look_at_the_device():
        with pytest.raises(AssertionError, match=f"{look} waits for the device"):
            getattr(x, look)()
        with pytest.raises(AssertionError, match=f"{look} waits for the device"):
            Peeks.apply(x, look).backward()
    assert x.item() == 1
