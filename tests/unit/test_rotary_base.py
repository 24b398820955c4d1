"""The base of a stage reaches Megatron's modules: in its first forward pass, and only then."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder import clock
from megatron_skyladder.ladder.config import SkyLadderConfig
from megatron_skyladder.ladder.schedules import WindowSchedule
from megatron_skyladder.ladder.sequence_layout import Kind
from megatron_skyladder.testing import requires_megatron

pytestmark = requires_megatron

LENGTH = 48
STAGES = "48:0.25 48:0.5,rope=20000 48:0.25,rope=500000"  # of 8 steps
BASES = {0: 10_000, 1: 10_000, 2: 20_000, 5: 20_000, 6: 500_000, 9: 500_000}


class Now:
    """The trainer's consumed samples."""

    samples = 0


@pytest.fixture
def now() -> Iterator[Now]:
    schedule = WindowSchedule("staged", final_window=LENGTH, stages=STAGES, total_steps=8)
    current = Now()
    clock.install(SkyLadderConfig(schedule, LENGTH, step_samples=1), lambda: current.samples)
    yield current
    clock.uninstall()


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns Megatron's plain module of a base."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")

    def rotary(base: int = 10_000, **options: Any) -> Any:
        return RotaryEmbedding(16, 0.5, rotary_base=base, **options)  # half of each head turns

    return rotary


def follow(rotary: Any, base: int = 10_000) -> Any:
    from megatron_skyladder.attention.rotary_base import follow_base

    follow_base(SimpleNamespace(rotary_pos_emb=rotary), base)
    return rotary


@pytest.mark.parametrize("options", [{}, {"seq_len_interpolation_factor": 4.0}], ids=str)
def test_it_is_the_module_of_that_base(now: Now, make: Any, options: dict[str, Any]) -> None:
    rotary = follow(make(**options))
    for now.samples, base in BASES.items():
        for _ in range(2):
            assert torch.equal(rotary(LENGTH), make(base, **options)(LENGTH)), now.samples
        assert torch.equal(rotary.inv_freq, make(base).inv_freq)


def test_nothing_is_made_within_a_stage(now: Now, make: Any) -> None:
    rotary = follow(make())
    kept: dict[int, set[int]] = {}
    for now.samples, base in BASES.items():
        kept.setdefault(base, set()).update({id(rotary(LENGTH)), id(rotary.inv_freq)})
    assert [len(each) for each in kept.values()] == [2, 2, 2]  # an embedding and its frequencies


def test_evaluation_and_what_is_run_again(now: Now, make: Any) -> None:
    """A batch of an earlier stage (a replay, the probe) has its own base again."""
    rotary = follow(make())
    for samples, training, base in (
        (6, True, 500_000),
        (2, True, 20_000),
        (2, False, 10_000),  # the batch before it was the first stage's
        (3, False, 20_000),
        (0, True, 10_000),
    ):
        now.samples = samples
        rotary.train(training)
        assert torch.equal(rotary(LENGTH), make(base)(LENGTH)), (samples, training)


def test_the_positions_of_a_layout_have_the_base(now: Now, make: Any) -> None:
    """Under context parallelism the embedding is made behind Megatron's cache, and kept as well."""
    from megatron_skyladder.attention.rotary import RotaryPositions

    group = SimpleNamespace(size=lambda: 2, rank=lambda: 1)
    clock.current().layout_kind = Kind.WINDOW

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rotary_pos_emb = follow(make())

        def forward(self, *_: Any) -> Any:
            return self.rotary_pos_emb(LENGTH, packed_seq=False)

    model = Model()
    RotaryPositions(model, group, checks_ids=False)
    clock.current().config = clock.current().config
    with clock.current().override(12):  # windows of 12 tokens: no zigzag
        rule = clock.current().layout_rule(LENGTH, 2, training=True)
        (layout,) = rule.layouts(1)
        assert not layout.is_zigzag
        positions = torch.from_numpy(layout.positions(1))
        for now.samples, base in BASES.items():
            found = model(None, None, None)
            assert torch.equal(found[:, 0, 0], make(base)(LENGTH)[positions, 0, 0])


def test_other_frequencies_are_refused(now: Now, make: Any) -> None:
    with pytest.raises(UsageError, match="not the plain powers of its base of 10000: it has --use"):
        follow(make(rope_scaling=True))
    with pytest.raises(UsageError, match="not the plain powers of its base of 30000"):
        follow(make(), 30_000)


def test_other_modules_are_refused(now: Now, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding

    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    with pytest.raises(UsageError, match="this model has YarnRotaryEmbedding where a plain one"):
        follow(YarnRotaryEmbedding(8, original_max_position_embeddings=LENGTH))
    with pytest.raises(UsageError, match="this model has none where a plain one is needed"):
        follow(None)


# --- the learning rate ----------------------------------------------------------------------------


def test_rates_follow_samples_whatever_the_scheduler_missed() -> None:
    """Skipped steps, and a scheduler that was not loaded: the stage is that of the batch."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    from megatron_skyladder.megatron_lm.stage_rates import begin_step, with_factor

    class Scheduler(OptimizerParamScheduler):
        get_lr = with_factor(OptimizerParamScheduler.get_lr)

    stages = "8:0.5,lr=1 8:0.25,lr=0.5 8:rest,lr=2^0.5"
    schedule = WindowSchedule("staged", final_window=8, stages=stages, total_steps=8)
    clock.install(SkyLadderConfig(schedule, 8, step_samples=4), lambda: 0)
    groups = [{"lr": 0.0}, {"lr": 0.0, "max_lr": 3.0, "min_lr": 1.0}]
    optimizer: Any = SimpleNamespace(param_groups=groups)
    scheduler = Scheduler(
        optimizer, 0.0, 1.0, 0.0, 0, 32, "linear", 0.0, 0.0, 32, "constant",
    )  # fmt: skip
    try:
        for consumed, factor in ((0, 1.0), (12, 1.0), (16, 0.5), (20, 0.5), (24, 2**0.5)):
            scheduler.step(consumed - scheduler.num_steps)
            begin_step(scheduler, consumed)
            left = 1 - consumed / 32
            assert groups[0]["lr"] == left * factor
            assert groups[1]["lr"] == (1 + 2 * left) * factor
        begin_step(scheduler, 12)  # a scheduler that is 12 samples ahead of the batch
        assert groups[0]["lr"] == 0.25
        scheduler.step(4)  # the next batch begins at 16
        assert groups[0]["lr"] == 0.125 * 0.5
    finally:
        clock.uninstall()
