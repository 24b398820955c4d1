"""Megatron-LM's log line and FLOPs, with what windows do to them.

Two hooks: ``num_floating_point_operations`` counts the attention that windows leave, in all of
Megatron's rates, and ``training_log`` puts the runtime's metrics on its line, beside the losses.
They are not among the losses themselves, of which forks compute what only losses have, such as a
perplexity.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from megatron_skyladder.megatron_lm import compat
from megatron_skyladder.runtime import metrics, trainer
from megatron_skyladder.runtime.metrics import Outlook, Rate, Work, square_fraction


def attention_share(count: Callable[..., float], options: Any, batch_size: int) -> float:
    """Return core attention's share of Megatron's FLOPs under the full causal mask.

    Args:
        count: Megatron's ``num_floating_point_operations``. It is a L + b L^2 in the sequence's
            length L, and the square is attention; so two lengths tell its part, in any release.
    """
    longer = copy.copy(options)
    longer.seq_length = 2 * options.seq_length
    whole = count(options, batch_size)
    return (count(longer, batch_size) / 2 - whole) / whole


def counting_windows(original: Callable[..., float]) -> Callable[..., float]:
    """Wrap Megatron's ``num_floating_point_operations``: attention counts what windows leave."""

    @functools.wraps(original)
    def num_floating_point_operations(
        options: Any, batch_size: int, *args: Any, **kwargs: Any
    ) -> float:
        share = attention_share(original, options, batch_size)
        active = metrics.meter()
        work = active.logged_interval if active.in_log else active.step()
        left = 1 - share * (1 - square_fraction(work, options.seq_length))
        return left * original(options, batch_size, *args, **kwargs)

    return num_floating_point_operations


def logging_metrics(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Megatron's ``training_log``: our metrics are logged beside its losses."""
    signature = inspect.signature(original)
    outlooks: list[Outlook] = []

    def training_log(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        log = given.arguments
        options, active = compat.args(), metrics.meter()
        if not outlooks:
            outlooks.append(Outlook(active.config, trainer.current().total_samples))
        active.end_step()
        is_first = log.get("is_first_iteration", False)
        if not (is_first or log["iteration"] % options.log_interval == 0):
            return original(*given.args, **given.kwargs)
        active.in_log = True
        metrics.count_over_data_parallel()
        values = metrics.values(outlooks[0], _rate(log["total_loss_dict"], options))
        values |= metrics.attention_values(active.config, log["iteration"])
        if log["loss_dict"]:  # only the last pipeline stage has losses, and logs them
            put_on_line(
                log["loss_dict"], log["total_loss_dict"], values, skipped=bool(log["skipped_iter"])
            )
            if log["iteration"] % options.tensorboard_log_interval == 0:
                trainer.current().log_scalars(values, log["iteration"])
        result = original(*given.args, **given.kwargs)
        active.in_log = False
        if not is_first:  # after its first line Megatron does not start its sums anew either
            active.interval = Work()
        return result

    return training_log


def _rate(total_loss_dict: dict[str, Any], options: Any) -> Rate:
    """Return what Megatron measured since its last log line."""
    from megatron.core.num_microbatches_calculator import get_current_running_global_batch_size
    from megatron.training import get_timers, training

    counters = ("advanced iterations", "skipped iterations")
    num_iterations = 1 + sum(total_loss_dict.get(name, 0) for name in counters)
    batch_size = get_current_running_global_batch_size()
    count = training.num_floating_point_operations
    return Rate(
        step_seconds=get_timers()("interval-time").elapsed(barrier=True, reset=False)
        / num_iterations,
        step_samples=batch_size,
        step_flops=count(options, batch_size),
        num_gpus=options.world_size,
        attention_share=attention_share(inspect.unwrap(count), options, batch_size),
    )


def put_on_line(
    loss_dict: dict[str, Any],
    total_loss_dict: dict[str, Any],
    metrics: dict[str, float],
    *,
    skipped: bool,
) -> None:
    """Have Megatron print the metrics, on its line and after its losses.

    It prints the mean over the log interval of every running total. A mean window would be one that
    no step had, so the total is set to make the mean come out at the latest value.

    Args:
        loss_dict: the losses of the step, which Megatron is about to add to the totals.
        total_loss_dict: the running totals; gets the metrics, as host tensors.
        metrics: the latest values.
        skipped: whether the step will not be counted.
    """
    for name in [name for name in total_loss_dict if name.startswith("skyladder/")]:
        del total_loss_dict[name]  # some are measured less often; Megatron would print a 0
    for name, loss in loss_dict.items():  # before ours: telemetry takes the first to be the loss
        total_loss_dict.setdefault(name, torch.zeros_like(loss))
    steps = total_loss_dict.get("advanced iterations", 0) + (0 if skipped else 1)
    for name, value in metrics.items():
        total_loss_dict[name] = torch.tensor(float(value) * max(1, steps))
