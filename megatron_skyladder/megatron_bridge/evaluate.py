"""Losses by context length, of the sequences of Bridge's own evaluation."""

from __future__ import annotations

import logging
from typing import Any

import torch

from megatron_skyladder.ladder import clock
from megatron_skyladder.megatron_bridge.step import ForwardStep
from megatron_skyladder.runtime import trainer
from megatron_skyladder.runtime.evaluation import (
    Sample,
    Taps,
    announce,
    choose_sample,
    report,
    run,
)

logger = logging.getLogger(__name__)


def begin(step: ForwardStep, state: Any, model: list[Any]) -> None:
    """Record the evaluation that begins."""
    windows = _windows()
    step.taps = None
    if windows:
        num_rows = _planned(state, len(windows)).num_rows
        step.taps = Taps([iter(()) for _ in model], None, num_rows)


def end(step: ForwardStep, state: Any, model: list[Any], losses: dict[str, Any]) -> None:
    """Run some of its sequences again and add their losses; all ranks have to call this.

    Args:
        step: has recorded them.
        state: Bridge's GlobalState.
        model: this rank's model chunks, in evaluation mode; they stay in it.
        losses: those of the evaluation, to which ours are added on the last pipeline stage.
    """
    taps, step.taps = step.taps, None
    windows, seq_length = _windows(), trainer.current().seq_length
    if taps is None:
        return
    sample = taps.agree(_planned(state, len(windows)), len(windows))
    if sample is None:
        logger.warning("no losses by length: a rank has seen no sequence in this validation")
        return
    announce(taps.num_seen, sample, windows, seq_length)
    pieces = run(model, taps.rows(sample), windows, sample)
    if taps.plain_losses:  # the last pipeline stage
        plain = torch.cat(taps.plain_losses)[: sample.num_rows]
        losses.update(report(plain, pieces, windows, seq_length))


def _windows() -> tuple[int, ...]:
    config = clock.current().config
    return tuple(length for length in config.eval_lengths if length < config.seq_length)


def _planned(state: Any, num_passes: int) -> Sample:
    validation = state.cfg.validation
    rows = validation.eval_global_batch_size // trainer.current().groups.dp.size()
    return choose_sample(validation.eval_iters, rows, validation.eval_micro_batch_size, num_passes)
