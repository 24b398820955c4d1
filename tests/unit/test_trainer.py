"""What ends with a trainer: nothing that it made may be found by the next one."""

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")

from megatron_skyladder.attention import core_attention, recurrent  # noqa: E402
from megatron_skyladder.attention.segments import Rows  # noqa: E402
from megatron_skyladder.ladder.config import SkyLadderConfig  # noqa: E402
from megatron_skyladder.ladder.schedules import WindowSchedule  # noqa: E402
from megatron_skyladder.ladder.sequence_layout import of_sequence  # noqa: E402
from megatron_skyladder.runtime import trainer  # noqa: E402
from megatron_skyladder.testing.trainer import PlainTrainer  # noqa: E402


def test_a_step_begins_with_its_window_and_without_masks_of_the_one_before() -> None:
    samples = [0]
    schedule = WindowSchedule(start_window=8, final_window=64, alpha=4)
    config = SkyLadderConfig(schedule=schedule, seq_length=64, step_samples=1)
    active = trainer.install(config, PlainTrainer(seq_length=64))
    active._consumed_samples = lambda: samples[0]
    rows = Rows(64, 1, 64, False, torch.device("cpu"))
    for cache in (core_attention._masks, recurrent._masks):
        cache.get(torch.tensor([0, 8, 64], dtype=torch.int32), rows)
        assert cache._entries
    of_sequence((8, 56), 2)
    samples[0] = 3
    trainer.begin_step()
    assert active.last_window == 20
    assert not core_attention._masks._entries and not recurrent._masks._entries
    assert of_sequence.cache_info().currsize == 0
    trainer.uninstall()


def test_the_host_group_is_made_once_and_goes_with_its_trainer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A process that starts anew has other process groups; messages in the old one would hang."""
    made: list[list[int]] = []

    def new_group(ranks: list[int], **_: Any) -> object:
        made.append(ranks)
        return object()

    monkeypatch.setattr(torch.distributed, "new_group", new_group)
    trainer.uninstall()
    first = trainer.host_group((0, 1))
    assert trainer.host_group((0, 1)) is first and made == [[0, 1]]
    trainer.uninstall()
    assert trainer.host_group((0, 1)) is not first and made == [[0, 1]] * 2
    trainer.uninstall()
