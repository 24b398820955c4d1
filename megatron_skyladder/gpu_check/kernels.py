"""Phases about what kernels compute: facts, numerics, synchronisations, determinism, exchange."""

from __future__ import annotations

import itertools
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from megatron_skyladder.attention.segments import MaskCache, ParallelSegments, Rows, Segments
from megatron_skyladder.gpu_check.bench import (
    Bench,
    Mask,
    attend,
    both_passes,
    dense_attention,
)
from megatron_skyladder.ladder.geometry import Heads
from megatron_skyladder.ladder.sequence_layout import Kind, LayoutRule

_PASSES = "an output", "a query's gradient", "a key's gradient", "a value's gradient"
_FEW_ROUNDINGS = 0.05  # of bf16, relative: one for each rank that reads a key, and their sum
_EXACT_ZERO = 1e-4  # what plain attention gets exactly right, for values around 1
_TE_DETERMINISTIC = "NVTE_ALLOW_NONDETERMINISTIC_ALGO"  # Megatron wants it to be 0


@dataclass
class Result:
    """What a phase found.

    Args:
        figures: for the JSON file and the page.
        failures: what is wrong, a sentence each.
    """

    figures: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


def masks(bench: Bench, seq_length: int) -> Iterator[Mask]:
    """Yield every mask that numerics try."""
    windows = [w for w in bench.sizes.windows if w < seq_length]
    yield Mask("full", seq_length)
    for window in windows:
        yield Mask(f"window {window}", window)
    for window in (*windows[-2:], seq_length):
        yield Mask(f"documents, window {window}", window, documents=True)
    yield Mask(f"sliding {windows[-1]}", windows[-1], sliding=True)
    yield Mask(f"sliding {windows[-2]}, documents", windows[-2], documents=True, sliding=True)
    own = windows[-2]
    for window in (windows[-1], seq_length):
        yield Mask(f"window {window}, local layer of {own}", window, own_window=own)
    yield Mask(f"documents, local layer of {own}", seq_length, documents=True, own_window=own)


def facts(bench: Bench) -> Result:
    """What is here, and which kernel runs each kind of call."""
    from megatron_skyladder.attention.backends.facts import UNFUSED, gpu_facts

    heads = bench.sizes.timed_heads
    result = Result(
        {
            "device": bench.name,
            "capability": list(bench.capability),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            **gpu_facts(),
            "backends": bench.backends,
            "missing": bench.missing,
        }
    )
    length = bench.sizes.seq_length
    window = length // 4
    calls = (
        Mask("full", length),
        Mask("windows", window),
        Mask("packed", window, documents=True),
    )
    for name in bench.backends:
        backend = bench.build(name, heads)
        qkv = bench.tensors(length, 1, heads, torch.bfloat16)
        for mask in calls:
            if name not in bench.backends_for(mask, length):
                continue
            offsets = bench.segments(mask, length)
            names = bench.kernel_names(partial(attend, backend, qkv, offsets))
            result.figures[f"{name}, {mask.name}"] = names
    sub_backends = result.figures.get("te sub-backends", {})
    for call, chosen in sub_backends.items():
        if chosen == UNFUSED:
            result.failures.append(f"Transformer Engine attends unfused for {call} calls")
    return result


def numerics(bench: Bench) -> Result:
    """Output and gradients of every backend against float32, and what may not be seen at all."""
    result = Result()
    length = bench.sizes.seq_length
    for heads in bench.sizes.heads:
        for mask in masks(bench, length):
            dense = mask.dense(length).to(bench.device)
            truth = _dense_passes(bench, heads, torch.float32, dense)
            for dtype in (torch.bfloat16, torch.float16):
                plain = _dense_passes(bench, heads, dtype, dense)
                for name in bench.backends_for(mask, length):
                    where = f"{name}, {mask.name}, {_shape(heads)}, {str(dtype)[6:]}"
                    qkv = bench.tensors(length, 1, heads, dtype)
                    backend = bench.build(name, heads)
                    offsets = bench.segments(mask, length)
                    got = both_passes(partial(attend, backend, qkv, offsets), qkv)
                    ratio = _error_ratio(got, plain, truth)
                    worst = result.figures.setdefault(name, {"worst": 0.0, "where": ""})
                    if ratio > worst["worst"]:
                        result.figures[name] = {"worst": round(ratio, 3), "where": where}
                    if not ratio <= 1:
                        result.failures.append(
                            f"{where}: the error against float32 is {2 * ratio:.2g} times that of "
                            "plain attention"
                        )
                    result.failures += _hidden_tokens(bench, name, heads, mask, dtype)
    return result


def _dense_passes(
    bench: Bench, heads: Heads, dtype: torch.dtype, mask: torch.Tensor
) -> list[torch.Tensor]:
    half = bench.tensors(bench.sizes.seq_length, 1, heads, torch.bfloat16)
    if dtype is torch.float16:
        half = bench.tensors(bench.sizes.seq_length, 1, heads, dtype)
    qkv = [x.detach().to(dtype).requires_grad_() for x in half]
    return both_passes(lambda: dense_attention(qkv, mask), qkv)


def _error_ratio(
    got: list[torch.Tensor], plain: list[torch.Tensor], truth: list[torch.Tensor]
) -> float:
    """Return the largest error relative to twice that of plain attention; 1 is the bar.

    In the root mean square; a NaN counts as infinite.
    """
    ratios = []
    for x, low, exact in zip(got, plain, truth, strict=True):
        error, bar = ((y.float() - exact.float()).square().mean().sqrt().item() for y in (x, low))
        ratio = error / (2 * bar + _EXACT_ZERO)
        ratios.append(ratio if ratio == ratio else float("inf"))
    return max(ratios)


def _hidden_tokens(
    bench: Bench, name: str, heads: Heads, mask: Mask, dtype: torch.dtype
) -> list[str]:
    """Change keys that the last queries do not see: bit-identical outputs, also beside an Inf."""
    length = bench.sizes.seq_length
    visible = mask.dense(length)[-1]
    if bool(visible.all()):
        return []
    hidden = (~visible).nonzero().flatten().to(bench.device)
    qkv = [x.detach() for x in bench.tensors(length, 1, heads, dtype)]
    offsets, backend = bench.segments(mask, length), bench.build(name, heads)
    # of its own segment a kernel may multiply hidden values by zero, of others it may load none
    elsewhere = hidden[hidden < int(offsets.cu_seqlens_k[-2])]
    before = attend(backend, qkv, offsets)[-1].clone()
    failures = []
    for what, places, value in (
        ("a hidden token changes", hidden, 3.0),
        ("another segment has an Inf", elsewhere, float("inf")),
    ):
        query, key, values = (x.clone() for x in qkv)
        values[places] = value
        if value == 3.0:
            key[places] = value
        after = attend(backend, [query, key, values], offsets)[-1]
        if not torch.equal(before, after):
            failures.append(f"{name}, {mask.name}, {_shape(heads)}: an output moves where {what}")
    return failures


def no_sync(bench: Bench) -> Result:
    """Nothing waits for the device, with documents that are new to the attention."""
    result = Result()
    length, heads = bench.sizes.seq_length, bench.sizes.timed_heads
    for name in bench.backends:
        backend = bench.build(name, heads)
        qkv = bench.tensors(length, 2, heads, torch.bfloat16)
        failures = []
        for mask in masks(bench, length):
            if name not in bench.backends_for(mask, length):
                continue
            # once before: what is compiled or planned on first use may wait
            both_passes(lambda: attend(backend, qkv, bench.segments(mask, length, 2)), qkv)  # noqa: B023
            try:
                with bench.errors_on_waiting():
                    out = attend(backend, qkv, bench.segments(mask, length, 2))
                    out.backward(torch.ones_like(out))
            except RuntimeError as error:
                failures.append(f"{name}, {mask.name}: {str(error).splitlines()[0]}")
        result.figures[name] = "something waits" if failures else "nothing waits"
        result.failures += failures
    return result


def determinism(bench: Bench) -> Result:
    """In --deterministic-mode two passes give the same bits."""
    result = Result()
    length, heads = bench.sizes.seq_length, bench.sizes.timed_heads
    before = os.environ.get(_TE_DETERMINISTIC), torch.are_deterministic_algorithms_enabled()
    os.environ[_TE_DETERMINISTIC] = "0"
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for name in bench.backends:
            backend = bench.build(name, heads, deterministic=True)
            for mask in masks(bench, length):
                if name not in bench.backends_for(mask, length, deterministic=True):
                    continue
                qkv = bench.tensors(length, 1, heads, torch.bfloat16)
                offsets = bench.segments(mask, length)
                runs = [both_passes(partial(attend, backend, qkv, offsets), qkv) for _ in range(3)]
                same = all(
                    torch.equal(x, y) for run in runs[1:] for x, y in zip(runs[0], run, strict=True)
                )
                if not same:
                    result.failures.append(f"{name}, {mask.name}: two passes differ")
            result.figures[name] = "tried"
    finally:
        torch.use_deterministic_algorithms(before[1])
        if before[0] is None:
            del os.environ[_TE_DETERMINISTIC]
        else:
            os.environ[_TE_DETERMINISTIC] = before[0]
    return result


def exchange(bench: Bench) -> Result:
    """Every context-parallel rank's launches, in this one process, against the whole sequence.

    Output and gradients.
    """
    result = Result()
    length, heads = bench.sizes.seq_length, bench.sizes.timed_heads
    for name in bench.backends:
        backend = bench.build(name, heads)
        worst = 0.0
        for mask in masks(bench, length):
            if name not in bench.backends_for(Mask("", 1, documents=True), length):
                continue  # keys of other ranks are always packed
            qkv = bench.tensors(length, 1, heads, torch.bfloat16)
            whole = both_passes(partial(attend, backend, qkv, bench.segments(mask, length)), qkv)
            for cp_size, kind in itertools.product(bench.sizes.cp_sizes, Kind):
                rule = LayoutRule(kind, length, cp_size, mask.window, mask.sliding)
                got = both_passes(partial(_all_ranks, bench, backend, qkv, mask, rule), qkv)
                for what, parts, exact in zip(_PASSES, got, whole, strict=True):
                    largest = max(1.0, exact.abs().max().item())
                    error = (parts.float() - exact.float()).abs().max().item() / largest
                    worst = max(worst, error)
                    if not error <= _FEW_ROUNDINGS:
                        result.failures.append(
                            f"{name}, {mask.name}, {cp_size} ranks, layout by {kind.value}: {what} "
                            f"is {error:.2g} off, of the largest or of 1"
                        )
        result.figures[name] = {"largest difference": worst}
    return result


def _all_ranks(
    bench: Bench, backend: Any, qkv: list[torch.Tensor], mask: Mask, rule: LayoutRule
) -> torch.Tensor:
    """Return what all ranks compute, put together; keys are copied where they would travel."""
    length = bench.sizes.seq_length
    travelling = mask.travelling(length, 1)
    (layout,) = rule.layouts(1, travelling.numpy())
    held = [torch.from_numpy(layout.positions(rank)) for rank in range(rule.cp_size)]
    made = [
        MaskCache().get(
            travelling,
            Rows(
                length,
                1,
                mask.window,
                mask.sliding,
                bench.device,
                rule.cp_size,
                rank,
                rule,
                mask.own_window,
            ),
        )
        for rank in range(rule.cp_size)
    ]
    out = torch.zeros(length, 1, qkv[0][0, 0].numel(), device=bench.device)
    for rank, segments in enumerate(made):
        own = [x[held[rank].to(bench.device), 0] for x in qkv]
        if isinstance(segments, Segments):
            out[held[rank].to(bench.device), 0] = backend(*own, segments).flatten(1).float()
            continue
        arrived = []
        for source, other in enumerate(made):
            assert isinstance(other, ParallelSegments)
            places = [held[source][start:stop] for start, stop in other.plan.sends[rank]]
            arrived.append(torch.cat(places) if places else held[source][:0])
        known = torch.cat([held[rank], *arrived]).to(bench.device)
        for call, offsets in (
            (segments.plan.own, segments.own),
            (segments.plan.joined, segments.joined),
        ):
            if call is None:
                continue
            queries = torch.cat([held[rank][start:stop] for start, stop in call.queries])
            keys = torch.cat([known[start:stop] for start, stop in call.keys])
            queries = queries.to(bench.device)
            got = backend(qkv[0][queries, 0], qkv[1][keys, 0], qkv[2][keys, 0], offsets)
            out[queries, 0] = got.flatten(1).float()
    return out


def _shape(heads: Heads) -> str:
    return f"heads {heads.query}/{heads.key} of {heads.size}"
