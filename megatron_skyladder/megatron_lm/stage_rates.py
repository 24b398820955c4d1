"""The learning rate of a stage: a factor on what Megatron's own scheduler gives, at one place.

Warm-up and decay stay Megatron's. The scheduler counts samples, and after each step it sets the
rate of the next one, which Megatron logs; so the factor is that of the next batch as well, and the
logged rate is the one that is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from megatron_skyladder.ladder import clock

# Samples that were consumed without the scheduler: steps that were skipped, a scheduler that was
# not loaded. Usually 0.
_uncounted: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


def with_factor(original: Callable[..., float]) -> Callable[..., float]:
    """Wrap ``OptimizerParamScheduler.get_lr``."""

    def get_lr(self: Any, param_group: Any) -> float:
        samples = max(0, self.num_steps + _uncounted.get(self, 0))
        factor = clock.current().config.values_at_samples(samples).rate_factor
        rate = original(self, param_group)
        return rate if factor is None else rate * factor

    return get_lr


def begin_step(scheduler: Any, consumed_samples: int) -> None:
    """Make sure that the rates are those of the batch that begins, whatever was skipped before it.

    Args:
        scheduler: Megatron's OptimizerParamScheduler.
        consumed_samples: before the batch.
    """
    uncounted = consumed_samples - scheduler.num_steps
    if uncounted != _uncounted.get(scheduler, 0):
        _uncounted[scheduler] = uncounted
        scheduler.step(0)
