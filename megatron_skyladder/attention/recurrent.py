"""Where the state of a Mamba or gated delta net layer starts anew: where attention ends, too.

Such a layer carries a state along the sequence, past the windows and documents that hide tokens
from attention. With ``--skyladder-recurrent-state fragments`` the state starts anew at each of
them, as if sequences were that short; with ``documents`` at documents alone.

The mask comes to these layers as it comes to attention, in the place of ``attention_mask``. It is
noted while a layer runs and given to its kernel, where every rank has whole sequences: neither
sequence parallelism nor context parallelism has to know of it. A layer whose forward pass ends
without such a kernel is an error, so another mixer cannot go on uncut unnoticed.

Shapes: b sequences of s tokens; kernels get [b, s, ...].
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_skyladder.attention.segments import (
    MaskCache,
    Part,
    Rows,
    Segments,
    grid_segments,
)
from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder import clock

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Kind:
    """One kind of layer.

    Args:
        name: in messages.
        kernels: those that have to run in a forward pass.
        leak: how far tokens that must not be seen may move an output, relative to those that are.
            Mamba's kernel adds up logarithms of decays over a chunk of 128 tokens, whatever
            sequence they belong to, and subtracts them again: rounding goes across.
    """

    name: str
    kernels: frozenset[str]
    leak: float


MAMBA = Kind("Mamba", frozenset({"scan"}), leak=1e-3)
GATED_DELTA_NET = Kind("gated delta net", frozenset({"convolution", "rule"}), leak=0.0)


@dataclass
class Cut:
    """The mask of the layer that runs.

    Args:
        mask: as it came along: int32 [N + 1] on the host, or None where the window alone cuts.
        training: whether the layer is in training.
        ran: the kernels that got it.
    """

    mask: torch.Tensor | None
    training: bool
    ran: set[str] = field(default_factory=set)

    def segments(self, kernel: str, first: torch.Tensor) -> Segments:
        """Return the segments of a kernel's tokens; first: [b, s, ...], one of its inputs."""
        self.ran.add(kernel)
        config = clock.current().config
        num_rows, seq_length = first.shape[:2]
        window_len = seq_length
        if config.recurrent_state == "fragments":
            window_len = min(clock.current().window(training=self.training), seq_length)
        rows = Rows(
            seq_length=seq_length,
            num_rows=num_rows,
            window_len=window_len,
            sliding=False,
            device=first.device,
        )
        if self.mask is None:
            found = grid_segments(rows)
        else:
            carries_both = config.recurrent_state == "documents"
            found = _masks.get(self.mask, rows, Part.DOCUMENTS if carries_both else Part.WHOLE)
        assert isinstance(found, Segments)  # whole sequences: no rank has a part
        if found.cu_seqlens_q[-1] != num_rows * seq_length:
            raise ValueError(
                f"the mask ends at {found.cu_seqlens_q[-1]} tokens, but the kernel has "
                f"{num_rows * seq_length}. The mask belongs to another micro-batch."
            )
        return found


_cut: ContextVar[Cut | None] = ContextVar("cut", default=None)
_masks = MaskCache()
_kinds: dict[Forward, Kind] = {}  # by the forward methods that `with_cut_state` made


def forget_masks() -> None:
    """Drop what is cached for masks that travelled."""
    _masks.clear()


def kind_of(module: torch.nn.Module) -> Kind | None:
    """Return what kind of layer it is whose state is cut, or None."""
    return _kinds.get(type(module).forward)


def with_cut_state(kind: Kind) -> Callable[[Forward], Forward]:
    """Return what wraps the ``forward`` of a kind's layers."""

    def wrap(original: Forward) -> Forward:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            given = signature.bind(self, *args, **kwargs).arguments
            with _cutting(kind, given.get("attention_mask"), training=self.training):
                return original(self, *args, **kwargs)

        _kinds[forward] = kind
        return forward

    return wrap


@contextlib.contextmanager
def _cutting(kind: Kind, mask: torch.Tensor | None, *, training: bool) -> Iterator[None]:
    cut = Cut(mask, training)
    token = _cut.set(cut)
    try:
        yield
    finally:
        _cut.reset(token)
    if missing := kind.kernels - cut.ran:
        raise UsageError(
            f"a {kind.name} layer ran without the kernel that starts its state anew "
            f"({', '.join(sorted(missing))}): Megatron uses another one here. Give "
            "--skyladder-recurrent-state free, or the layers and flags of Megatron's defaults."
        )


def scanning(kernel: Forward) -> Forward:
    """Wrap ``mamba_split_conv1d_scan_combined``: its first argument is [b, s, ...]."""

    def scan(first: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if (cut := _cut.get()) is not None:
            ids = cut.segments("scan", first).ids_device
            kwargs["seq_idx"] = ids.view(first.shape[:2])
        return kernel(first, *args, **kwargs)

    return scan


def convolving(kernel: Forward) -> Forward:
    """Wrap ``causal_conv1d`` of flash-linear-attention."""
    return _joining("convolution", kernel)


def applying_rule(kernel: Forward) -> Forward:
    """Wrap ``chunk_gated_delta_rule`` of flash-linear-attention."""
    return _joining("rule", kernel)


def _joining(name: str, kernel: Forward) -> Forward:
    """Wrap a kernel that takes offsets for one sequence only: all of them become one."""

    def joined(*args: Any, **kwargs: Any) -> Any:
        cut = _cut.get()
        if cut is None:
            return kernel(*args, **kwargs)
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)]
        first = kwargs["x"] if "x" in kwargs else tensors[0]
        shape = first.shape[:2]

        def join(value: Any) -> Any:
            is_per_token = isinstance(value, torch.Tensor) and value.shape[:2] == shape
            return value.reshape(1, -1, *value.shape[2:]) if is_per_token else value

        kwargs = {key: join(value) for key, value in kwargs.items()}
        kwargs["cu_seqlens"] = cut.segments(name, first).cu_seqlens_q_device
        out, state = kernel(*map(join, args), **kwargs)
        return out.view(*shape, *out.shape[2:]), state

    return joined
