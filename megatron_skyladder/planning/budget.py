"""Which rate fits a budget: a share of the run, so many tokens, so many hours.

The window grows linearly here, from the plan's start window to its final one.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import NamedTuple

from megatron_skyladder.ladder.schedules import WindowSchedule
from megatron_skyladder.planning.estimate import Plan, alpha_for_share

# Mean attention work depends on the share, hardly on the number of steps: a short run stands for
# a long one to within 0.1 % of full causal.
_MINIATURE_STEPS = 2000


class Fit(NamedTuple):
    """A run that keeps to the budget.

    share: of the run over which the window grows.
    alpha: the same as a rate, in tokens per step.
    steps, tokens: the length of the run.
    hours: predicted, on all GPUs (GPU-hours where their number is not known); None without a time
        model.
    """

    share: Fraction
    alpha: Fraction
    steps: int
    tokens: int
    hours: float | None


def fit_share(plan: Plan, share: Fraction, steps: int | None = None) -> Fit:
    """Return the run of so many steps (default: the plan's) that grows over this share of it."""
    steps = steps or plan.total_steps
    return Fit(
        share=share,
        alpha=alpha_for_share(plan.config, steps, share),
        steps=steps,
        tokens=steps * plan.batch_tokens,
        hours=_hours(plan, steps, _mean_fraction(plan, share)) if plan.time else None,
    )


def fit_hours(plan: Plan, share: Fraction, hours: float) -> Fit:
    """Return the longest run that grows over this share of it and ends within the hours.

    Raises:
        ValueError: there is no time model, or not even a step fits.
    """
    one_step = _hours(plan, 1, _mean_fraction(plan, share))
    steps = int(hours / one_step)
    if steps < 1:
        raise ValueError(
            f"--budget-hours={hours:g}: a step takes {one_step:.3g} hours. Give more hours or GPUs."
        )
    return fit_share(plan, share, steps)


def fit_tokens_and_hours(plan: Plan, hours: float) -> Fit | None:
    """Return the plan's run with the smallest share that ends within the hours.

    A longer growth saves more time: None where not even growth over the whole run is enough.
    """
    low, high = 1, 101  # percent; the time falls with the share
    while low < high:
        middle = (low + high) // 2
        fraction = _mean_fraction(plan, min(Fraction(middle, 100), Fraction(1)))
        if _hours(plan, plan.total_steps, fraction) <= hours:
            high = middle
        else:
            low = middle + 1
    return fit_share(plan, Fraction(low, 100)) if low <= 100 else None


def _hours(plan: Plan, steps: int, fraction: float) -> float:
    if plan.time is None:
        raise ValueError(
            "--budget-hours needs a time for each step. Give --device, --tflops or --calibrate."
        )
    return plan.time.gpu_hours(steps, fraction) / (plan.time.gpus or 1)


def _mean_fraction(plan: Plan, share: Fraction) -> float:
    """Return the mean attention work of growth over this share."""
    schedule = plan.config.schedule
    linear = WindowSchedule(
        start_window=schedule.start_window,
        final_window=schedule.final_window,
        expand_fraction=share,
        total_steps=_MINIATURE_STEPS,
    )
    local = plan.config.local_schedule
    if local is not None:
        local = replace(local, total_steps=_MINIATURE_STEPS)
    config = replace(plan.config, schedule=linear, local_schedule=local, begin_samples=0)
    return replace(plan, config=config, total_steps=_MINIATURE_STEPS).mean_fraction
