"""Tokens shifted for heads of multi-token prediction: token by token, on every rank, any layout."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder import clock
from megatron_skyladder.ladder.config import SkyLadderConfig
from megatron_skyladder.ladder.fragments import (
    dense_mask,
    fragment_cu_seqlens,
    rows_cu_seqlens,
)
from megatron_skyladder.ladder.schedules import WindowSchedule
from megatron_skyladder.ladder.sequence_layout import Kind, LayoutRule
from megatron_skyladder.testing import requires_megatron

pytestmark = requires_megatron

LENGTH = 48
ENDS = ([5, 6, 29], [48], [1, 47])  # of each sequence's documents


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the followers of all ranks, which gather what they are given one after the other."""
    from megatron_skyladder.attention import prediction_heads

    def make(cp_size: int, window: int, kind: Kind, sliding: bool, mask: Any) -> Any:
        config = SkyLadderConfig(
            schedule=WindowSchedule(schedule="constant", final_window=window),
            seq_length=LENGTH,
            step_samples=1,
            mask="sliding" if sliding else "local",
        )
        clock.install(config, lambda: 0).layout_kind = kind
        followers = []
        for rank in range(cp_size):
            group = SimpleNamespace(size=lambda: cp_size, rank=lambda rank=rank: rank)
            followers.append(prediction_heads._Follower(None if cp_size == 1 else group))
            followers[-1].begin(SimpleNamespace(training=True), (None, None, mask), {})

        def roll(parts: list[torch.Tensor]) -> list[Any]:
            def all_gather(out: list[torch.Tensor], own: torch.Tensor, group: Any) -> None:
                for to, part in zip(out, parts, strict=True):
                    to.copy_(part.flatten())

            monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
            return [each.roll(part) for each, part in zip(followers, parts, strict=True)]

        return roll

    yield make
    prediction_heads._Follower.end()
    clock.uninstall()


@pytest.mark.parametrize("documents", [True, False])
@pytest.mark.parametrize("sliding", [True, False])
@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("cp_size", [1, 2, 4])
@pytest.mark.parametrize("window", [1, 7, 16, LENGTH])
def test_the_next_token_counts_where_it_sees_this_one(
    ranks: Any, cp_size: int, window: int, kind: Kind, sliding: bool, documents: bool
) -> None:
    ends = ENDS if documents else ([],) * len(ENDS)
    cut = LENGTH if sliding else window
    rows = [
        fragment_cu_seqlens(np.array(it, int), seq_length=LENGTH, window_len=cut) for it in ends
    ]
    offsets = rows_cu_seqlens(rows)
    mask = torch.from_numpy(offsets) if documents else None
    rule = LayoutRule(kind, LENGTH, cp_size, window, sliding)
    held = [[torch.arange(LENGTH)] * len(ends)]
    if cp_size > 1:
        layouts = rule.layouts(len(ends), offsets if documents else None)
        held = [[torch.from_numpy(it.positions(r)) for it in layouts] for r in range(cp_size)]
    generator = torch.Generator().manual_seed(window)
    whole = torch.randint(1, 1000, (len(ends), LENGTH), generator=generator)
    expected = torch.zeros_like(whole)
    for row, it in enumerate(ends):
        seen = dense_mask(LENGTH, window_len=cut, document_ends=np.array(it, int))
        for at in range(LENGTH - 1):
            if seen[at + 1, at]:
                expected[row, at] = whole[row, at + 1]

    def parts(of: torch.Tensor) -> list[torch.Tensor]:
        return [torch.stack([of[row, p] for row, p in enumerate(own)]) for own in held]

    roll = ranks(cp_size, window, kind, sliding, mask)
    for (found, total), own in zip(roll(parts(whole)), parts(expected), strict=True):
        assert torch.equal(found, own)
        assert float(total) == float(expected.sum()) / cp_size


def test_without_cuts_it_is_megatrons(ranks: Any) -> None:
    from megatron.core.transformer.multi_token_prediction import roll_tensor

    tokens = torch.randint(1, 100, (3, LENGTH))
    ((found, total),) = ranks(1, LENGTH, Kind.WINDOW, False, None)([tokens])
    expected, count = roll_tensor(tokens)
    assert torch.equal(found, expected) and total == count and total.dtype == count.dtype


def test_megatrons_function_is_left_to_others() -> None:
    """In evaluation, and for whoever else calls it, packed sequences included."""
    from megatron_skyladder.attention import prediction_heads

    calls = []
    wrapped = prediction_heads.within_fragments(lambda *args, **kwargs: calls.append(args))
    wrapped(torch.ones(1, 4), shifts=-1, dims=-1, cp_group=None)
    assert len(calls) == 1
    assert prediction_heads.can_follow()


def test_an_older_megatron_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_skyladder.megatron_lm import hooks

    monkeypatch.setattr(hooks.prediction_heads, "can_follow", lambda: False)
    monkeypatch.setattr(hooks.hybrid, "check", lambda options: None)
    config, options = SimpleNamespace(intra_document=False), SimpleNamespace(mtp_num_layers=1)
    with pytest.raises(UsageError, match=r"--mtp-num-layers needs Megatron 0\.17 or later"):
        hooks.check_options(config, options)
