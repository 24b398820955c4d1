"""Attention measures against a dense softmax written from their definitions."""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")

from megatron_skyladder.attention import statistics  # noqa: E402
from megatron_skyladder.attention.segments import Segments  # noqa: E402
from megatron_skyladder.attention.statistics import LayerStatistics, Sums, measure  # noqa: E402
from megatron_skyladder.ladder.flags import add_arguments, config_from_args  # noqa: E402
from megatron_skyladder.ladder.fragments import dense_mask, fragment_cu_seqlens, rows_cu_seqlens  # noqa: E402

LENGTH, ROWS, HEADS, GROUPS, DIM = 160, 2, 4, 2, 8
SCALE = 0.9
CPU = torch.device("cpu")


def random_tokens(heads: int, seed: int, rows: int = ROWS) -> Any:
    """Return [rows * LENGTH, heads, DIM]; of keys, those where fragments may start are loud.

    So that there are sinks, but not in every head.
    """
    shape = rows * LENGTH, heads, DIM
    tokens = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.5
    if heads == GROUPS:
        for row in range(rows):
            for place, loudness in ((0, 2.5), (5, 1.2), (30, 1.2), (70, 1.2)):
                tokens[row * LENGTH + place, 0] += loudness
    return tokens


def segments_of(offsets: np.ndarray, *, window: int | None = None) -> Segments:
    return Segments(offsets, offsets, window, None, CPU)


def dense(
    query: Any, key: Any, visible: np.ndarray, starts: list[int]
) -> tuple[float, float, int, float, int]:
    """Return largest logit, entropies and their number, sinks and their number, one row.

    Args:
        visible: bool [LENGTH, LENGTH].
        starts: the first token of every fragment of at least 64 tokens.
    """
    mask = torch.from_numpy(visible)
    key = key.repeat_interleave(HEADS // GROUPS, dim=1)
    logits = torch.einsum("qhd,khd->hqk", query.double(), key.double()) * SCALE
    logits = logits.masked_fill(~mask, -torch.inf)
    weights = torch.softmax(logits, dim=-1)
    entropies = -torch.where(weights > 0, weights * weights.log(), 0.0).sum()
    sinks = sum(int((weights[:, s : s + 64, s].mean(dim=1) > 0.3).sum()) for s in starts)
    return (
        float(logits[mask.expand_as(logits)].max()),
        float(entropies),
        HEADS * LENGTH,
        sinks,
        HEADS * len(starts),
    )


def check(sums: Sums, rows: list[tuple[float, float, int, float, int]]) -> None:
    assert float(sums.largest) == pytest.approx(max(row[0] for row in rows), rel=1e-5)
    assert float(sums.entropy) == pytest.approx(sum(row[1] for row in rows), rel=1e-5)
    assert sums.num_queries == sum(row[2] for row in rows)
    assert float(sums.sinks) == sum(row[3] for row in rows)
    assert sums.num_heads == sum(row[4] for row in rows)


@pytest.fixture(params=[1 << 24, 9000], ids=["whole", "blocks"])
def block_elements(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits held at a time: all, or those of a few queries."""
    monkeypatch.setattr(statistics, "BLOCK_ELEMENTS", request.param)


@pytest.mark.usefixtures("block_elements")
@pytest.mark.parametrize("ends", [[], [[40, 150], [5, 75]]], ids=["rows", "documents"])
@pytest.mark.parametrize("window", [16, 70, LENGTH])
def test_windows_and_documents(window: int, ends: list[list[int]]) -> None:
    query, key = random_tokens(HEADS, 0), random_tokens(GROUPS, 1)
    wanted, rows = [], []
    for row in range(ROWS):
        documents = np.array([*(ends[row] if ends else []), LENGTH])
        offsets = fragment_cu_seqlens(documents, seq_length=LENGTH, window_len=window)
        rows.append(offsets)
        visible = dense_mask(LENGTH, window_len=window, document_ends=documents)
        starts = [int(a) for a, b in itertools.pairwise(offsets) if b - a >= 64]
        part = slice(row * LENGTH, (row + 1) * LENGTH)
        wanted.append(dense(query[part], key[part], visible, starts))
    check(measure(query, key, segments_of(rows_cu_seqlens(rows)), SCALE), wanted)
    if window >= 64:
        found = sum(row[3] for row in wanted)
        assert 0 < found < sum(row[4] for row in wanted)  # both kinds of heads are there


@pytest.mark.usefixtures("block_elements")
@pytest.mark.parametrize("window", [16, 64, 100])
def test_sliding_windows(window: int) -> None:
    query, key = random_tokens(HEADS, 0, rows=1), random_tokens(GROUPS, 1, rows=1)
    documents = np.array([30, LENGTH])
    offsets = fragment_cu_seqlens(documents, seq_length=LENGTH, window_len=LENGTH)
    visible = dense_mask(LENGTH, window_len=window, document_ends=documents, sliding=True)
    starts = [30] if window >= 64 else []
    found = measure(query, key, segments_of(offsets, window=window), SCALE)
    check(found, [dense(query, key, visible, starts)])


@pytest.mark.usefixtures("block_elements")
@pytest.mark.parametrize("window", [None, 70])
def test_queries_whose_keys_came_from_another_rank(window: int | None) -> None:
    query, key = random_tokens(HEADS, 0, rows=1), random_tokens(GROUPS, 1, rows=1)
    half, begin = LENGTH // 2, 0 if window is None else LENGTH // 2 - window + 1
    first = segments_of(np.array([0, half], np.int32), window=window)
    total = measure(query[:half], key[:half], first, SCALE)
    second = Segments(
        np.array([0, half], np.int32),
        np.array([0, LENGTH - begin], np.int32),
        window,
        None,
        CPU,
    )
    total.add(measure(query[half:], key[begin:], second, SCALE))
    visible = dense_mask(LENGTH, window_len=window or LENGTH, sliding=window is not None)
    check(total, [dense(query, key, visible, [0])])


def test_a_row_too_long_for_the_block_goes_query_by_query(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "BLOCK_ELEMENTS", 1)
    query, key = random_tokens(HEADS, 0, rows=1), random_tokens(GROUPS, 1, rows=1)
    found = measure(query, key, segments_of(np.array([0, LENGTH], np.int32)), SCALE)
    check(found, [dense(query, key, dense_mask(LENGTH, window_len=LENGTH), [0])])


def test_sink_and_entropy_by_hand() -> None:
    # All keys are 0 but the first, whose logit is ln 9 for every query: at place i (from 0) it gets
    # 9 / (9 + i) of the attention; the mean over 64 places is about 0.35.
    query = torch.ones(64, 1, 1)
    key = torch.zeros(64, 1, 1)
    key[0] = float(np.log(9))
    found = measure(query, key, segments_of(np.array([0, 64], np.int32)), 1.0)
    assert float(found.largest) == pytest.approx(np.log(9))
    assert (float(found.sinks), found.num_heads) == (1, 1)
    entropy = 0.0
    for place in range(64):
        weights = np.array([9, *[1] * place]) / (9 + place)
        entropy -= (weights * np.log(weights)).sum()
    assert float(found.entropy) == pytest.approx(entropy)
    key[0] = 0.0  # even attention: 1 / (i + 1), about 0.07
    found = measure(query, key, segments_of(np.array([0, 64], np.int32)), 1.0)
    assert (float(found.sinks), found.num_heads) == (0, 1)


def test_bf16_is_measured_in_float32() -> None:
    """Multiplied as it is, bfloat16 would round every logit to 8 bits."""
    query = random_tokens(HEADS, 0, rows=1).bfloat16()
    key = random_tokens(GROUPS, 1, rows=1).bfloat16()
    segments = segments_of(np.array([0, 70, LENGTH], np.int32))
    found = measure(query, key, segments, SCALE)
    assert found == measure(query.float(), key.float(), segments, SCALE)


# --- when it is measured ------------------------------------------------------------------------


def test_only_the_first_forward_of_every_nth_iteration_is_measured() -> None:
    iterations = [0]
    layer = LayerStatistics(1, 3, SCALE, lambda: iterations[0])
    measured = []
    for iterations[0] in range(1, 8):
        for _ in range(2):  # two micro-batches, or a forward and its recompute
            if layer.recorder(CPU) is not None:
                measured.append(iterations[0])
    assert measured == [3, 6]


def test_layers_are_reported_over_the_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = torch.zeros
    monkeypatch.setattr(
        statistics.torch, "zeros", lambda *size, **kw: zeros(*size, dtype=kw.get("dtype"))
    )
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
    monkeypatch.setattr(statistics, "_layers", statistics.WeakSet())
    query, key = random_tokens(HEADS, 0, rows=1), random_tokens(GROUPS, 1, rows=1)
    layers = [LayerStatistics(number, 1, SCALE, lambda: 1) for number in (1, 2, 3)]
    for layer, length in ((layers[0], LENGTH), (layers[2], 32)):
        record = layer.recorder(CPU)
        assert record is not None
        offsets = fragment_cu_seqlens(np.array([]), seq_length=LENGTH, window_len=length)
        record(query, key, segments_of(offsets))
    found = statistics.by_layer(3)
    assert all(list(values) == [1, 3] for values in found.values())  # 2 has measured nothing
    assert np.isfinite(list(found["attention_entropy"].values())).all()
    assert np.isfinite(list(found["attention_sink"].values())).tolist() == [True, False]
    assert layers[0].sums is None  # reported once


def test_summary_has_the_largest_logit_and_the_means_over_layers() -> None:
    layers = {
        "max_attention_logit": {1: 3.0, 3: 7.0},  # 2 is a layer without attention
        "attention_entropy": {1: 2.0, 3: 3.0},
        "attention_sink": {1: float("nan"), 3: float("nan")},
    }
    assert list(statistics.scalars(layers)) == [
        f"skyladder/{name}/layer_{number}"
        for name in ("max_attention_logit", "attention_entropy")
        for number in (1, 3)
    ]
    assert statistics.summary(layers) == {
        "skyladder/max_attention_logit": 7.0,
        "skyladder/attention_entropy": 2.5,
    }


# --- the flag -----------------------------------------------------------------------------------


def interval_of(flags: str, log_interval: int | None = 10) -> int:
    args = add_arguments(argparse.ArgumentParser()).parse_args(flags.split())
    vars(args).update(seq_length=2048, global_batch_size=8, train_samples=None, train_iters=100)
    args.log_interval = log_interval
    config = config_from_args(args)
    assert config
    return config.attention_stats_interval


def test_the_interval_is_off_unless_given() -> None:
    assert interval_of("--skyladder-schedule linear") == 0
    assert interval_of("--skyladder-attention-stats-interval 50") == 50
    assert interval_of("--skyladder-attention-stats-interval 7", log_interval=None) == 7


@pytest.mark.parametrize("interval", [0, -10, 5, 15])
def test_an_interval_that_no_log_line_has_is_refused(interval: int) -> None:
    with pytest.raises(ValueError, match=rf"interval={interval} has to be a multiple of --log-i"):
        interval_of(f"--skyladder-attention-stats-interval {interval}")
