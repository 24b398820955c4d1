"""What a plan says of stages that move more than the window: the table, and what Megatron needs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_skyladder.ladder.config import SkyLadderConfig
from megatron_skyladder.ladder.flags import STEP_BATCHES
from megatron_skyladder.ladder.schedules import Staged, StageValues

FIRST_RELEASE = "0.18"  # that has --step-batch-size-schedule
_PUBLISHED = ["batch", "learning rate"]  # arXiv:2505.23971, arXiv:2510.14717
_NAMES = {
    "batch": "batch",
    "rate_factor": "learning rate",
    "rope": "RoPE base",
    "yarn": "YaRN factor",
}


@dataclass(frozen=True)
class StageRow:
    """A stage as it will happen.

    Args:
        samples: consumed before it.
        tokens: the same in tokens.
        first_window, last_window: tokens at its first and its last step.
        values: what it sets beside.
    """

    samples: int
    tokens: int
    first_window: int
    last_window: int
    values: StageValues


def rows(config: SkyLadderConfig, total_steps: int) -> Iterator[StageRow]:
    """Yield the stages of a schedule that has a table of them; those without a step are left out.

    Args:
        config: of the run.
        total_steps: of the run, those before the schedule begins included.
    """
    schedule = config.schedule
    if not isinstance(schedule, Staged):
        return
    own_steps = total_steps - config.begin_steps
    edges = [*schedule.first_steps, own_steps]
    for first, end in itertools.pairwise(edges):
        if first >= end:
            continue
        samples = config.begin_samples + first * config.step_samples
        yield StageRow(
            samples,
            samples * config.seq_length,
            schedule.window_at(first),
            schedule.window_at(end - 1),
            schedule.values_at(first),
        )


def notes(config: SkyLadderConfig, batches_to_add: str) -> list[str]:
    """Return what the reader has to know of stages, one paragraph each.

    Args:
        config: of the run.
        batches_to_add: the value of Megatron's flag, where the launch lacks it.
    """
    found = []
    moved = [_NAMES[name] for name in _NAMES if name in config.schedule.moves()]
    if batches_to_add:
        found.append(
            f'The stages set batches. Give Megatron {STEP_BATCHES} "{batches_to_add}" in place of '
            f"--global-batch-size: releases have it from {FIRST_RELEASE} on, older ones are "
            "refused."
        )
    if "YaRN factor" in moved:
        found.append(
            "The stages set YaRN's factor. Releases have the flags of YaRN (--position-embedding-"
            "type yarn, --yarn-*) from 0.19 on, older ones are refused."
        )
    if "learning rate" in moved:
        found.append(
            "lr is a factor on what Megatron's own schedule gives: warm-up, decay and the lowest "
            "rate are multiplied by it."
        )
    names = [*(["window"] if moved and _moves_window(config) else []), *moved]
    if len(names) > 1 and names != _PUBLISHED:
        found.append(
            f"{', '.join(names[:-1])} and {names[-1]} move together here. Published runs moved one "
            "or two of them; what they do together is unproven."
        )
    return found


def _moves_window(config: SkyLadderConfig) -> bool:
    schedule = config.schedule
    assert isinstance(schedule, Staged)
    windows = {stage.first_window or stage.window for stage in schedule.stages}
    return bool(windows | {stage.window for stage in schedule.stages} != {schedule.final_window})
