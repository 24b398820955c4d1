"""Phases about what kernels cost: time against the window, plans, memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from megatron_skyladder.gpu_check.bench import Bench, Mask, attend, both_passes
from megatron_skyladder.gpu_check.kernels import Result
from megatron_skyladder.ladder.fragments import window_pairs
from megatron_skyladder.ladder.geometry import grid_call, launch
from megatron_skyladder.ladder.kernels import Call

_SLOWER_THAN_FULL = 1.05
_AS_IF_PLANNED = 4.0


def timings(bench: Bench) -> Result:
    """Time against the window, forward and backward, the L2 cache flushed before each call."""
    result = Result({"rows": []})
    sizes = bench.sizes
    for length in sizes.timed_lengths:
        for micro_batch in sizes.micro_batches:
            stock = bench.stock and _time(
                bench, bench.stock, Mask("full", length), length, micro_batch
            )
            for name in bench.backends:
                full = None
                for mask in _timed_masks(bench, length):
                    if name not in bench.backends_for(mask, length):
                        continue
                    ms = _time(bench, name, mask, length, micro_batch)
                    full = ms if full is None else full
                    row = _row(bench, name, mask, length, micro_batch, ms)
                    row |= {"percent_of_full": 100 * ms / full}
                    row |= {"stock_ms": stock} if stock else {}
                    result.figures["rows"].append(row)
                    where = f"{name}, {mask.name}, {length} tokens, micro-batch {micro_batch}"
                    if sizes.judged and ms > _SLOWER_THAN_FULL * full:
                        result.failures.append(f"{where}: slower than the full window")
    return result


def _timed_masks(bench: Bench, length: int) -> list[Mask]:
    windows = [window for window in bench.sizes.timed_windows if window < length]
    return [
        Mask("full", length),
        *(Mask(f"window {window}", window) for window in windows),
        *(Mask(f"documents, window {window}", window, documents=True) for window in windows[::2]),
        Mask(f"sliding {windows[-1]}", windows[-1], sliding=True),
    ]


def _time(bench: Bench, name: str, mask: Mask, length: int, micro_batch: int) -> float:
    heads = bench.sizes.timed_heads
    qkv = bench.tensors(length, micro_batch, heads, torch.bfloat16)
    backend, offsets = bench.build(name, heads), bench.segments(mask, length, micro_batch)
    out = attend(backend, qkv, offsets)
    direction = torch.ones_like(out)

    def call() -> None:
        torch.autograd.grad(attend(backend, qkv, offsets), qkv, direction)

    return bench.milliseconds(call)


def _row(
    bench: Bench, name: str, mask: Mask, length: int, micro_batch: int, ms: float
) -> dict[str, Any]:
    """Return what is known of one timed call, the FLOPs and the kernel's own formula beside it."""
    row: dict[str, Any] = {
        "backend": name,
        "mask": mask.name,
        "kind": mask.call(length).name,
        "window": mask.window,
        "seq_length": length,
        "micro_batch": micro_batch,
        "ms": ms,
    }
    if not mask.documents:
        pairs = window_pairs(mask.window, length, sliding=mask.sliding)
        row["percent_of_pairs"] = 100 * float(pairs) / float(window_pairs(length, length))
    if not mask.documents and not mask.sliding:
        capability = bench.capability if bench.capability > (0, 0) else (8, 0)
        here, full = (
            launch(
                name, grid_call(length, window, bench.sizes.timed_heads, micro_batch), capability
            )
            for window in (mask.window, length)
        )
        row["percent_of_tiles"] = 100 * (
            (2 * here.forward_pairs + 5 * here.backward_pairs)
            / (2 * full.forward_pairs + 5 * full.backward_pairs)
        )
        row["blocks"] = here.blocks
        row["workspace_mib"] = here.workspace / 2**20
    return row


def churn(bench: Bench) -> Result:
    """Windows that grow by one token: no call may wait for a plan, and nothing may pile up."""
    result = Result()
    length, heads = bench.sizes.seq_length, bench.sizes.timed_heads
    first = max(2, length // 4)
    for name in bench.backends:
        backend = bench.build(name, heads)
        qkv = bench.tensors(length, 1, heads, torch.bfloat16)
        seconds, before = [], _memory(bench)
        for window in range(first, first + bench.sizes.growing_windows):
            offsets = bench.segments(Mask("", window), length)
            bench.wait()
            began = time.perf_counter()
            both_passes(partial(attend, backend, qkv, offsets), qkv)
            bench.wait()
            seconds.append(time.perf_counter() - began)
        again = _again(bench, partial(both_passes, partial(attend, backend, qkv, offsets), qkv))
        typical, worst = statistics.median(seconds), max(seconds[1:])
        grown = _memory(bench) - before
        result.figures[name] = {
            "first call, ms": 1e3 * seconds[0],
            "typical call, ms": 1e3 * typical,
            "worst later call, ms": 1e3 * worst,
            "the last window again, ms": 1e3 * again,
            "device memory grown, MiB": grown,
        }
        if bench.sizes.judged and typical > _AS_IF_PLANNED * again:
            result.failures.append(
                f"{name}: a new window takes {typical / again:.0f} times as long as one that it "
                "knows, as if it planned"
            )
        if grown > 64:
            result.failures.append(f"{name}: {grown:.0f} MiB stay behind after the windows")
    return result


def _again(bench: Bench, call: Callable[[], Any]) -> float:
    """Return the median seconds of a call whose window is known by now."""
    seconds = []
    for _ in range(5):
        bench.wait()
        began = time.perf_counter()
        call()
        bench.wait()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _memory(bench: Bench) -> float:
    """Return what the process holds on the device beside torch's cache, MiB."""
    if bench.device.type != "cuda":
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return (total - free - torch.cuda.memory_reserved()) / 2**20


def memory(bench: Bench) -> Result:
    """Peak memory of one call, forward and backward, beside the full window's."""
    result = Result()
    heads = bench.sizes.timed_heads
    length = bench.sizes.timed_lengths[0]
    for name in bench.backends:
        peaks = {}
        for mask in _timed_masks(bench, length):
            if name not in bench.backends_for(mask, length):
                continue
            qkv = bench.tensors(length, 1, heads, torch.bfloat16)
            backend, offsets = bench.build(name, heads), bench.segments(mask, length)
            call = partial(both_passes, partial(attend, backend, qkv, offsets), qkv)
            call()
            peaks[mask.name] = bench.peak_mib(call)
        result.figures[name] = peaks
    return result


def mean_times(rows: list[dict[str, Any]], seq_length: int) -> dict[Call, dict[str, float]]:
    """Return the mean time of each kind of call by backend, at one length and micro-batch 1."""
    found: dict[Call, dict[str, list[float]]] = {}
    for row in rows:
        if row["seq_length"] == seq_length and row["micro_batch"] == 1:
            found.setdefault(Call[row["kind"]], {}).setdefault(row["backend"], []).append(row["ms"])
    return {
        call: {name: statistics.fmean(times) for name, times in by_name.items()}
        for call, by_name in found.items()
    }
