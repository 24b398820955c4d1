"""Compile every FlashAttention 4 call of a ladder for a GPU that is not there, and count kernels.

    python tests/fa4/ladder_kernels.py sm_90 > kernels.json

FlashAttention 4 compiles its kernels for an architecture that is named, and compiling needs no
device: the tensors are fake. What calls is SkyLadder's own backend, with the segments that training
makes; only the offsets on the device are fake too. Autograd does not run on fake CUDA tensors, so
the backward function is called with what its forward was called with.

--deterministic-mode is left out: its semaphores are handed over in a way that needs a device.

Prints JSON: case -> kernels compiled so far, forward and backward, after each of its windows.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

ARCH = sys.argv[1]
os.environ.update(
    FLASH_ATTENTION_ARCH=ARCH,
    CUTE_DSL_ARCH=f"{ARCH}a",
    FLASH_ATTENTION_NUM_SMS="132",
    FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED="0",  # count what is compiled, not what is on disk
)
warnings.filterwarnings("ignore")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from flash_attn.cute import interface  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from megatron_skyladder.attention.backends.flash import FlashCuteBackend  # noqa: E402
from megatron_skyladder.attention.segments import (  # noqa: E402
    MaskCache,
    ParallelSegments,
    Rows,
    Segments,
    grid_segments,
)
from megatron_skyladder.ladder.fragments import fragment_cu_seqlens, rows_cu_seqlens  # noqa: E402
from megatron_skyladder.ladder.schedules import WindowSchedule  # noqa: E402

SEQ_LENGTH = 8192
HEADS = {"1b": (32, 4, 64), "3b": (24, 8, 128)}  # query heads, key heads, head size
LADDER = WindowSchedule("linear", 32, SEQ_LENGTH, expand_fraction="0.64", total_steps=1000)
WINDOWS = sorted({LADDER.window_at(step) for step in range(0, 1000, 20)})


def rows(window: int, *, sliding: bool, cp_size: int, cp_rank: int) -> Rows:
    """Return two sequences of a micro-batch under a window."""
    device = torch.device("cuda")
    return Rows(SEQ_LENGTH, 2, window, sliding, device, cp_size=cp_size, cp_rank=cp_rank)


def segments_of(window: int, case: dict[str, Any]) -> Iterator[Segments]:
    """Yield the segments of each kernel call that one layer makes."""
    layout = rows(window, sliding=case["sliding"], cp_size=case["cp"], cp_rank=case["cp"] - 1)
    if case["documents"]:
        generator = np.random.default_rng(window)
        ends = np.sort(generator.choice(SEQ_LENGTH, 12, replace=False)).astype(np.int32)
        row = fragment_cu_seqlens(ends, seq_length=SEQ_LENGTH, window_len=layout.cut)
        mask = torch.from_numpy(rows_cu_seqlens([row, row]))
        made = MaskCache().get(mask, layout)
    else:
        made = grid_segments(layout)
    if isinstance(made, ParallelSegments):
        yield from (part for part in (made.own, made.joined) if part is not None)
    else:
        yield made


def on_fake_device(segments: Segments) -> Segments:
    """Give segments fake offsets on the device, in the place of those that would be copied."""
    offsets = torch.empty(len(segments.cu_seqlens_q), dtype=torch.int32, device="cuda")
    same = segments.cu_seqlens_k is segments.cu_seqlens_q
    vars(segments)["cu_seqlens_q_device"] = offsets
    vars(segments)["cu_seqlens_k_device"] = offsets if same else torch.empty_like(offsets)
    return segments


def attend(backend: FlashCuteBackend, segments: Segments, case: dict[str, Any]) -> None:
    """Run one call forward and backward."""
    query_heads, key_heads, size = HEADS[case["model"]]
    num_queries, num_keys = int(segments.cu_seqlens_q[-1]), int(segments.cu_seqlens_k[-1])
    dtype = torch.bfloat16
    query = torch.empty(num_queries, query_heads, size, dtype=dtype, device="cuda")
    key, value = torch.empty(2, num_keys, key_heads, size, dtype=dtype, device="cuda")
    given: dict[str, Any] = {}
    call = backend.attend

    def attending(*tensors: torch.Tensor, **arguments: Any) -> Any:
        given.update(arguments)
        found = call(*tensors, **arguments, return_lse=True)
        given["found"] = found
        return found

    backend.attend = attending
    try:
        backend(query, key, value, segments)
    finally:
        backend.attend = call
    out, lse = given.pop("found")[:2]
    left, right = given.pop("window_size")
    interface._flash_attn_bwd(
        query, key, value, out, torch.empty_like(out), lse,
        window_size_left=left, window_size_right=right, **given,
    )  # fmt: skip


def main() -> None:
    """Walk up the ladder in every case."""
    cases = {
        f"{model}, {mask}, {'documents' if documents else 'windows'}, cp{cp}": {
            "model": model,
            "sliding": mask == "sliding",
            "documents": documents,
            "cp": cp,
            "sink": False,
        }
        for model in HEADS
        for mask in ("local", "sliding")
        for documents in (False, True)
        for cp in (1, 2)
    }
    plain, *_ = cases.values()
    for model in HEADS:  # sinks are kernels of their own
        for mask in ("local", "sliding"):
            name = f"{model}, {mask}, documents, cp2, sinks"
            changes = {"model": model, "sliding": mask == "sliding", "sink": True}
            cases[name] = plain | changes | {"documents": True, "cp": 2}
    counted = {}
    for name, case in cases.items():
        backend = FlashCuteBackend(0.125, deterministic=False)
        if case["sink"]:
            FlashCuteBackend.check_sink()
            backend.use_sink(
                lambda heads=HEADS[case["model"]][0]: torch.empty(heads, device="cuda")
            )
        after, started = [], time.perf_counter()
        for window in WINDOWS:
            for segments in segments_of(window, case):
                with FakeTensorMode(allow_non_fake_inputs=True):
                    attend(backend, on_fake_device(segments), case)
            caches = (interface._flash_attn_fwd, interface._flash_attn_bwd)
            after.append([len(function.compile_cache.cache) for function in caches])
        counted[name] = after
        seconds = time.perf_counter() - started
        print(f"{ARCH} {name}: {after[0]} -> {after[-1]}, {seconds:.0f} s", file=sys.stderr)
    json.dump({"windows": WINDOWS, "kernels": counted}, sys.stdout)


if __name__ == "__main__":
    main()
