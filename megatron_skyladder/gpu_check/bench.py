"""Sizes and instruments of the check: the same code on a GPU and, at toy size, on the CPU.

Shapes: S tokens of a sequence, b sequences, h query heads, g key/value heads, d head size.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_skyladder.attention.backends import BACKENDS, choose, to_thd
from megatron_skyladder.attention.backends.base import Backend
from megatron_skyladder.attention.segments import MaskCache, Rows, Segments, grid_segments
from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder.fragments import dense_mask, fragment_cu_seqlens, rows_cu_seqlens
from megatron_skyladder.ladder.geometry import Heads
from megatron_skyladder.ladder.kernels import Call

_FLUSHED_BYTES = 256 << 20  # more than the L2 cache of any GPU
Attend = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    """How much is tried.

    Args:
        seq_length: of numerics, determinism, exchange and the watch for synchronisations.
        heads: that numerics try.
        windows: that numerics try, beside the whole sequence.
        timed_lengths: sequence lengths that are timed.
        timed_heads: of the model that is timed.
        timed_windows: beside the whole sequence.
        micro_batches: sequences in a timed call.
        repeats: timed calls, of which the median counts.
        growing_windows: in the phase that looks for plans.
        cp_sizes: context-parallel sizes.
        judged: whether times decide; at toy size they say nothing.
    """

    seq_length: int
    heads: tuple[Heads, ...]
    windows: tuple[int, ...]
    timed_lengths: tuple[int, ...]
    timed_heads: Heads
    timed_windows: tuple[int, ...]
    micro_batches: tuple[int, ...]
    repeats: int
    growing_windows: int
    cp_sizes: tuple[int, ...]
    judged: bool = True


REAL = Sizes(
    seq_length=2048,
    heads=(Heads(32, 4, 64), Heads(24, 8, 128), Heads(12, 1, 64), Heads(16, 16, 64)),
    windows=(1, 8, 32, 100, 128, 512),
    timed_lengths=(8192, 32_768),
    timed_heads=Heads(32, 4, 64),
    timed_windows=(8, 32, 64, 128, 256, 512, 1024, 2048, 4096),
    micro_batches=(1, 2),
    repeats=10,
    growing_windows=64,
    cp_sizes=(2, 4, 8),
)
TOY = Sizes(
    seq_length=64,
    heads=(Heads(4, 2, 16), Heads(2, 1, 32)),
    windows=(1, 8, 20),
    timed_lengths=(128,),
    timed_heads=Heads(4, 2, 16),
    timed_windows=(8, 32),
    micro_batches=(1, 2),
    repeats=2,
    growing_windows=3,
    cp_sizes=(2, 4),
    judged=False,
)


class Bench:
    """The device, what is installed for it, and how things are measured.

    Args:
        toy: run at toy size on the CPU.
        backends: kernels to try, by name; None: all that are installed and fit the device.

    Raises:
        UsageError: there is no GPU and no toy is asked for, or a backend that is named is missing.
    """

    def __init__(self, *, toy: bool, backends: list[str] | None = None) -> None:
        if not toy and not torch.cuda.is_available():
            raise UsageError(
                "torch sees no CUDA device, so there is nothing to check. Run where there is one; "
                "--toy tries the same phases on this machine's CPU, at toy size."
            )
        self.toy = toy
        self.sizes = TOY if toy else REAL
        self.device = torch.device("cpu" if toy else "cuda")
        self.name = "CPU (toy)" if toy else torch.cuda.get_device_name()
        self.capability = (0, 0) if toy else torch.cuda.get_device_capability()
        self.missing: dict[str, str] = {}
        self.backends = [name for name in backends or BACKENDS if self._usable(name, backends)]

    @property
    def stock(self) -> str | None:
        """The backend whose full window is stock Megatron's own call; None: it is none of these."""
        return "te" if "te" in self.backends else None

    def _usable(self, name: str, named: list[str] | None) -> bool:
        if self.toy and named is None:
            return name == "sdpa"
        lacks = choose.missing(name)
        if lacks and named is not None:
            raise UsageError(f"--backends {name} needs {lacks}.")
        if lacks:
            self.missing[name] = lacks
        return not lacks and any(self._fits(name, call) for call in Call)

    def _fits(self, name: str, call: Call, *, deterministic: bool = False) -> bool:
        why = choose.unfit(name, call, deterministic=deterministic)
        if why is not None:
            self.missing[f"{name}, {call.name}"] = why
        return why is None

    def backends_for(
        self, mask: Mask, seq_length: int, *, deterministic: bool = False
    ) -> list[str]:
        """Return the backends that a run could take for this kind of call here."""
        call = mask.call(seq_length)
        return [
            name for name in self.backends if self._fits(name, call, deterministic=deterministic)
        ]

    def build(self, name: str, heads: Heads, *, deterministic: bool = False) -> Backend:
        """Build a backend as a layer of a model would."""
        from megatron.core.transformer.transformer_config import TransformerConfig

        config = TransformerConfig(
            num_layers=1,
            hidden_size=heads.query * heads.size,
            num_attention_heads=heads.query,
            num_query_groups=heads.key,
            kv_channels=heads.size,
            attention_dropout=0.0,
            params_dtype=torch.bfloat16,
            deterministic_mode=deterministic,
        )
        return BACKENDS[name].build(
            config=config,
            scale=heads.size**-0.5,
            layer_number=1,
            softmax_scale=None,
            pg_collection=types.SimpleNamespace(tp=None, cp=None, hcp=None),
        )

    def tensors(
        self, seq_length: int, num_sequences: int, heads: Heads, dtype: torch.dtype
    ) -> list[torch.Tensor]:
        """Return random q, k, v [S, b, heads, d] that want gradients, the same ones every time."""
        generator = torch.Generator(self.device).manual_seed(1)
        return [
            torch.randn(
                seq_length, num_sequences, number, heads.size,
                generator=generator, device=self.device,
            ).to(dtype).requires_grad_()
            for number in (heads.query, heads.key, heads.key)
        ]  # fmt: skip

    def segments(self, mask: Mask, seq_length: int, num_sequences: int = 1) -> Segments:
        """Return what the attention module would make of a mask."""
        rows = Rows(
            seq_length,
            num_sequences,
            mask.window,
            mask.sliding,
            self.device,
            own_window=mask.own_window,
        )
        if not mask.documents:
            made = grid_segments(rows)
        else:
            made = MaskCache().get(mask.travelling(seq_length, num_sequences), rows)
        assert isinstance(made, Segments)
        return made

    def milliseconds(self, call: Callable[[], Any]) -> float:
        """Return the median time of a call, the L2 cache flushed before each."""
        call()  # what is compiled or planned on first use
        times = []
        for _ in range(self.sizes.repeats):
            self._flushed.zero_()
            self.wait()
            with self._timer() as taken:
                call()
            times.append(taken())
        return statistics.median(times)

    @contextlib.contextmanager
    def _timer(self) -> Iterator[Callable[[], float]]:
        if self.device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()

            def between() -> float:
                stop.synchronize()
                return float(start.elapsed_time(stop))

            yield between
            stop.record()
            return
        began = time.perf_counter()
        ended: list[float] = []
        yield lambda: 1e3 * (ended[0] - began)
        ended.append(time.perf_counter())

    @functools.cached_property
    def _flushed(self) -> torch.Tensor:
        size = _FLUSHED_BYTES if self.device.type == "cuda" else 1 << 20
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def wait(self) -> None:
        """Wait until the device has done everything."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak_mib(self, call: Callable[[], Any]) -> float:
        """Return how much memory a call takes beside what was there, MiB; 0 on the CPU."""
        if self.device.type != "cuda":
            call()
            return 0.0
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        self.wait()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def kernel_names(self, call: Callable[[], Any]) -> list[str]:
        """Return the longest kernels of a call, by the profiler, at most three."""
        from torch.profiler import ProfilerActivity, profile

        on_gpu = self.device.type == "cuda"
        activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
        with profile(activities=[activity]) as profiler:
            call()
            self.wait()
        found = profiler.key_averages()
        attribute = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        ordered = sorted(found, key=lambda event: -getattr(event, attribute, 0))
        return [event.key[:120] for event in ordered[:3]]

    @contextlib.contextmanager
    def errors_on_waiting(self) -> Iterator[None]:
        """Make it an error to wait for the device; on the CPU nothing can be noticed."""
        if self.device.type != "cuda":
            yield
            return
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


@dataclass(frozen=True)
class Mask:
    """A mask to try.

    Args:
        name: for people.
        window: tokens.
        documents: whether documents cut the sequences too.
        sliding: whether the window moves along with the query.
        own_window: tokens that a query of a local layer sees at most, fewer than ``window``; None:
            the layer is a global one.
    """

    name: str
    window: int
    documents: bool = False
    sliding: bool = False
    own_window: int | None = None

    def call(self, seq_length: int) -> Call:
        """Return the kind of call that it comes to."""
        if self.documents or self.sliding:
            return Call.PACKED
        return Call.FULL if self.window == seq_length else Call.WINDOWS

    def ends(self, seq_length: int) -> np.ndarray:
        """Return the documents' exclusive ends: some short, one of a single token, some long."""
        shares = (0.03, 0.05, 0.3, 0.31, 0.8, 1.0) if self.documents else (1.0,)
        ends = sorted({max(1, int(share * seq_length)) for share in shares})
        return np.array(ends, np.int32)

    def travelling(self, seq_length: int, num_sequences: int) -> torch.Tensor:
        """Return int32 cu_seqlens on the host, as the trainer hands them to the attention."""
        cut = seq_length if self.sliding else self.window
        row = fragment_cu_seqlens(self.ends(seq_length), seq_length=seq_length, window_len=cut)
        return torch.from_numpy(rows_cu_seqlens([row] * num_sequences))

    @functools.cache  # noqa: B019  # a second or two each, and asked for by every kernel
    def dense(self, seq_length: int) -> torch.Tensor:
        """Return bool [S, S], True where the query (first) sees the key."""
        mask = dense_mask(
            seq_length,
            window_len=self.window,
            document_ends=self.ends(seq_length) if self.documents else None,
            sliding=self.sliding,
            own_window=self.own_window,
        )
        return torch.from_numpy(mask)


def attend(backend: Backend, qkv: list[torch.Tensor], segments: Segments) -> torch.Tensor:
    """Call a backend as the attention module does; [S, b, h * d]."""
    query, key, value = qkv
    if segments.grid == query.shape[0]:
        return backend.attend_full(query, key, value, segments)
    if segments.grid is not None:
        return backend.attend_windows(query, key, value, segments)
    out = backend(to_thd(query), to_thd(key), to_thd(value), segments)
    return out.flatten(1).unflatten(0, (query.shape[1], -1)).transpose(0, 1)


def both_passes(call: Attend, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the output and the gradients of the leaves, in a fixed direction."""
    out = call()
    generator = torch.Generator(out.device).manual_seed(2)
    direction = torch.randn(out.shape, generator=generator, device=out.device).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, direction)]


def dense_attention(qkv: list[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """The truth: softmax over a dense mask, in the type of the inputs; [S, b, h * d]."""
    query, key, value = qkv
    group = query.shape[2] // key.shape[2]
    keys, values = (x.repeat_interleave(group, 2) for x in (key, value))
    logits = torch.einsum("mbhd,kbhd->bhmk", query, keys) * query.shape[-1] ** -0.5
    weights = logits.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("bhmk,kbhd->mbhd", weights, values).flatten(2)
