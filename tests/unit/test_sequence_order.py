"""Batches reordered on the host: Megatron's cut of them yields the layout's pieces."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_skyladder.ladder.clock import Clock
from megatron_skyladder.ladder.config import SkyLadderConfig
from megatron_skyladder.ladder.schedules import WindowSchedule
from megatron_skyladder.ladder.sequence_layout import Kind, by_fragments, by_positions, by_window
from megatron_skyladder.runtime import trainer
from megatron_skyladder.runtime.document_mask import HostTap
from megatron_skyladder.runtime.sequence_order import in_order
from megatron_skyladder.runtime.trainer import Groups
from megatron_skyladder.testing import requires_megatron
from megatron_skyladder.testing.trainer import PlainTrainer

pytestmark = requires_megatron

LENGTH, SIZE, EOD, WINDOW = 48, 2, 0, 20
GROUP = SimpleNamespace(size=lambda: SIZE, rank=lambda: 0)


def installed(mask: str = "local", window: int = WINDOW) -> Clock:
    config = SkyLadderConfig(
        schedule=WindowSchedule(schedule="constant", final_window=window),
        seq_length=LENGTH,
        step_samples=1,
        mask=mask,
    )
    alone = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    groups = Groups(tp=alone, pp=alone, cp=GROUP, dp=alone, dp_cp=GROUP)
    return trainer.install(config, PlainTrainer(seq_length=LENGTH, groups=groups))


@pytest.fixture(autouse=True)
def uninstalled() -> Iterator[None]:
    yield
    trainer.uninstall()


def batch() -> dict[str, Any]:
    tokens = torch.randint(1, 100, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    tokens[0, 29] = tokens[1, 4] = tokens[1, 29] = EOD  # documents of 30, 18 and 5, 25, 18 tokens
    return {
        "tokens": tokens,
        "labels": tokens + 1,
        "loss_mask": (tokens != EOD).float(),
        "position_ids": torch.arange(LENGTH).expand(2, -1),
        "cu_seqlens": None,
    }


def megatrons_cut(rows: torch.Tensor, rank: int) -> torch.Tensor:
    chunks = rows.chunk(2 * SIZE, dim=1)
    return torch.cat((chunks[rank], chunks[2 * SIZE - 1 - rank]), dim=1)


def assert_cut_as(
    found: dict[str, Any], layouts: list[Any], given: dict[str, Any] | None = None
) -> None:
    for rank in range(SIZE):
        held = torch.from_numpy(np.stack([layout.positions(rank) for layout in layouts]))
        for key, rows in (given or batch()).items():
            if rows is not None:
                assert torch.equal(megatrons_cut(found[key], rank), rows.gather(1, held)), key
        assert torch.equal(megatrons_cut(found["position_ids"], rank), held)


def test_by_the_window() -> None:
    installed().layout_kind = Kind.WINDOW
    assert_cut_as(in_order(batch()), [by_window(LENGTH, SIZE, WINDOW)] * 2)


def test_by_the_sliding_window() -> None:
    installed("sliding").layout_kind = Kind.WINDOW
    assert_cut_as(in_order(batch()), [by_positions(LENGTH, SIZE, WINDOW)] * 2)


def test_by_each_sequences_documents() -> None:
    installed().layout_kind = Kind.SEQUENCE
    # the window grid cuts at 20 and 40 as well
    lengths = [20, 10, 10, 8], [5, 15, 10, 10, 8]
    assert_cut_as(in_order(batch()), [by_fragments(each, SIZE) for each in lengths])


def test_one_document_beside_several() -> None:
    """The first sequence keeps Megatron's order, which is no reason to leave the second one."""
    installed(window=LENGTH).layout_kind = Kind.SEQUENCE
    given = batch()
    given["tokens"][0, 29] = 1
    layouts = [by_fragments(each, SIZE) for each in ([48], [5, 25, 18])]
    assert [layout.is_zigzag for layout in layouts] == [True, False]
    assert_cut_as(in_order(given), layouts, given)


def test_zigzag_is_left_alone() -> None:
    installed()
    given = batch()
    assert in_order(given) is given


def test_the_tap_keeps_the_order_of_the_dataset() -> None:
    """Documents are found in it: in another order they would begin and end elsewhere."""
    installed().layout_kind = Kind.WINDOW
    given = batch()
    tap = HostTap(iter([given]), in_order)
    handed_on = next(tap)
    assert tap.latest is given
    assert not torch.equal(handed_on["tokens"], given["tokens"])
    assert torch.equal(handed_on["tokens"].sort().values, given["tokens"].sort().values)
