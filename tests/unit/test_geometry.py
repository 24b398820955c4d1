"""What calls launch: the formulas against a count on the dense mask, and bounds over a ladder."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest

from megatron_skyladder.ladder.fragments import dense_mask, fragment_cu_seqlens, window_pairs
from megatron_skyladder.ladder.geometry import (
    Attention,
    Heads,
    Launch,
    grid_call,
    launch,
    max_batch_size,
    max_tokens,
    packed_call,
    padded_count,
    whole_tiles,
)
from megatron_skyladder.ladder.kernels import KERNELS, Call, preference
from megatron_skyladder.ladder.presets import PAPER_RUNS
from megatron_skyladder.ladder.schedules import WindowSchedule

MODELS = {"1b": Heads(32, 4, 64), "3b": Heads(24, 8, 128)}
# name, capability, tiles (queries x keys) forward and backward for heads of 64, then of 128, and
# whether the forward pass packs the query heads of a group; from the sources that geometry cites
KERNEL_TILES = [
    ("flash", (8, 0), ((128, 128), (128, 128)), ((128, 64), (64, 128)), False),
    ("flash", (8, 9), ((128, 128), (64, 128)), ((64, 64), (64, 64)), False),
    ("varlen", (9, 0), ((128, 128), (128, 128)), ((128, 64), (64, 128)), False),
    ("sdpa", (9, 0), ((128, 128), (128, 128)), ((128, 64), (64, 128)), False),
    ("fa3", (9, 0), ((192, 128), (128, 128)), ((128, 128), (64, 128)), True),
    ("fa4", (9, 0), ((192, 128), (128, 128)), ((128, 128), (64, 128)), True),
    ("fa4", (10, 0), ((128, 128), (128, 128)), ((128, 128), (128, 128)), True),
    ("te", (9, 0), ((128, 128), (128, 128)), ((128, 128), (128, 128)), False),
]
KERNELS_ON = [(name, capability) for name, capability, *_ in KERNEL_TILES]


def touched(mask: np.ndarray, tile: tuple[int, int], group: int = 1) -> int:
    """Return how many tiles of one segment's mask have a visible pair."""
    block_m, block_n = tile
    rows = np.repeat(mask, group, axis=0)  # a token's heads lie beside each other
    spare = -rows.shape[0] % block_m, -rows.shape[1] % block_n
    padded = np.pad(rows, ((0, spare[0]), (0, spare[1])))
    shape = (padded.shape[0] // block_m, block_m, padded.shape[1] // block_n, block_n)
    return int(padded.reshape(shape).any(axis=(1, 3)).sum())


def segments_of(call: Attention) -> Iterator[np.ndarray]:
    """Yield the dense mask of each segment: the last query sees the last key."""
    for queries, keys in zip(call.lengths_q.tolist(), call.lengths_k.tolist(), strict=True):
        if queries:
            width = call.sliding_window or keys
            yield dense_mask(keys, window_len=width, sliding=True)[keys - queries :]


@cache
def calls(heads: Heads) -> dict[str, tuple[Attention, list[np.ndarray]]]:
    """Return calls of every kind, each with the dense masks of its segments."""
    row = fragment_cu_seqlens(np.array([7, 300, 301, 900]), seq_length=1200, window_len=512)
    queries = np.array([0, 128, 128, 400, 401])
    keys = np.array([0, 128, 128, 1100, 1300])
    made = {
        "full": grid_call(640, 640, heads),
        "windows": grid_call(1024, 256, heads),
        "windows that do not divide": grid_call(1000, 300, heads),
        "short windows": grid_call(512, 32, heads),
        "documents": packed_call(row, row, heads),
        "sliding": packed_call(np.array([0, 900]), np.array([0, 900]), heads, 200),
        "keys of other ranks": packed_call(queries, keys, heads),
        "keys of other ranks, sliding": packed_call(queries, keys, heads, 150),
    }
    return {name: (call, list(segments_of(call))) for name, call in made.items()}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("row", KERNEL_TILES, ids=lambda row: f"{row[0]}-{row[1][0]}{row[1][1]}")
def test_tiles_are_those_that_the_mask_touches(row: tuple[Any, ...], model: str) -> None:
    """Counted tile by tile on a dense mask: no kernel computes a tile that is hidden as a whole."""
    name, capability, *tiles, packs = row
    forward, backward = tiles[list(MODELS).index(model)]
    heads = MODELS[model]
    for what, (call, masks) in calls(heads).items():
        if name == "sdpa" and call.kind is Call.PACKED:
            continue
        found = launch(name, call, capability)
        group = heads.query // heads.key if packs else 1
        expected = sum(touched(mask, forward, group) for mask in masks) * heads.query // group
        assert found.forward_tiles == expected, what
        expected = sum(touched(mask, backward) for mask in masks) * heads.query
        assert found.backward_tiles == expected, what


def ladder(seq_length: int) -> list[int]:
    return sorted(
        {
            8,
            32,
            33,
            64,
            100,
            127,
            128,
            129,
            *range(512, seq_length + 1, seq_length // 16 + 19),
            seq_length,
        }
    )


@pytest.mark.parametrize("seq_length", [8192, 32_768])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("name", "capability"), KERNELS_ON)
def test_no_window_costs_more_than_the_full_one(
    name: str, capability: tuple[int, int], model: str, seq_length: int
) -> None:
    """In tiles, at every window; a short second window may add one tile a head.

    In blocks from 128 tokens on up to twice as many, half of them idle: grids are sized by the
    longer of two windows. Shorter windows have a block each.
    """
    heads = MODELS[model]

    def at(window: int) -> Launch:
        return launch(name, grid_call(seq_length, window, heads), capability)

    full = at(seq_length)
    assert full.idle_blocks == 0
    for window in ladder(seq_length):
        found = at(window)
        assert found.forward_tiles <= 1.001 * full.forward_tiles, window
        assert found.backward_tiles <= 1.001 * full.backward_tiles, window
        if window >= 128:
            assert found.blocks <= 2 * full.blocks, window
            assert found.idle_blocks <= full.blocks, window
        assert found.blocks <= -(-128 // window) * 2 * full.blocks, window


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("name", "capability"), KERNELS_ON)
def test_what_tiles_waste(name: str, capability: tuple[int, int], model: str) -> None:
    """Pairs in tiles relative to the visible ones, forward: figures in docs/architecture.md.

    From 2,048 tokens on within a tenth where the window is whole tiles; at 512 at most a third.
    """
    heads = MODELS[model]

    def waste(window: int) -> float:
        call = grid_call(8192, window, heads)
        visible = int(window_pairs(window, 8192)) * heads.query
        return launch(name, call, capability).forward_pairs / visible

    assert all(1 <= waste(window) <= 1.1 for window in (2048, 4096, 8192))
    assert 1.1 < waste(512) < 1.35
    assert 1.45 < waste(128) < 2.25
    assert waste(32) > 7


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("name", "capability"), KERNELS_ON)
def test_workspace(name: str, capability: tuple[int, int], model: str) -> None:
    """A packed call keeps a tile of rows for each segment: that much and no more."""
    heads = MODELS[model]
    full = launch(name, grid_call(8192, 8192, heads), capability).workspace
    for window in ladder(8192):
        call = grid_call(8192, window, heads)
        bound = 1.2 if window >= 2048 else 1 + 1.25 * 256 * call.num_segments / 8192
        assert launch(name, call, capability).workspace <= bound * full, window


def test_workspace_by_hand() -> None:
    """FA2: (8192 + 128 * 256) rows of 32 heads of 64, and statistics, in float; keys expanded."""
    found = launch("flash", grid_call(8192, 32, MODELS["1b"]), (8, 0))
    assert found.workspace == 40_960 * 32 * 65 * 4 + 2 * 8192 * 32 * 64 * 2
    stock = launch("te", grid_call(8192, 8192, MODELS["1b"]), (9, 0))
    assert stock.workspace == 8192 * 32 * 64 * 4
    offsets = np.array([0, 8192])
    call = packed_call(offsets, offsets, MODELS["1b"])
    deterministic = Attention(call.kind, call.lengths_q, call.lengths_k, call.heads, None, True)
    assert launch("te", deterministic, (9, 0)).workspace == 32 * 32 * 8192**2 * 2  # 137 GB


def test_what_cudnn_declares_for_packed_calls() -> None:
    """By hand: 32 heads x 256 segments x 64 tiles of all tokens; a tile each has tokens."""
    offsets = np.arange(0, 8193, 32)
    found = launch("te", packed_call(offsets, offsets, MODELS["1b"]), (9, 0))
    assert found.blocks == 32 * 256 * 64 == 524_288
    assert found.blocks - found.idle_blocks == 32 * 256
    assert [max_batch_size(n) for n in (1, 32, 33, 512, 513)] == [32, 32, 64, 512, 1024]
    assert [max_tokens(n) for n in (1, 1025, 32_768, 32_769)] == [1024, 2048, 32_768, 65_536]


def test_padding_to_tiles_and_counts() -> None:
    assert [whole_tiles(np.array([n, 1])) for n in (1, 128, 129)] == [128, 128, 256]
    assert whole_tiles(np.array([], int)) == 128
    assert [padded_count(n) for n in (1, 16, 17, 64, 65)] == [16, 16, 32, 64, 128]


def plans(name: str, capability: tuple[int, int], sliding: bool = False) -> int:
    """Return how many plans the windows of the paper's 1B run at 8K need, every 64th looked at."""
    run, heads = PAPER_RUNS["1b-8k"], MODELS["1b"]
    schedule = WindowSchedule("linear", run.start_window, run.seq_length, alpha=run.alpha)
    windows = [window for _, _, window in schedule.segments(run.train_steps)]
    assert len(set(windows)) == len(windows) == 8161
    whole = np.array([0, run.seq_length])
    keys = set()
    for window in [*windows[::64], windows[-1]]:
        if sliding and window < run.seq_length:
            call = packed_call(whole, whole, heads, window)
        else:
            call = grid_call(run.seq_length, window, heads)
        keys.add(launch(name, call, capability).plan)
    return len(keys)


@pytest.mark.parametrize(
    ("name", "capability", "local", "sliding"),
    [
        ("flash", (8, 0), 1, 2),
        ("varlen", (9, 0), 1, 2),
        ("fa3", (9, 0), 1, 2),
        ("fa4", (9, 0), 2, 2),
        ("fa4", (10, 0), 2, 2),
        ("te", (9, 0), 129, 129),
    ],
)
def test_plans_over_the_papers_run(
    name: str, capability: tuple[int, int], local: int, sliding: int
) -> None:
    """A handful with FlashAttention; with cuDNN one for every window that is looked at."""
    assert plans(name, capability) == local
    assert plans(name, capability, sliding=True) == sliding


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)])
def test_auto_does_not_plan_by_the_window(capability: tuple[int, int]) -> None:
    """What `auto` takes first for windows and packed calls needs a few plans for a whole run."""
    for call, sliding in ((Call.WINDOWS, False), (Call.PACKED, True)):
        first = preference(call, capability).order[0]
        assert plans(first, capability, sliding=sliding) <= 4


def test_every_kernel_has_a_formula_or_says_so() -> None:
    heads = MODELS["1b"]
    for name in KERNELS:
        assert launch(name, grid_call(512, 128, heads), (9, 0)).blocks
    whole = np.array([0, 512])
    with pytest.raises(ValueError, match="no formula says what sdpa launches for documents"):
        launch("sdpa", packed_call(whole, whole, heads, 64), (9, 0))
    with pytest.raises(ValueError, match="heads of 192"):
        launch("fa3", grid_call(512, 128, Heads(8, 8, 192)), (9, 0))
