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
from math import gcd
from typing import NamedTuple

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


_TILE = 128  # channels: the value heads that kernels have beside longer keys


def value_width(
    name: str, key_size: int, value_size: int, capability: tuple[int, int]
) -> int | None:
    """Return how wide value heads have to be for a kernel to train.

    Multi-latent attention has keys that are wider than values; elsewhere both have one size, which
    not every kernel has either. Read off the libraries' sources of
    August 2026: csrc/flash_attn/flash_api.cpp (FlashAttention 2, which torch ships too) wants one
    size up to 256; hopper/flash_api.cpp (mha_fwd) and flash_attn/cute/interface.py
    (_validate_head_dims) name their pairs; Transformer Engine's fused_attn.cpp and utils.py, too.
    Zeros behind the values change nothing but the width of the output, which is cut again.

    Args:
        name: a key of ``KERNELS``.
        key_size: channels of a head of queries and keys.
        value_size: channels of a head of values.
        capability: of the device.

    Returns:
        Channels, at least ``value_size``: what values are padded to; None: no width will do.
    """
    if name == "te" and key_size == value_size:
        return value_size  # as stock Megatron calls it: it looks for a kernel by itself
    for width in sorted({value_size, _TILE, key_size}):
        if width >= value_size and _takes(name, key_size, width, capability[0]):
            return width
    return None


def _takes(name: str, key: int, value: int, major: int) -> bool:
    """Return whether a kernel trains with these heads."""
    same = key == value <= 256
    whole = key % 8 == value % 8 == 0
    small = whole and max(key, value) <= 128
    if name == "sdpa":
        return True
    if name in ("flash", "varlen"):
        return same
    if name == "fa3":
        pair = (128 < key <= 192 and 96 < value <= 128) or (key <= 64 and value <= 512)
        return major <= 9 and (same or (major == 9 and whole and pair))
    if major == 9:  # fa4 and te
        return whole and max(key, value) <= 256
    if major in (10, 11):
        # in FlashAttention 4 both are read from tensor memory in steps that the keys' size sets,
        # which has to divide that of the values
        steps = key < 128 or (-(-value // 16) * 8) % gcd(32, -(-key // 16) * 8) == 0
        return (small and (name == "te" or steps)) or (key, value) in ((192, 128), (256, 256))
    return major == 12 and small and (name == "te" or same)


VANILLA = "vanilla"  # Megatron's --softmax-type without a sink
_SINK_STATS = (64, 128, 256)  # channels of values for which cuDNN has a kernel of its own


class TransformerEngine(NamedTuple):
    """The installed release, and the cuDNN that it runs."""

    version: tuple[int, ...]
    cudnn: tuple[int, int, int]


def why_no_sink(
    name: str,
    call: Call,
    capability: tuple[int, int],
    te: TransformerEngine | None,
    *,
    softmax_type: str,
    heads: tuple[int, int],
    deterministic: bool = False,
) -> str | None:
    """Return why a kernel cannot train with a softmax sink, or None.

    Read off the libraries' sources of August 2026. Transformer Engine: its own selection
    (get_attention_backend) and the table that it was before (fused_attn.cpp, commit d0067d0); what
    runs a sink there is cuDNN alone. NVIDIA/TransformerEngine#3249: before cuDNN 9.26 packed calls
    read the wrong statistics for the gradient of a learnable sink, unless values have one of a few
    sizes. FlashAttention 4 (flash_attn/cute/interface.py): `learnable_sink` with its gradient.

    Args:
        name: a key of ``KERNELS``.
        call: the kind of call.
        capability: of the device.
        te: where it is installed.
        softmax_type: Megatron's.
        heads: channels of a head of queries and keys, and of values.
        deterministic: whether the model is.
    """
    if softmax_type == VANILLA:
        return None
    if name == "fa3":
        return "it has none, and its passes, which would do, differ from build to build"
    if name == "fa4":
        if capability[0] == 12:
            return "it has none on compute capability 12"
        if capability[0] in (10, 11) and heads == (256, 256):
            return "it has none for heads of 256 channels on Blackwell"
        return None
    if name != "te" or te is None:
        return None
    cudnn, packed = te.cudnn, call is Call.PACKED
    if deterministic:
        return "cuDNN has no deterministic one"
    if packed and capability[0] < 9:
        return "cuDNN takes packed calls from compute capability 9.0 on, FlashAttention has no sink"
    if packed and te.version < (2, 12):  # its selection refused them all
        return "packed calls need Transformer Engine 2.12 or later"
    needed = (9, 18, 1) if capability[0] == 12 else (9, 18, 0) if packed else (9, 13, 1)
    if cudnn < needed:
        return f"it needs cuDNN {_dotted(needed)} or later, and finds {_dotted(cudnn)}"
    if not _cudnn_has_sink(heads, capability[0]):
        return f"cuDNN has none for heads of {heads[0]} and {heads[1]} channels here"
    if packed and softmax_type == "learnable" and heads[1] not in _SINK_STATS:
        fixed = (9, 26, 0)
        if cudnn < fixed:
            return (
                f"before cuDNN {_dotted(fixed)} the gradient of a learnable one is wrong for "
                f"values of {heads[1]} channels, and this is {_dotted(cudnn)}"
            )
    return None


def _cudnn_has_sink(heads: tuple[int, int], major: int) -> bool:
    key, value = heads
    if key % 8 or value % 8:
        return False
    if max(heads) <= 128:
        return True
    if major == 9:
        return max(heads) <= 256 and (key == value or min(heads) < 128 or heads == (192, 128))
    return major >= 10 and heads == (192, 128)


def _dotted(version: tuple[int, int, int]) -> str:
    return ".".join(map(str, version))


def preference(call: Call, capability: tuple[int, int]) -> Preference:
    """Return the row for a call on a device; below compute capability 8.0 there is sdpa alone."""
    for row in PREFERENCES:
        lowest, highest = row.capabilities
        if row.call is call and lowest <= capability[0] <= highest:
            return row
    return Preference(call, (0, 7), ("sdpa",), "the other kernels begin at compute capability 8.0")
