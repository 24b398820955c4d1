"""Run the attention on fake CUDA tensors: no data, no driver, but PyTorch's rules about devices.

    python tests/te/fake_cuda.py varlen flash sdpa

A fake tensor has a shape, a type and a device. PyTorch refuses to mix devices, to read a value
from the device (.item(), .tolist(), a branch on a tensor) and to make a shape that depends on
values: exactly what would be an error or a synchronisation on a GPU. The kernels' own shape
functions answer for them. Forward only: the autograd engine asks for a driver.

Runs in a process of its own, without the CPU engine, which would turn the device into the CPU.
"""

from __future__ import annotations

import itertools
import logging
import sys

import stubs
import torch
from checks import call_attention, document_mask, make_attention
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

logger = logging.getLogger("fake_cuda")


class FakeDevice(FakeTensorMode):
    """Fakes what is on the device; what is on the host is real, so its values can be read."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        device = torch.device((kwargs or {}).get("device") or "meta").type
        on_device = any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs)))
        if on_device and device == "cpu":
            raise AssertionError(f"{func} copies from the device to the host, which waits for it")
        if not on_device and device != "cuda":
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


def check_the_fake_device() -> None:
    """See that it refuses what it is here to refuse."""
    on_device, host = torch.zeros(4, device="cuda"), torch.zeros(4)
    for mistake in (
        on_device.sum().item,
        on_device.cpu,
        on_device.tolist,
        lambda: on_device + host,
    ):
        try:
            mistake()
        except (RuntimeError, AssertionError, NotImplementedError):
            continue
        raise AssertionError(f"{mistake} went through")


def main(backends: list[str]) -> None:
    """Check every combination; the first mistake ends the process with its traceback."""
    stubs.stub_flash_attn_kernels()
    torch.cuda.get_device_capability = lambda *_: (8, 0)  # type: ignore[assignment]
    torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[assignment,method-assign]
    with FakeDevice(allow_non_fake_inputs=True):
        check_the_fake_device()
        for case in itertools.product(backends, ("local", "sliding"), (1, 2), (False, True)):
            backend, mask, num_rows, documents = case
            attention = make_attention(backend, mask)
            call_attention(attention, num_rows, document_mask(num_rows) if documents else None)
            logger.info("%s: mask %s, %d rows, documents %s", *case)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(sys.argv[1:])
