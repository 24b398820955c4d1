"""What a run logs about its windows, at every log interval, beside the losses.

| name                         | meaning                                                          |
|------------------------------|------------------------------------------------------------------|
| skyladder/window             | tokens                                                           |
| skyladder/attention_fraction | visible (query, key) pairs, relative to the full causal mask     |
| skyladder/visible_context    | tokens that a token sees on average, itself included             |
| skyladder/fragments_per_row  | pieces of a sequence that attention does not cross               |
| skyladder/tflops_per_gpu     | of the work really done, by Megatron's own count                 |
| skyladder/hours_left         | training time to the end of the run, with the windows still ahead|

where local layers have a ladder of their own (`ladder.local_ladder`):

| skyladder/local_window       | tokens that one of their queries sees at most                    |

where --skyladder-stages set them, those of the step's stage:

| skyladder/rate_factor        | on the learning rate                                             |
| skyladder/rotary_base        | of rotary embeddings                                             |
| skyladder/yarn_factor        | by which YaRN scales them                                        |
| skyladder/batch              | samples in the global batch                                      |

and at every --skyladder-attention-stats-interval what `attention.statistics` measures.

The first four are those of the latest step; with documents masked they are counted in its rows. The
rate is the mean over the log interval. The time left has no evaluation and no checkpoints in it;
where documents are masked too, their share of the work is taken to stay what it is, which is a
little pessimistic while windows grow.

Everything is known on the host. Only with documents masked, and only when logging, data-parallel
ranks add up what they counted.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from megatron_skyladder.attention import statistics
from megatron_skyladder.ladder import clock
from megatron_skyladder.ladder.config import SkyLadderConfig
from megatron_skyladder.ladder.costs import (
    ATTENTION_COST,
    StepTime,
    grid_pairs,
    layer_runs,
    masked_pairs,
)
from megatron_skyladder.ladder.fragments import window_pairs
from megatron_skyladder.runtime import trainer
from megatron_skyladder.runtime.found_documents import check_first_batch


@dataclass
class Work:
    """Attention work of a number of sequences: visible (query, key) pairs, and fragments.

    Where layers differ, pairs are the mean over those with attention. ``grid_pairs`` are those that
    there would be if no documents were masked; ``rows_with_end`` are
    the sequences that hold an end-of-document token.
    """

    rows: float = 0
    pairs: float = 0
    grid_pairs: float = 0
    fragments: float = 0
    rows_with_end: float = 0

    def add(self, other: Work) -> None:
        """Count the other's sequences too."""
        self.rows += other.rows
        self.pairs += other.pairs
        self.grid_pairs += other.grid_pairs
        self.fragments += other.fragments
        self.rows_with_end += other.rows_with_end


class Meter:
    """Counts this rank's attention work: of the step under way, and since the last log line."""

    def __init__(self, config: SkyLadderConfig) -> None:
        self.config = config
        self.interval = Work()
        self.latest = Work()  # of the latest whole step
        # the same two over all data-parallel ranks, of the latest log line
        self.logged_interval = Work()
        self.logged_latest = Work()
        self.in_log = False  # whether Megatron asks for FLOPs to log them, as a mean
        self._counted = Work()
        self._first_batch = True

    def count(
        self,
        mask: torch.Tensor,
        window_len: int,
        num_rows: int,
        rows_with_end: int = 0,
        *,
        local_window: int | None = None,
    ) -> None:
        """Note the document mask of a micro-batch.

        Args:
            mask: int32 cu_seqlens on the host.
            window_len: tokens.
            num_rows: sequences in the micro-batch.
            rows_with_end: those that hold an end-of-document token.
            local_window: see `clock.Clock.local_window`.
        """
        cu_seqlens = mask.numpy()
        pairs = masked_pairs(self.config, cu_seqlens, window_len, local_window)
        grid = grid_pairs(self.config)(window_len, local_window) * num_rows
        self._counted.add(Work(num_rows, pairs, grid, len(cu_seqlens) - 1, rows_with_end))

    def snapshot(self) -> tuple[Work, ...]:
        """Return what was counted, for `restore`."""
        return tuple(replace(work) for work in (self.interval, self.latest, self._counted))

    def restore(self, works: tuple[Work, ...]) -> None:
        """Forget what was counted since a `snapshot`."""
        self.interval, self.latest, self._counted = works

    def step(self) -> Work:
        """Return the work of the step under way; of one sequence where the window alone decides."""
        if self._counted.rows:
            return self._counted
        active = clock.current()
        return grid_work(self.config, active.last_window, active.last_local_window)

    def end_step(self) -> Work:
        """Add the step to the interval and return it; all ranks have to call it.

        Raises:
            UsageError: documents are required, and the first global batch has none.
        """
        self.latest, self._counted = self.step(), Work()
        self.interval.add(self.latest)
        if self.config.intra_document and self._first_batch:
            self._first_batch = False
            (batch,) = _over_data_parallel(self.latest)
            # a rank counts sequences once for each model chunk that it holds
            num_sequences = min(int(batch.rows), self.config.step_samples)
            check_first_batch(self.config, num_sequences, int(batch.rows_with_end))
        return self.latest


@lru_cache(maxsize=1)
def _meter_of(active: clock.Clock) -> Meter:
    return Meter(active.config)


def meter() -> Meter:
    """Return the meter that goes with the process's clock."""
    return _meter_of(clock.current())


def grid_work(config: SkyLadderConfig, window_len: int, local_window: int | None = None) -> Work:
    """Return the work of one sequence that only the window cuts."""
    cut = config.seq_length if config.mask == "sliding" else window_len
    pairs = grid_pairs(config)(window_len, local_window)
    return Work(1, pairs, pairs, -(-config.seq_length // cut))


class Outlook:
    """How much attention work lies ahead at every step of the run, documents left aside."""

    def __init__(self, config: SkyLadderConfig, total_samples: int) -> None:
        self._step_samples = config.step_samples
        self.total_steps = max(1, total_samples // config.step_samples)
        runs = layer_runs(config, self.total_steps)
        pairs = grid_pairs(config)
        self.causal_pairs = window_pairs(config.seq_length, config.seq_length)
        fractions = np.array([pairs(*windows) for _, _, *windows in runs]) / self.causal_pairs
        starts = np.array([first for first, *_ in runs] + [self.total_steps])
        work = np.append(0.0, np.cumsum(fractions * np.diff(starts)))
        self._starts, self._work = starts, work

    def left(self, consumed_samples: int) -> tuple[float, float]:
        """Return (steps, steps weighted with their attention fraction) that lie ahead."""
        done = min(consumed_samples / self._step_samples, self.total_steps)
        ahead = self._work[-1] - np.interp(done, self._starts, self._work)
        return self.total_steps - done, float(ahead)


def square_fraction(work: Work, seq_length: int) -> float:
    """Return sum(l^2) over a sequence's fragments l, relative to L^2, Megatron's unit."""
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


@dataclass(frozen=True)
class Rate:
    """How fast the trainer goes, as it measures and counts itself.

    Args:
        step_seconds: wall time of a training step, the mean over the log interval.
        step_samples: sequences in the step.
        step_flops: FLOPs of the step, windows counted, over all ranks.
        num_gpus: ranks that share the step.
        attention_share: core attention's share of the FLOPs under the full causal mask.
    """

    step_seconds: float
    step_samples: int
    step_flops: float
    num_gpus: int
    attention_share: float


def count_over_data_parallel() -> None:
    """Note what is to be logged of all data-parallel ranks; all ranks have to call it.

    Only where documents are masked is anything added up: else every rank knows the work of all.
    What this rank counted stays as it is, because the interval goes on after Megatron's first line.
    """
    active = meter()
    works: tuple[Work, ...] = active.latest, active.interval
    if active.config.intra_document:
        works = _over_data_parallel(*works)
    active.logged_latest, active.logged_interval = (replace(work) for work in works)


def values(outlook: Outlook, rate: Rate) -> dict[str, float]:
    """Return what is logged of the latest step, by name."""
    active, config = meter(), clock.current().config
    latest, of_local = active.logged_latest, clock.current().last_local_window
    return {
        "skyladder/window": clock.current().last_window,
        **({} if of_local is None else {"skyladder/local_window": of_local}),
        "skyladder/attention_fraction": latest.pairs / latest.rows / outlook.causal_pairs,
        "skyladder/visible_context": latest.pairs / latest.rows / config.seq_length,
        "skyladder/fragments_per_row": latest.fragments / latest.rows,
        "skyladder/tflops_per_gpu": rate.step_flops / (rate.step_seconds * 1e12 * rate.num_gpus),
        "skyladder/hours_left": hours_left(
            outlook,
            trainer.current().consumed_samples,
            step_seconds=rate.step_seconds * config.step_samples / rate.step_samples,
            share=rate.attention_share,
            measured=active.logged_interval,
        ),
        **stage_values(),
    }


def stage_values() -> dict[str, float]:
    """Return what the stage of the latest step sets beside the window, by name."""
    values = clock.current().last_values
    named = {
        "rate_factor": values.rate_factor,
        "rotary_base": values.rope,
        "yarn_factor": values.yarn,
        "batch": values.batch,
    }
    return {f"skyladder/{name}": value for name, value in named.items() if value is not None}


def attention_values(config: SkyLadderConfig, iteration: int) -> dict[str, float]:
    """Log how attention behaved in each layer, and return the summary; for all ranks to call.

    Returns:
        Nothing where this iteration measured nothing.
    """
    interval = config.attention_stats_interval
    if not interval or iteration % interval:
        return {}
    layers = statistics.by_layer(trainer.current().num_layers)
    trainer.current().log_scalars(statistics.scalars(layers), iteration)
    return statistics.summary(layers)


def _over_data_parallel(*works: Work) -> tuple[Work, ...]:
    sums = torch.tensor([astuple(work) for work in works], dtype=torch.float64, device="cuda")
    torch.distributed.all_reduce(sums, group=trainer.current().groups.dp)
    return tuple(Work(*row) for row in sums.tolist())
