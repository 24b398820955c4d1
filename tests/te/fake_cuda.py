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

import numpy as np
import stand_ins
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from megatron_skyladder.fragments import fragment_cu_seqlens, rows_cu_seqlens

logger = logging.getLogger("fake_cuda")
SEQ_LENGTH, HEADS, GROUPS, HEAD_DIM, WINDOW = 64, 4, 2, 16, 24


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


def make_attention(backend: str, mask: str) -> torch.nn.Module:
    """Build the core-attention module as a layer of a model would."""
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_skyladder import clock
    from megatron_skyladder.attention import SkyLadderAttention
    from megatron_skyladder.config import SkyLadderConfig
    from megatron_skyladder.schedules import WindowSchedule

    schedule = WindowSchedule(start_window=WINDOW, final_window=SEQ_LENGTH, alpha=1)
    config = SkyLadderConfig(
        schedule=schedule,
        seq_length=SEQ_LENGTH,
        step_samples=1,
        mask=mask,
        attention_backend=backend,
    )
    clock.install(config, lambda: 0)
    model = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        attention_dropout=0.0,
    )
    return SkyLadderAttention(
        model, layer_number=1, attn_mask_type=AttnMaskType.causal, attention_type="self"
    )


def document_mask(num_rows: int) -> torch.Tensor:
    """int32 cu_seqlens on the host, real, as the trainer hands them over."""
    ends = np.array([5, 40], np.int32)
    row = fragment_cu_seqlens(ends, seq_length=SEQ_LENGTH, window_len=WINDOW)
    return torch.from_numpy(rows_cu_seqlens([row] * num_rows))


def check(backend: str, mask: str, num_rows: int, documents: bool) -> None:
    """Call the module once on fake tensors and look at what comes back."""
    attention = make_attention(backend, mask)
    host_mask = document_mask(num_rows) if documents else None
    # as Megatron's: three views of one projection, only the last dimension dense
    mixed = torch.empty(
        SEQ_LENGTH, num_rows, HEADS + 2 * GROUPS, HEAD_DIM, dtype=torch.bfloat16, device="cuda"
    )
    query, key, value = mixed.split([HEADS, GROUPS, GROUPS], dim=2)
    out = attention(query, key, value, host_mask)
    assert out.shape == (SEQ_LENGTH, num_rows, HEADS * HEAD_DIM), out.shape
    assert out.device.type == "cuda" and out.dtype == torch.bfloat16, (out.device, out.dtype)


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
    stand_ins.stub_flash_attn_kernels()
    torch.cuda.get_device_capability = lambda *_: (8, 0)  # type: ignore[assignment]
    torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[assignment,method-assign]
    with FakeDevice(allow_non_fake_inputs=True):
        check_the_fake_device()
        for case in itertools.product(backends, ("local", "sliding"), (1, 2), (False, True)):
            check(*case)
            logger.info("%s: mask %s, %d rows, documents %s", *case)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(sys.argv[1:])
