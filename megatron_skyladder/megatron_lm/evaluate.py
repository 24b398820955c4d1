"""Megatron-LM's ``evaluate``, which returns the losses by context length beside its own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from megatron_skyladder.ladder import clock
from megatron_skyladder.ladder.settings import SAME_ON_ALL_RANKS
from megatron_skyladder.megatron_lm import compat
from megatron_skyladder.runtime.evaluation import (
    Sample,
    Taps,
    choose_sample,
    losses_by_length,
    shorter_lengths,
)

logger = logging.getLogger(__name__)


def with_lengths(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Megatron's ``evaluate``: it returns the losses by length beside its own."""

    def evaluate(
        forward_step_func: Any, data_iterator: Any, model: Any, *args: Any, **kwargs: Any
    ) -> Any:
        windows = shorter_lengths(clock.current().config)
        iterations = kwargs.get("eval_iters")
        if iterations is None:
            iterations = compat.args().eval_iters
        planned = _sample(iterations, len(windows))
        taps = Taps(data_iterator, forward_step_func, planned.num_rows)
        result = original(taps.forward_step, taps.data_iterator, model, *args, **kwargs)
        losses, _, time_is_up = result
        if time_is_up or not iterations:
            return result
        losses.update(losses_by_length(model, taps, planned, windows))
        return result

    return evaluate


def warn_where_nothing_is_validated(options: Any) -> None:
    """Say so where losses by context length were asked for and Megatron will never evaluate.

    Args:
        options: Megatron's arguments, once the data is there; some forks build no validation data.
    """
    if clock.current().config.eval_lengths and not getattr(options, "do_valid", True):
        logger.warning(
            "no losses by length will come, although --skyladder-eval-lengths asks for them: this "
            "Megatron has built no validation data (--eval-iters %s, --split, or the fork).",
            getattr(options, "eval_iters", None),
            extra=SAME_ON_ALL_RANKS,
        )


def _sample(iterations: int, num_passes: int) -> Sample:
    options = compat.args()
    batch_size = getattr(options, "eval_global_batch_size", options.global_batch_size)
    micro_batch_size = getattr(options, "eval_micro_batch_size", options.micro_batch_size)
    rows = batch_size // options.data_parallel_size
    return choose_sample(iterations, rows, micro_batch_size, num_passes)
