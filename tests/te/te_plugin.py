"""GEMM and RMSNorm for Transformer Engine on the CPU; it loads this itself (NVTE_PLUGIN=te_plugin).

With these, every layer of Megatron's full Transformer Engine spec runs without FP8, in any
floating-point type. Signatures are those of transformer_engine_torch 2.20.
"""

from __future__ import annotations

from typing import Any

import torch
from reference_kernels import CALLS, require


def load_plugins() -> None:
    """Replace functions of the compiled module; Transformer Engine calls it on import."""
    import transformer_engine_torch as compiled  # type: ignore[import-not-found]

    for function in (generic_gemm, rmsnorm_fwd, rmsnorm_bwd, get_fused_attn_backend):
        setattr(compiled, function.__name__, function)


def generic_gemm(
    a: Any, trans_a: bool, b: Any, trans_b: bool, out: Any, quantizer: Any, output_dtype: Any,
    bias: Any, bias_type: Any, gelu: bool, gelu_in: Any, grad: bool, workspace: Any,
    workspace_size: int, accumulate: bool, use_split_accumulator: bool, comm_overlap: Any = None,
    comm_type: Any = None, extra_output: Any = None, bulk_overlap: bool = False,
    alpha: float = 1.0, beta: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:  # fmt: skip
    """Return alpha * op(b) @ op(a) + bias, and the bias gradient; cuBLAS counts columns first."""
    CALLS["gemm"] += 1
    require(
        quantizer is None and not gelu and comm_overlap is None and extra_output is None,
        "FP8, fused GELU and overlapped communication have no stub",
    )
    flat_a, flat_b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    left, right = flat_b.mT if trans_b else flat_b, flat_a.mT if trans_a else flat_a
    product = alpha * (left @ right)
    if not trans_b:
        product = product.reshape(*b.shape[:-1], -1)
    grad_bias = flat_b.sum(0) if grad and bias is not None else None
    if bias is not None and not grad:
        product = product + bias
    if out is None:
        return product.to(_torch_dtype(output_dtype, b.dtype)), grad_bias, None, None
    if accumulate:
        out.mul_(1.0 if beta is None else beta).add_(product)
    else:
        out.copy_(product.reshape(out.shape))
    return out, grad_bias, None, None


def rmsnorm_fwd(
    x: Any, weight: Any, eps: float, out: Any, quantizer: Any, output_dtype: Any,
    sm_margin: int, zero_centered_gamma: bool,
) -> tuple[torch.Tensor, None, torch.Tensor]:  # fmt: skip
    """Return the normalised input, no mean, and the inverse RMS that the backward pass needs."""
    CALLS["rmsnorm_forward"] += 1
    require(quantizer is None, "FP8 has no stub")
    inverse_rms = (x.float().square().mean(-1) + eps).rsqrt()
    y = x.float() * inverse_rms[..., None] * _gain(weight, zero_centered_gamma)
    y = y.to(_torch_dtype(output_dtype, x.dtype)) if out is None else out.copy_(y)
    return y, None, inverse_rms


def rmsnorm_bwd(
    grad: Any, x: Any, inverse_rms: Any, weight: Any, sm_margin: int, zero_centered_gamma: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of the input and of the weight."""
    CALLS["rmsnorm_backward"] += 1
    grad, scale = grad.reshape(x.shape).float(), inverse_rms[..., None]
    normal, weighted = x.float() * scale, grad * _gain(weight, zero_centered_gamma)
    grad_x = scale * (weighted - normal * (weighted * normal).mean(-1, keepdim=True))
    grad_weight = (grad * normal).reshape(-1, x.shape[-1]).sum(0)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)


def get_fused_attn_backend(*_: Any) -> tuple[int, str]:
    """Say that cuDNN has no attention for this; the compiled function would ask the driver."""
    import transformer_engine_torch as compiled

    return int(compiled.NVTE_Fused_Attn_Backend.NVTE_No_Backend), "no cuDNN on the CPU"


def _gain(weight: torch.Tensor, zero_centered: bool) -> torch.Tensor:
    return weight.float() + 1 if zero_centered else weight.float()


def _torch_dtype(given: Any, default: torch.dtype) -> torch.dtype:
    """Translate Transformer Engine's enum; None is the default."""
    if given is None or isinstance(given, torch.dtype):
        return given or default
    import transformer_engine_torch as compiled

    enum = compiled.DType
    dtypes = {enum.kFloat32: torch.float32, enum.kBFloat16: torch.bfloat16}
    return {int(key): value for key, value in dtypes.items()}[int(given)]
