"""Losses by context length, of the sequences of Bridge's own evaluation."""

from __future__ import annotations

from typing import Any

from megatron_skyladder.ladder import clock
from megatron_skyladder.megatron_bridge.step import ForwardStep
from megatron_skyladder.runtime import trainer
from megatron_skyladder.runtime.evaluation import (
    Sample,
    Taps,
    choose_sample,
    losses_by_length,
    shorter_lengths,
)


def begin(step: ForwardStep, state: Any, model: list[Any]) -> None:
    """Record the evaluation that begins."""
    windows = shorter_lengths(clock.current().config)
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
    windows = shorter_lengths(clock.current().config)
    if taps is not None:
        losses.update(losses_by_length(model, taps, _planned(state, len(windows)), windows))


def _planned(state: Any, num_passes: int) -> Sample:
    validation = state.cfg.validation
    rows = validation.eval_global_batch_size // trainer.current().groups.dp.size()
    return choose_sample(validation.eval_iters, rows, validation.eval_micro_batch_size, num_passes)
