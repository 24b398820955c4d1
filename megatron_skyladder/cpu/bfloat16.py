"""bfloat16 products on processors that cannot multiply it, such as x86 without AVX-512.

There torch multiplies bfloat16 in loops of its own, 8 to 60 times slower than float32. For
the CPU engine and for evaluation: the factors are widened, multiplied in float32 and the result is
rounded once, which is also what processors do that have an instruction for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

PRODUCTS = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "_scaled_dot_product_flash_attention_for_cpu_backward",  # its forward is as fast as float32
)

_installed: list[torch.library.Library] = []  # a library that is collected takes its kernels along


def install() -> None:
    """Replace torch's kernels of these products in this process, where they are slow."""
    is_fast = torch.backends.mkldnn.is_available() and (
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    if _installed or is_fast:
        return
    if not hasattr(torch.library, "get_kernel"):  # before torch 2.9; slow, and right
        return
    library = torch.library.Library("aten", "IMPL")
    for name in PRODUCTS:
        kernel = torch.library.get_kernel(f"aten::{name}", "CPU")
        library.impl(name, _widening(kernel), "CPU", with_keyset=True)
    _installed.append(library)


def _widening(kernel: Any) -> Callable[..., Any]:
    def product(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        factors = [value.dtype for value in args[:3] if isinstance(value, torch.Tensor)]
        if set(factors) != {torch.bfloat16}:  # torch refuses a mixture, so nothing hides one
            return kernel.call_boxed(keyset, *args, **kwargs)
        wide = [_widened(value) for value in args]
        found = kernel.call_boxed(
            keyset, *wide, **{name: _widened(value) for name, value in kwargs.items()}
        )
        if isinstance(found, torch.Tensor):
            return found.bfloat16()
        return tuple(tensor.bfloat16() for tensor in found)

    return product


def _widened(value: Any) -> Any:
    is_narrow = isinstance(value, torch.Tensor) and value.dtype is torch.bfloat16
    return value.float() if is_narrow else value
