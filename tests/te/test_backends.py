"""The package's backends on the stand-ins: numerics, devices, nothing waits for the device."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import CASES, SEQ_LENGTH, Case, dense_attention
from test_kernel_interfaces import HEAD_DIM, HEADS, PARTS, make_qkv, run

from megatron_skyladder.backends import BACKENDS, make_backend
from megatron_skyladder.segments import Segments

pytestmark = pytest.mark.te
HERE = Path(__file__).resolve().parent
KERNEL_BACKENDS = ["te", "varlen", "flash"]


def model_config(kv_heads: int):
    """The configuration of a model as small as the tensors here."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        num_query_groups=kv_heads,
        attention_dropout=0.0,
    )


def build(name: str, kv_heads: int) -> torch.nn.Module:
    return make_backend(
        name,
        config=model_config(kv_heads),
        layer_number=1,
        softmax_scale=HEAD_DIM**-0.5,
        pg_collection=types.SimpleNamespace(tp=None, cp=None, hcp=None),
    )


def segments(cu_q, cu_k, max_q: int, max_k: int, window_size: tuple[int, int]) -> Segments:
    """Wrap offsets as the attention module does: one array where queries and keys are the same."""
    host_q = cu_q.numpy()
    return Segments(
        cu_seqlens_q=host_q,
        cu_seqlens_k=host_q if np.array_equal(host_q, cu_k.numpy()) else cu_k.numpy(),
        max_seqlen_q=max_q,
        max_seqlen_k=max_k,
        sliding_window=None if window_size[0] < 0 else window_size[0] + 1,
        grid=None,
        device=torch.device("cpu"),
    )


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


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("name", KERNEL_BACKENDS)
def test_bf16_is_as_exact_as_plain_attention(name: str, case: Case) -> None:
    """The error against fp32 is at most twice that of dense attention in bf16."""
    cu, _, _ = case.segments()
    longest = int(cu.diff().max())
    exact = [x.detach() for x in make_qkv(2)]
    half = [x.bfloat16() for x in exact]
    expected = dense_attention(*(x.float() for x in half), case.dense())
    plain = dense_attention(*half, case.dense()).float()
    out = build(name, 2)(*half, segments(cu, cu, longest, longest, case.window_size))
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).abs().max() <= 2 * (plain - expected).abs().max()


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


class NoLookAtTheDevice(torch.overrides.TorchFunctionMode):
    """Fail where a tensor's value is asked for, as on a GPU it would be waited for.

    Kernels run inside of one torch function, where no mode is asked: only Python above them is
    watched, such as Transformer Engine's.
    """

    NAMES = ("item", "tolist", "cpu", "numpy", "nonzero", "unique", "masked_select", "__bool__",
             "__int__", "__float__", "__index__")  # fmt: skip
    FORBIDDEN = frozenset(getattr(torch.Tensor, name) for name in NAMES)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in self.FORBIDDEN, f"{func.__name__} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", KERNEL_BACKENDS)
def test_no_value_is_asked_for(name: str) -> None:
    """In bf16, where Transformer Engine goes to flash-attn as it does on a GPU."""
    case = CASES[5]
    cu_q, cu_k, keys = case.segments(24, 72)
    offsets = segments(cu_q, cu_k, SEQ_LENGTH, SEQ_LENGTH, case.window_size)
    qkv = make_qkv(2, torch.bfloat16)
    backend = build(name, 2)
    with NoLookAtTheDevice():
        out = backend(qkv[0][24:72], qkv[1][keys], qkv[2][keys], offsets)
        out.backward(torch.ones_like(out))


def test_the_watch_notices():
    with NoLookAtTheDevice(), pytest.raises(AssertionError, match="item waits for the device"):
        torch.ones(1).item()
