"""The attention kernels by name: what each needs, and which one `auto` takes where.

Facts only, for whoever has neither torch nor a GPU (flags, plan, doctor); the code that calls them
is in `attention.backends`, one file each.

There are three kinds of call, because kernels differ in them:

* FULL: the whole sequence, causal, no documents, no context parallelism: stock Megatron's own call;
* WINDOWS: equal windows of each sequence;
* PACKED: segments of any lengths: documents, sliding windows, keys from other ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

AUTO = "auto"


class Call(Enum):
    """The kinds of attention call that a run makes."""

    FULL = "full window"
    WINDOWS = "windows"
    PACKED = "documents, sliding, context parallel"


@dataclass(frozen=True)
class Kernel:
    """One kernel library.

    Args:
        name: as ``--skyladder-attention-backend`` takes it.
        runs: what runs.
        needs: what to install, for messages; None where torch alone will do.
        capability: lowest compute capability that trains, (major, minor).
    """

    name: str
    runs: str
    needs: str | None = None
    capability: tuple[int, int] = (0, 0)


KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel(
            "te",
            "Megatron's TEDotProductAttention; Transformer Engine picks cuDNN or FlashAttention",
            needs="transformer-engine",
            capability=(8, 0),
        ),
        Kernel(
            "fa4",
            "FlashAttention 4 (flash_attn.cute), compiled on first use",
            needs="flash-attn-4",
            capability=(9, 0),
        ),
        Kernel(
            "fa3",
            "FlashAttention 3 (flash_attn_interface)",
            needs="FlashAttention 3, built from hopper/ of its repository",
            capability=(9, 0),
        ),
        Kernel(
            "flash",
            "FlashAttention 2 (flash_attn)",
            needs="flash-attn 2.4 or later",
            capability=(8, 0),
        ),
        Kernel(
            "varlen",
            "torch.nn.attention.varlen, kept to its FlashAttention 2",
            needs="torch 2.12 or later",
            capability=(8, 0),
        ),
        Kernel(
            "sdpa",
            "torch scaled_dot_product_attention, windows as the batch",
        ),
    )
}


@dataclass(frozen=True)
class Preference:
    """What `auto` tries, best first, for one kind of call on one kind of device.

    Args:
        call: the kind of call.
        capabilities: lowest and highest major compute capability, both inclusive.
        order: names in ``KERNELS``.
        reason: why, in a few words; printed at start and by doctor.
    """

    call: Call
    capabilities: tuple[int, int]
    order: tuple[str, ...]
    reason: str


_STOCK = "stock Megatron's own call: same kernel, same bits"
_HOPPER = "FlashAttention 3 and 4 are made for Hopper; cuDNN plans packed calls by their size"
_BLACKWELL = "FlashAttention 4 is made for Blackwell; cuDNN plans packed calls by their size"
_AMPERE = "cuDNN takes packed calls from Hopper on; FlashAttention 2 is made for this device"

PREFERENCES = (
    Preference(Call.FULL, (8, 99), ("te", "fa4", "fa3", "flash", "varlen", "sdpa"), _STOCK),
    *(
        Preference(call, capabilities, order, reason)
        for call in (Call.WINDOWS, Call.PACKED)
        for capabilities, order, reason in (
            ((8, 8), ("flash", "varlen", "sdpa"), _AMPERE),
            ((9, 9), ("fa3", "fa4", "flash", "varlen", "te", "sdpa"), _HOPPER),
            ((10, 99), ("fa4", "flash", "varlen", "te", "sdpa"), _BLACKWELL),
        )
    ),
)


def preference(call: Call, capability: tuple[int, int]) -> Preference:
    """Return the row for a call on a device; below compute capability 8.0 there is sdpa alone."""
    for row in PREFERENCES:
        lowest, highest = row.capabilities
        if row.call is call and lowest <= capability[0] <= highest:
            return row
    return Preference(call, (0, 7), ("sdpa",), "the other kernels begin at compute capability 8.0")
