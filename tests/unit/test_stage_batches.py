"""Batches of stages that Megatron would stop at are refused when training begins."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("megatron.core")

from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder import clock
from megatron_skyladder.ladder.batch_sizes import BatchSizes
from megatron_skyladder.megatron_lm import stage_batches
from megatron_skyladder.runtime import pipeline


def check(
    monkeypatch: pytest.MonkeyPatch,
    batches: BatchSizes | None,
    *,
    consumed: int = 0,
    micro_batch: int = 2,
    data_parallel: int = 2,
    group: int | None = None,
) -> None:
    """Check a launch; ``group``: of an interleaved pipeline of two stages."""
    config = SimpleNamespace(batches=batches)
    monkeypatch.setattr(clock, "current", lambda: SimpleNamespace(config=config))
    options = SimpleNamespace(
        micro_batch_size=micro_batch,
        data_parallel_size=data_parallel,
        consumed_train_samples=consumed,
    )
    model: list[Any] = [object()]
    if group is not None:
        chunk = SimpleNamespace(config=SimpleNamespace(microbatch_group_size_per_vp_stage=group))
        model = [chunk, chunk]
        groups = SimpleNamespace(pp=SimpleNamespace(size=lambda: 2))
        monkeypatch.setattr(pipeline.trainer, "current", lambda: SimpleNamespace(groups=groups))
    stage_batches.check(options, model)


GROWING = BatchSizes(((0, 4), (32, 6), (64, 16)))


@pytest.mark.parametrize("consumed", [0, 32, 63])
def test_a_batch_ahead_that_cannot_be_shared_out(
    monkeypatch: pytest.MonkeyPatch, consumed: int
) -> None:
    said = (
        r"--skyladder-stages: the batch of 6 samples from sample 32 on is no multiple of "
        r"micro-batch size x data-parallel size = 4\. .* Give batch=4 or batch=8, or change"
    )
    with pytest.raises(UsageError, match=said):
        check(monkeypatch, GROWING, consumed=consumed)


def test_batches_that_are_over_may_be_those_of_fewer_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    check(monkeypatch, GROWING, consumed=64, data_parallel=8)
    check(monkeypatch, GROWING, micro_batch=1, data_parallel=2)
    check(monkeypatch, None)


def test_an_interleaved_pipeline_does_not_take_any_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of 4 over 2 stages: 4, 6, 7, 8 micro-batches and so on, but not 2 or 5."""
    check(monkeypatch, BatchSizes(((0, 16), (64, 24), (128, 28))), group=4)
    with pytest.raises(UsageError, match=r"5 micro-batches for each .* Give batch=16 or batch=24,"):
        check(monkeypatch, BatchSizes(((0, 16), (64, 20))), group=4)
    with pytest.raises(UsageError, match=r"2 micro-batches for each .* Give batch=16, or"):
        check(monkeypatch, BatchSizes(((0, 8), (64, 16))), group=4)
