"""CPU stubs for the compiled kernels under Transformer Engine, torch's varlen and flash-attn.

What runs on top of them is the real Python path of Megatron and of those packages, with their
real checks of arguments. What they replace is CUDA code, so a test that passes here says nothing
about a kernel's numerics, speed or memory. Nothing in this folder is a GPU test.
"""

from __future__ import annotations

import importlib.machinery
import os
import sys
import types
from typing import Any

import torch
from reference_kernels import (
    CALLS,
    attention_backward,
    attention_forward,
    bshd_to_thd,
    require,
    thd_to_bshd,
)
from torch.overrides import TorchFunctionMode


def install() -> None:
    """Install the CPU engine and all stubs, before Megatron or TE is imported."""
    if "transformer_engine" in sys.modules:
        raise RuntimeError("install the stubs before transformer_engine is imported")
    os.environ["NVTE_PLUGIN"] = "te_plugin"  # GEMM and RMSNorm, loaded by Transformer Engine
    os.environ["NVTE_MASKED_SOFTMAX_FUSION"] = "0"
    stub_flash_attn_kernels()
    import transformer_engine.pytorch  # noqa: F401

    # Megatron then takes torch's AdamW and its own gradient norm: those kernels have no stub.
    sys.modules["transformer_engine.pytorch.optimizers"] = None  # type: ignore[assignment]
    from megatron_skyladder.cpu import engine as cpu_engine

    cpu_engine.install()
    register_varlen()
    register_flash_attn()
    register_transformer_engine()


# ---------------------------------------------------------------- torch.nn.attention.varlen


def register_varlen() -> None:
    """Give torch's own variable-length attention a CPU kernel; its autograd stays in use."""
    import torch.nn.attention.varlen  # defines the ops

    def forward(
        q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int,
        is_causal: bool = False, scale: float | None = None,
        window_size: list[int] | None = None, *_: Any, **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        CALLS["varlen_forward"] += 1
        window = _window(is_causal, window_size)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        out, lse = attention_forward(q, k, v, cu_q, cu_k, max_q, max_k, scale, window)
        return out, lse, torch.zeros(2, dtype=torch.uint64)

    def backward(
        grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, cu_q: Any, cu_k: Any, max_q: int,
        max_k: int, is_causal: bool, rng_state: Any, scale: float | None = None,
        window_size: list[int] | None = None, *_: Any, **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        CALLS["varlen_backward"] += 1
        window = _window(is_causal, window_size)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return attention_backward(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, scale, window)

    torch.library.register_kernel("torch_attn::_varlen_attn", "cpu", forward)
    torch.library.register_kernel("torch_attn::_varlen_attn_backward", "cpu", backward)


def _window(causal: bool, window_size: list[int] | tuple[int, int] | None) -> tuple[int, int]:
    left, right = window_size or (-1, -1)
    return left, 0 if causal else right


# ---------------------------------------------------------------- flash-attn 2


def stub_flash_attn_kernels() -> None:
    """Put a module in the place of flash-attn's compiled one, which its Python imports."""

    def varlen_fwd(
        q: Any, k: Any, v: Any, out: Any, cu_q: Any, cu_k: Any, seqused_k: Any, leftpad_k: Any,
        block_table: Any, alibi_slopes: Any, max_q: int, max_k: int, dropout: float, scale: float,
        zero_tensors: bool, causal: bool, left: int, right: int, softcap: float, *_: Any,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        CALLS["flash_forward"] += 1
        require(dropout == 0.0 and softcap == 0.0 and alibi_slopes is None, "not in the stub")
        if max_q == 1 and right < 0 and left < 0 and q.shape[1] > k.shape[1]:
            # the kernel then treats each segment as exactly one query
            require(cu_q.numel() - 1 == q.shape[0], "shape is invalid: one query per segment")
        window = _window(causal, (left, right))
        out, lse = attention_forward(q, k, v, cu_q, cu_k, max_q, max_k, scale, window)
        return out, lse, torch.empty(0, dtype=q.dtype), torch.zeros(2, dtype=torch.int64)

    def varlen_bwd(
        grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, dq: Any, dk: Any, dv: Any,
        cu_q: Any, cu_k: Any, alibi_slopes: Any, max_q: int, max_k: int, dropout: float,
        scale: float, zero_tensors: bool, causal: bool, left: int, right: int, *_: Any,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        CALLS["flash_backward"] += 1
        window = _window(causal, (left, right))
        grads = attention_backward(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, scale, window)
        for target, value in zip((dq, dk, dv), grads, strict=True):
            target.copy_(value)
        return dq, dk, dv, torch.empty_like(lse)

    def fwd(
        q: Any, k: Any, v: Any, out: Any, alibi_slopes: Any, dropout: float, scale: float,
        causal: bool, left: int, right: int, softcap: float, *_: Any,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        """The same on [B, S, H, D]: every sequence is a segment."""
        CALLS["flash_forward"] += 1
        require(dropout == 0.0 and softcap == 0.0 and alibi_slopes is None, "not in the stub")
        packed = (x.flatten(0, 1) for x in (q, k, v))
        offsets = _equal_offsets(q), _equal_offsets(k)
        lengths = q.shape[1], k.shape[1]
        window = _window(causal, (left, right))
        out, lse = attention_forward(*packed, *offsets, *lengths, scale, window)
        lse = lse.unflatten(1, (q.shape[0], -1)).transpose(0, 1).contiguous()
        rng_state = torch.zeros(2, dtype=torch.int64)
        return out.view(q.shape), lse, torch.empty(0, dtype=q.dtype), rng_state

    def bwd(
        grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, dq: Any, dk: Any, dv: Any,
        alibi_slopes: Any, dropout: float, scale: float, causal: bool, left: int, right: int,
        *_: Any,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        CALLS["flash_backward"] += 1
        packed = (x.flatten(0, 1) for x in (grad, q, k, v, out))
        offsets = _equal_offsets(q), _equal_offsets(k)
        lengths = q.shape[1], k.shape[1]
        window = _window(causal, (left, right))
        joined = lse.transpose(0, 1).flatten(1)
        grads = attention_backward(*packed, joined, *offsets, *lengths, scale, window)
        for target, value in zip((dq, dk, dv), grads, strict=True):
            target.copy_(value.view(target.shape))
        return dq, dk, dv, torch.empty_like(lse)

    module: Any = types.ModuleType("flash_attn_2_cuda")
    module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, loader=None)
    module.varlen_fwd, module.varlen_bwd = varlen_fwd, varlen_bwd
    module.fwd, module.bwd = fwd, bwd
    sys.modules[module.__name__] = module


def _equal_offsets(tensor: torch.Tensor) -> torch.Tensor:
    """[B, S, ...] -> int32 [B + 1]: where the sequences begin, one after the other."""
    batch, length = tensor.shape[:2]
    return torch.arange(0, (batch + 1) * length, length, dtype=torch.int32)


def register_flash_attn() -> None:
    """Let flash-attn's custom ops, made for CUDA, run their own Python on the CPU too."""
    from flash_attn import flash_attn_interface as interface

    for op in (
        interface._flash_attn_forward,
        interface._flash_attn_backward,
        interface._flash_attn_varlen_forward,
        interface._flash_attn_varlen_backward,
    ):
        op.register_kernel("cpu", op._init_fn)


# ---------------------------------------------------------------- Transformer Engine


_IS_CUDA = torch.Tensor.is_cuda  # a descriptor; the mode below sees its bound __get__


class _IsCuda(TorchFunctionMode):
    """Answer yes where Transformer Engine asks a tensor whether it is on a GPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__self__", None) is _IS_CUDA:
            caller = sys._getframe(1)
            while caller.f_code.co_name == "__torch_function__" and caller.f_back:  # other modes
                caller = caller.f_back
            if caller.f_globals.get("__name__", "").startswith("transformer_engine"):
                return True
        return func(*args, **(kwargs or {}))


def register_transformer_engine() -> None:
    """Register the copies between packed and padded layouts, and answer is_cuda."""
    torch.library.register_kernel("te_attention::convert_thd_to_bshd", "cpu", thd_to_bshd)
    torch.library.register_kernel("te_attention::convert_bshd_to_thd", "cpu", bshd_to_thd)
    _IsCuda().__enter__()
