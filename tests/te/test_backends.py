"""The package's backends on the stand-ins: numerics, devices, nothing waits for the device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import CASES, Case
from checks import (
    HEADS,
    PARTS,
    attend_without_a_look,
    build,
    check_bf16,
    make_qkv,
    no_look_at_the_device,
    run,
    segments,
)

from megatron_skyladder.attention import backends
from megatron_skyladder.attention.backends import BACKENDS, choose_backend
from megatron_skyladder.cpu import engine as cpu_engine

pytestmark = pytest.mark.te
HERE = Path(__file__).resolve().parent
KERNEL_BACKENDS = ["te", "varlen", "flash"]


def test_every_backend_is_tried():
    assert {*KERNEL_BACKENDS, "sdpa"} == set(BACKENDS)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("name", [*KERNEL_BACKENDS, "sdpa"])
def test_equals_the_dense_oracle(name: str, case: Case, part: tuple[int, int]) -> None:
    def attend(q, k, v, *offsets):
        return build(name, k.shape[1])(q, k, v, segments(*offsets))

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


def test_auto_takes_transformer_engine_where_it_is(monkeypatch) -> None:
    monkeypatch.setattr(cpu_engine, "is_installed", lambda: False)
    monkeypatch.setattr(cpu_engine, "is_requested", lambda: False)
    backends._best_backend.cache_clear()
    assert choose_backend("auto") == ("te", "te is installed")
    backends._best_backend.cache_clear()


def test_deterministic_mode_reaches_the_kernels(monkeypatch) -> None:
    """flash is told, varlen keeps to FlashAttention, and for te Megatron wants TE to be told."""
    import flash_attn
    import torch.nn.attention.varlen

    def record(*_, deterministic=None, window_size, scale=None, enable_gqa=None, **__):
        return deterministic, torch._C._get_cudnn_sdp_enabled()

    monkeypatch.setattr(flash_attn, "flash_attn_varlen_func", record)
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", record)
    cu, _, _ = CASES[0].segments()
    offsets = segments(cu, cu, 96, 96, (-1, 0))
    expected = {"flash": [(False, True), (True, True)], "varlen": [(None, True), (None, False)]}
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
