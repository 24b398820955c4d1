"""What a run logs about its windows, at every log interval, beside the losses.

| name                         | meaning                                                          |
|------------------------------|------------------------------------------------------------------|
| skyladder/window             | tokens                                                           |
| skyladder/attention_fraction | (query, key) pairs computed, relative to full causal             |
| skyladder/visible_context    | tokens that a token sees on average, itself included             |
| skyladder/fragments_per_row  | pieces of a row that attention does not cross                    |
| skyladder/tflops_per_gpu     | of the work really done, by Megatron's own count                 |
| skyladder/hours_left         | training time to the end of the run, with the windows still ahead|

and at every --skyladder-attention-stats-interval what `attention_stats` measures.

The first four are those of the latest step; with documents masked they are counted in its rows. The
rate is the mean over the log interval. The time left has no evaluation and no checkpoints in it;
where documents are masked too, their share of the work is taken to stay what it is, which is a
little pessimistic while windows grow.

Everything is known on the host. Only with documents masked, and only when logging, data-parallel
ranks add up what they counted.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch

from megatron_skyladder.attention import statistics
from megatron_skyladder.ladder import clock
from megatron_skyladder.ladder.config import SkyLadderConfig
from megatron_skyladder.ladder.costs import ATTENTION_COST, StepTime, grid_pairs, window_runs
from megatron_skyladder.ladder.fragments import visible_pairs
from megatron_skyladder.megatron_lm import compat


@dataclass
class Work:
    """Attention work of a number of rows: visible (query, key) pairs, and fragments.

    ``grid_pairs`` are the pairs there would be if no documents were masked.
    """

    rows: float = 0
    pairs: float = 0
    grid_pairs: float = 0
    fragments: float = 0

    def add(self, other: Work) -> None:
        """Count the other's rows too."""
        self.rows += other.rows
        self.pairs += other.pairs
        self.grid_pairs += other.grid_pairs
        self.fragments += other.fragments


class Meter:
    """Counts this rank's attention work: of the step under way, and since the last log line."""

    def __init__(self, config: SkyLadderConfig) -> None:
        self.config = config
        self.interval = Work()
        self.in_log = False  # whether Megatron asks for FLOPs to log them, as a mean
        self._counted = Work()

    def count(self, mask: torch.Tensor, window_len: int, num_rows: int) -> None:
        """Note the document mask of a micro-batch, int32 cu_seqlens on the host."""
        cu_seqlens = mask.numpy()
        sliding = self.config.mask == "sliding"
        pairs = visible_pairs(cu_seqlens, window_len=window_len if sliding else None)
        grid = grid_pairs(self.config)(window_len) * num_rows
        self._counted.add(Work(num_rows, pairs, grid, len(cu_seqlens) - 1))

    def step(self) -> Work:
        """Return the work of the step under way, or of one row where the window alone decides."""
        if self._counted.rows:
            return self._counted
        return grid_work(self.config, clock.current().last_window)

    def end_step(self) -> Work:
        """Add the step to the interval and return it."""
        done, self._counted = self.step(), Work()
        self.interval.add(done)
        return done


@lru_cache(maxsize=1)
def _meter_of(active: clock.Clock) -> Meter:
    return Meter(active.config)


def meter() -> Meter:
    """Return the meter that goes with the process's clock."""
    return _meter_of(clock.current())


def grid_work(config: SkyLadderConfig, window_len: int) -> Work:
    """Return the work of one row that only the window cuts."""
    cut = config.seq_length if config.mask == "sliding" else window_len
    pairs = grid_pairs(config)(window_len)
    return Work(1, pairs, pairs, -(-config.seq_length // cut))


class Outlook:
    """How much attention work lies ahead at every step of the run, documents left aside."""

    def __init__(self, config: SkyLadderConfig, total_samples: int) -> None:
        self._step_samples = config.step_samples
        self.total_steps = max(1, total_samples // config.step_samples)
        runs = window_runs(config, self.total_steps)
        pairs = grid_pairs(config)
        self.causal_pairs = pairs(config.seq_length)
        fractions = np.array([pairs(window) for _, _, window in runs]) / self.causal_pairs
        starts = np.array([first for first, _, _ in runs] + [self.total_steps])
        work = np.append(0.0, np.cumsum(fractions * np.diff(starts)))
        self._starts, self._work = starts, work

    def left(self, consumed_samples: int) -> tuple[float, float]:
        """Return (steps, steps weighted with their attention fraction) that lie ahead."""
        done = min(consumed_samples / self._step_samples, self.total_steps)
        ahead = self._work[-1] - np.interp(done, self._starts, self._work)
        return self.total_steps - done, float(ahead)


def attention_share(count: Callable[..., float], options: Any, batch_size: int) -> float:
    """Return core attention's share of Megatron's FLOPs under the full causal mask.

    Args:
        count: Megatron's ``num_floating_point_operations``. It is a L + b L^2 in the row length L,
            and the square is attention; so two lengths tell its part, in any release.
    """
    longer = copy.copy(options)
    longer.seq_length = 2 * options.seq_length
    whole = count(options, batch_size)
    return (count(longer, batch_size) / 2 - whole) / whole


def square_fraction(work: Work, seq_length: int) -> float:
    """Return sum(l^2) over a row's fragments l, relative to L^2: Megatron's unit of attention."""
    return (2 * work.pairs / work.rows - seq_length) / seq_length**2


def hours_left(
    outlook: Outlook, consumed_samples: int, *, step_seconds: float, share: float, measured: Work
) -> float:
    """Return the training time ahead.

    Args:
        step_seconds: of a step of the schedule, as measured.
        share: attention's share of the FLOPs under the full causal mask.
        measured: the work of the steps that took this time.
    """
    causal = outlook.causal_pairs * measured.rows
    model = StepTime(fixed=1 - share, attention=ATTENTION_COST * share)
    unit = step_seconds / model.seconds(measured.pairs / causal)
    steps, work = outlook.left(consumed_samples)
    work *= measured.pairs / measured.grid_pairs
    return unit * (model.fixed * steps + model.attention * work) / 3600


# --- hooks --------------------------------------------------------------------------------------


def counting_windows(original: Callable[..., float]) -> Callable[..., float]:
    """Wrap Megatron's ``num_floating_point_operations``: attention counts what windows leave."""

    def num_floating_point_operations(
        options: Any, batch_size: int, *args: Any, **kwargs: Any
    ) -> float:
        share = attention_share(original, options, batch_size)
        active = meter()
        work = active.interval if active.in_log else active.step()
        left = 1 - share * (1 - square_fraction(work, options.seq_length))
        return left * original(options, batch_size, *args, **kwargs)

    num_floating_point_operations.attention_share = partial(  # type: ignore[attr-defined]
        attention_share, original
    )
    return num_floating_point_operations


def logging_metrics(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Megatron's ``training_log``: our metrics are logged as if they were losses."""
    signature = inspect.signature(original)
    outlooks: list[Outlook] = []

    def training_log(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        log = given.arguments
        options, active = compat.args(), meter()
        if not outlooks:
            outlooks.append(Outlook(active.config, _total_samples(options)))
        latest = active.end_step()
        is_first = log.get("is_first_iteration", False)
        if not (is_first or log["iteration"] % options.log_interval == 0):
            return original(*given.args, **given.kwargs)
        active.in_log = True
        metrics = _metrics(latest, log["total_loss_dict"], options, outlooks[0])
        metrics |= _attention(active.config, log["iteration"], options)
        if log["loss_dict"]:  # only the last pipeline stage has losses, and logs them
            log["loss_dict"] = _with_metrics(
                log["loss_dict"], log["total_loss_dict"], metrics, skipped=bool(log["skipped_iter"])
            )
        result = original(*given.args, **given.kwargs)
        active.in_log = False
        if not is_first:  # after its first line Megatron does not start its sums anew either
            active.interval = Work()
        return result

    return training_log


def _total_samples(options: Any) -> int:
    return options.train_samples or options.train_iters * options.global_batch_size


def _metrics(
    latest: Work, total_loss_dict: dict[str, Any], options: Any, outlook: Outlook
) -> dict[str, float]:
    """Return the values to log; all ranks have to call this."""
    from megatron.core.num_microbatches_calculator import get_current_running_global_batch_size
    from megatron.training import get_timers, training

    active, config = meter(), clock.current().config
    if config.intra_document:
        latest, active.interval = _over_data_parallel(latest, active.interval)
    counters = ("advanced iterations", "skipped iterations")
    num_iterations = 1 + sum(total_loss_dict.get(name, 0) for name in counters)
    seconds = get_timers()("interval-time").elapsed(barrier=True, reset=False) / num_iterations
    batch_size = get_current_running_global_batch_size()
    count = training.num_floating_point_operations
    return {
        "skyladder/window": clock.current().last_window,
        "skyladder/attention_fraction": latest.pairs / latest.rows / outlook.causal_pairs,
        "skyladder/visible_context": latest.pairs / latest.rows / config.seq_length,
        "skyladder/fragments_per_row": latest.fragments / latest.rows,
        "skyladder/tflops_per_gpu": count(options, batch_size)
        / (seconds * 1e12 * options.world_size),
        "skyladder/hours_left": hours_left(
            outlook,
            options.consumed_train_samples,
            step_seconds=seconds * config.step_samples / batch_size,
            share=count.attention_share(options, batch_size),
            measured=active.interval,
        ),
    }


def _attention(config: SkyLadderConfig, iteration: int, options: Any) -> dict[str, float]:
    """Return how attention behaved, where this iteration measured it; for all ranks to call."""
    interval = config.attention_stats_interval
    if not interval or iteration % interval:
        return {}
    layers = statistics.by_layer(options.num_layers)
    statistics.write_layers(layers, iteration)
    return statistics.summary(layers)


def _over_data_parallel(*works: Work) -> tuple[Work, ...]:
    from megatron.core import mpu

    sums = torch.tensor([astuple(work) for work in works], dtype=torch.float64, device="cuda")
    torch.distributed.all_reduce(sums, group=mpu.get_data_parallel_group())
    return tuple(Work(*row) for row in sums.tolist())


def _with_metrics(
    loss_dict: dict[str, Any],
    total_loss_dict: dict[str, Any],
    metrics: dict[str, float],
    *,
    skipped: bool,
) -> dict[str, Any]:
    """Return the losses and the metrics, which stay on the host (tensors without dimensions).

    Megatron prints means over the log interval. A mean window would be one that no step had, so
    the running total is set to make the mean come out at the latest value.
    """
    for name in [name for name in total_loss_dict if name.startswith("skyladder/")]:
        del total_loss_dict[name]  # some are measured less often; Megatron would print a 0
    for name, loss in loss_dict.items():  # before ours: telemetry takes the first to be the loss
        total_loss_dict.setdefault(name, torch.zeros_like(loss))
    steps_before = total_loss_dict.get("advanced iterations", 0)
    values = {name: torch.tensor(float(value)) for name, value in metrics.items()}
    for name, value in values.items():
        total_loss_dict[name] = value * (max(1, steps_before) if skipped else steps_before)
    return {**loss_dict, **values}
