"""Megatron-LM's ``evaluate``, which returns the losses by context length beside its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_skyladder.ladder import clock
from megatron_skyladder.megatron_lm import compat
from megatron_skyladder.runtime.evaluation import (
    Sample,
    Taps,
    announce,
    choose_sample,
    report,
    run,
)


def with_lengths(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Megatron's ``evaluate``: it returns the losses by length beside its own."""

    def evaluate(
        forward_step_func: Any, data_iterator: Any, model: Any, *args: Any, **kwargs: Any
    ) -> Any:
        config = clock.current().config
        windows = tuple(length for length in config.eval_lengths if length < config.seq_length)
        sample = _sample(kwargs.get("eval_iters"), windows)
        taps = Taps(data_iterator, forward_step_func, sample.num_recorded)
        result = original(taps.forward_step, taps.data_iterator, model, *args, **kwargs)
        losses, _, time_is_up = result
        if not time_is_up:
            pieces = run(model, taps.rows(sample), windows, sample)
            if taps.plain_losses:  # the last pipeline stage
                plain = torch.cat(taps.plain_losses)[: sample.num_rows]
                losses.update(report(plain, pieces, windows, config.seq_length))
        return result

    return evaluate


def _sample(eval_iters: int | None, windows: tuple[int, ...]) -> Sample:
    options = compat.args()
    iterations = options.eval_iters if eval_iters is None else eval_iters
    batch_size = getattr(options, "eval_global_batch_size", options.global_batch_size)
    micro_batch_size = getattr(options, "eval_micro_batch_size", options.micro_batch_size)
    rows = batch_size // options.data_parallel_size
    sample = choose_sample(iterations, rows, micro_batch_size, len(windows))
    announce(iterations * rows, sample, windows, options.seq_length)
    return sample
