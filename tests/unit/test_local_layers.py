"""Local layers: which they are, what they see, and what is counted of it."""

from __future__ import annotations

import json
from argparse import Namespace
from typing import Any

import numpy as np
import pytest

from megatron_skyladder.cli import main
from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder import local_layers
from megatron_skyladder.ladder.config import SkyLadderConfig
from megatron_skyladder.ladder.costs import grid_pairs, masked_pairs
from megatron_skyladder.ladder.fragments import dense_mask, fragment_cu_seqlens, window_pairs
from megatron_skyladder.ladder.local_layers import LocalLayers, own_window
from megatron_skyladder.ladder.schedules import WindowSchedule
from megatron_skyladder.planning.visible_context import pack

FREQUENCIES = [None, 1, 2, 6, [1, 1, 0, 1, 0, 1, 1, 1]]


@pytest.mark.parametrize("skip_freq", FREQUENCIES)
def test_the_local_layers_are_megatrons(skip_freq: object) -> None:
    utils = pytest.importorskip("megatron.core.transformer.utils")
    for layer in range(1, 9):
        is_local = utils.is_layer_window_attention((16, 0), skip_freq, layer)
        assert own_window((16, 0), skip_freq, layer) == (17 if is_local else None)


def test_a_window_is_that_of_megatrons_own_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """(L, 0) are L tokens before a query and itself; Megatron hides the rest."""
    torch = pytest.importorskip("torch")
    utils = pytest.importorskip("megatron.core.transformer.utils")
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, device, **kw: ones(*size, **kw))
    for left in (0, 1, 5, 15, 40):
        hidden = utils.get_sliding_window_causal_mask(16, 16, (left, 0)).numpy()
        seen = dense_mask(16, window_len=16, own_window=own_window((left, 0), None, 1))
        assert (seen == ~hidden).all()


def test_dense_mask_of_a_local_layer_by_hand() -> None:
    mask = dense_mask(8, window_len=4, own_window=2)
    assert [int(np.flatnonzero(row)[0]) for row in mask] == [0, 0, 1, 2, 4, 4, 5, 6]


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ({"window_size": "127,0", "num_layers": 24}, LocalLayers(128, 24, 24)),
        ({"window_size": (127, 0), "num_layers": 24}, LocalLayers(128, 24, 24)),
        (
            {"window_size": "(0,0)", "window_attn_skip_freq": "6", "num_layers": 26},
            LocalLayers(1, 22, 26),
        ),
        (
            {"window_size": "8,0", "window_attn_skip_freq": "[1,0]*2+[1]", "num_layers": 5},
            LocalLayers(9, 3, 5),
        ),
        (
            {"window_size": "8,0", "window_attn_skip_freq": "2*[1,0]+[1]", "num_layers": 5},
            LocalLayers(9, 3, 5),
        ),
        ({"window_size": "8,0", "window_attn_skip_freq": [0, 0], "num_layers": 2}, None),
        ({"window_size": "8,0", "window_attn_skip_freq": 1, "num_layers": 2}, None),
        # of a hybrid model layers without attention have numbers, too: 1 and 5 are * here
        (
            {"window_size": "8,0", "window_attn_skip_freq": 5, "hybrid_layer_pattern": "*-M-*-"},
            LocalLayers(9, 1, 2),
        ),
        (  # its name up to 0.16; layers with attention are those of the pattern, not of the number
            {"window_size": "8,0", "hybrid_override_pattern": "*-M-*-", "num_layers": 6},
            LocalLayers(9, 2, 2),
        ),
        ({"window_size": "8,0"}, None),  # a plan without a model
        ({"num_layers": 2, "window_attn_skip_freq": 2}, None),
        ({"window_size": "8,1", "num_layers": 2}, None),  # refused by the table of flags
    ],
)
def test_local_layers_of_a_launch(flags: dict[str, object], found: LocalLayers | None) -> None:
    assert local_layers.local_layers(Namespace(**flags)) == found


@pytest.mark.parametrize(
    ("window_size", "trouble"),
    [
        ("128,0", ""),
        ((0, 0), ""),
        (None, ""),
        ((8, -1), "what comes after"),
        ((8, 8), "what comes after"),
        ((-1, 0), "the whole sequence"),
        ("8", "two whole numbers"),
        ("8,0,0", "two whole numbers"),
        ("a,b", "two whole numbers"),
    ],
)
def test_windows_that_are_none_of_a_causal_layer(window_size: object, trouble: str) -> None:
    found = local_layers.trouble_with(window_size)
    assert trouble in found and bool(found) == bool(trouble)


@pytest.mark.parametrize(
    ("skip_freq", "message"),
    [
        ("0", "neither a number of layers above 0 nor"),
        ("[1,2]", "neither a number"),
        ("6:1", "neither a number"),
        ("[1]*10001", "neither a number"),  # more layers than any model has: nothing is made of it
        ([1, 0], "says for 2 layers whether they are local, and there is a layer 3"),
    ],
)
def test_patterns_without_a_meaning_are_refused(skip_freq: object, message: str) -> None:
    settings = Namespace(window_size="8,0", window_attn_skip_freq=skip_freq, num_layers=3)
    with pytest.raises(UsageError, match=message):
        local_layers.local_layers(settings)


def config(mask: str, own: int, length: int) -> SkyLadderConfig:
    schedule = WindowSchedule("constant", final_window=length, total_steps=1)
    local = LocalLayers(own, 5, 6)
    return SkyLadderConfig(schedule, length, 1, mask=mask, local_layers=local)


@pytest.mark.parametrize("mask", ["local", "sliding"])
@pytest.mark.parametrize("own", [1, 5, 7, 8, 30, 48, 99])
def test_pairs_are_those_of_the_dense_masks_of_all_layers(mask: str, own: int) -> None:
    length, sliding = 48, mask == "sliding"
    settings = config(mask, own, length)
    for window in (1, 7, 8, 31, 48):
        seen = [
            int(dense_mask(length, window_len=window, sliding=sliding, own_window=each).sum())
            for each in (own, None)
        ]
        assert window_pairs(window, length, sliding=sliding, own_window=own) == seen[0]
        assert grid_pairs(settings)(window) == pytest.approx((5 * seen[0] + seen[1]) / 6)
        windows = np.array([window, length])
        assert grid_pairs(settings)(windows)[0] == pytest.approx(grid_pairs(settings)(window))
        ends = np.array([3, 20, 21, 48])
        offsets = fragment_cu_seqlens(
            ends, seq_length=length, window_len=length if sliding else window
        )
        masks = [
            dense_mask(
                length, window_len=window, document_ends=ends, sliding=sliding, own_window=each
            )
            for each in (own, None)
        ]
        masked = (5 * masks[0].sum() + masks[1].sum()) / 6
        assert masked_pairs(settings, offsets, window) == pytest.approx(masked)
        rows = pack(np.array([3, 17, 1, 27]), length, 1)
        measured = rows.pairs_by_window(
            [window], sliding=sliding, local_layers=settings.local_layers
        )
        assert measured(window) == pytest.approx(masked)


LAUNCH = (
    "--num-layers 6 --hidden-size 32 --num-attention-heads 4 --seq-length 64 --global-batch-size 4 "
    "--train-iters 100 --vocab-size 512 --position-embedding-type rope --skyladder-start-window 8 "
    "--skyladder-alpha 1"
)
LOCAL = "--window-size 15,0 --window-attn-skip-freq 6"


def planned(capsys: pytest.CaptureFixture[str], flags: str) -> dict[str, Any]:
    assert main(["plan", "--json", *f"{LAUNCH} {flags}".split()]) == 0, capsys.readouterr().err
    plan: dict[str, Any] = json.loads(capsys.readouterr().out)
    return plan


def test_plan_counts_each_kind_of_layer(capsys: pytest.CaptureFixture[str]) -> None:
    """Five layers that see 16 tokens and one that climbs from 8 to 64 over 56 of 100 steps."""
    plain, local = planned(capsys, ""), planned(capsys, LOCAL)
    assert local["windows"] == plain["windows"]
    assert "5 of 6 attention layers see 16 tokens at most" in " ".join(local["notes"])
    products = 6 * 4 * 64 * 100  # of each parameter
    matrices = plain["flops"]["constant"] - 12 * 6 * 32 * 64 * 4 * 64 * 100
    assert matrices % products == 0
    pairs = [int(dense_mask(64, window_len=64, own_window=own).sum()) for own in (16, None)]
    context = (2 * (5 * pairs[0] + pairs[1]) / 6 - 64) / 64
    attention = 12 * 6 * 32 * context * 4 * 64 * 100
    assert local["flops"]["constant"] == pytest.approx(matrices + attention)
    assert 0 < local["flops"]["saved_percent"] < plain["flops"]["saved_percent"]


def test_plan_has_the_exchange_of_each_kind_of_layer(capsys: pytest.CaptureFixture[str]) -> None:
    """Zigzag on two ranks at the full window: a local layer fetches 15 keys for each cut."""
    zigzag = "--skyladder-context-parallel-layout zigzag"
    flags = f"--context-parallel-size 2 --at 99 {zigzag}"
    plain, local = (
        planned(capsys, f"{more} {flags}")["context_parallel"]["stages"]["99"]
        for more in ("", LOCAL)
    )
    # rank 0 holds 0..15 and 48..63, rank 1 the middle: 32 + 16 keys and, of a local layer, 15 + 15
    assert plain["share_of_all_gather"] == 48 / 64
    assert local["share_of_all_gather"] == pytest.approx((5 * 30 / 64 + 48 / 64) / 6)
    assert sum(local["work_of_ranks"]) == pytest.approx(
        sum(5 * [int(dense_mask(64, window_len=64, own_window=16).sum())], 64 * 65 // 2) / 6
    )
