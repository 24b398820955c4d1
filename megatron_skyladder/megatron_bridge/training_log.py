"""What a run of Bridge logs of its windows, and the FLOPs that they leave."""

from __future__ import annotations

import logging
from typing import Any

from megatron.bridge.training.utils.flop_utils import num_floating_point_operations
from megatron.core.num_microbatches_calculator import get_current_running_global_batch_size

from megatron_skyladder.runtime import metrics, trainer
from megatron_skyladder.runtime.metrics import Outlook, Rate, Work

logger = logging.getLogger(__name__)


class TrainingLog:
    """Counts each step into Bridge's FLOPs, and logs at every log interval.

    Args:
        cfg: Bridge's finished ConfigContainer.
    """

    def __init__(self, cfg: Any) -> None:
        self._cfg = cfg
        self._outlook: Outlook | None = None
        self._steps = 0  # since the last log line

    def end_step(self, state: Any) -> None:
        """Count the step that has ended, and log where it is due; all ranks have to call this.

        Raises:
            UsageError: documents are required, and the first global batch has none.
        """
        active = metrics.meter()
        work = active.end_step()
        self._steps += 1
        self._count_flops(state, work)
        iteration = trainer.current().iteration
        if iteration % self._cfg.logger.log_interval:
            return
        if self._outlook is None:
            self._outlook = Outlook(active.config, trainer.current().total_samples)
        metrics.count_over_data_parallel()
        values = metrics.values(self._outlook, self._rate(state, active.logged_interval))
        values |= metrics.attention_values(active.config, iteration)
        active.interval, self._steps = Work(), 0
        trainer.current().log_scalars(values, iteration)
        fields = " | ".join(f"{name}: {value:.6g}" for name, value in values.items())
        logger.info("iteration %d/%d | %s", iteration, self._cfg.train.train_iters, fields)

    def _count_flops(self, state: Any, work: Work) -> None:
        """Let Bridge count what attention really does, in all its rates and totals.

        On every rank: on the last pipeline stage, which logs, Bridge has no tokens to count, and
        falls back to full attention.
        """
        samples = get_current_running_global_batch_size() // trainer.current().groups.dp.size()
        seq_length = trainer.current().seq_length
        state._flops_seqlen_sum = samples * seq_length
        state._flops_seqlen_sq_sum = round(samples * _squares(work, seq_length))
        state._flops_requires_global_reduce = metrics.meter().config.intra_document

    def _rate(self, state: Any, work: Work) -> Rate:
        seconds = state.timers("interval-time").elapsed(barrier=True, reset=False)
        samples = get_current_running_global_batch_size()
        seq_length = trainer.current().seq_length
        causal = self._flops(samples, seq_length**2)
        half = self._flops(samples, seq_length**2 / 2)
        return Rate(
            step_seconds=seconds / self._steps,
            step_samples=samples,
            step_flops=self._flops(samples, _squares(work, seq_length)),
            num_gpus=_world_size(),
            attention_share=2 * (causal - half) / causal,
        )

    def _flops(self, samples: int, squares: float) -> float:
        """Return Bridge's count for a step, with the sum of squared lengths of one sequence."""
        return num_floating_point_operations(
            self._cfg,
            batch_size=samples,
            seqlen_sum=samples * trainer.current().seq_length,
            seqlen_squared_sum=round(samples * squares),
        )


def _squares(work: Work, seq_length: int) -> float:
    """Return the sum of l^2 over a sequence's fragments l: Megatron's unit of attention."""
    return metrics.square_fraction(work, seq_length) * seq_length**2


def _world_size() -> int:
    import torch

    return torch.distributed.get_world_size()
