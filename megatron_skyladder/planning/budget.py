"""Which rate fits a budget: a share of the run, so many tokens, so many hours.

The schedule is the plan's, at another rate. Where it begins later (--skyladder-begin-samples), the
share is of the steps from there on, and those before it count as well.
"""

from __future__ import annotations

from collections.abc import Callable
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

    share: of the steps from where the schedule begins, over which the window grows.
    alpha: the same as a rate, in tokens per step.
    steps, tokens: the length of the run.
    hours: predicted, on all GPUs (`TimeModel.unit` where their number is not known); None without a
        time model.
    """

    share: Fraction
    alpha: Fraction
    steps: int
    tokens: int
    hours: float | None


def fit_share(plan: Plan, share: Fraction) -> Fit:
    """Return the plan's run, growing over this share."""
    hours = None
    if plan.time:
        hours = _hours_before(plan) + _hours(plan, plan.steps_ahead, _timed_work(plan)(share))
    return _fit(plan, share, plan.steps_ahead, hours)


def fit_hours(plan: Plan, share: Fraction, hours: float) -> Fit:
    """Return the longest run that grows over this share and ends within the hours.

    Raises:
        ValueError: there is no time model, or not even a step fits.
    """
    before = _hours_before(plan)
    if 0 < hours <= before:
        raise ValueError(
            f"--budget-hours={hours:g}: the {plan.config.begin_steps:,} steps before "
            f"--skyladder-begin-samples take {before:.3g} hours. Give more hours or GPUs."
        )
    one_step = _hours(plan, 1, _timed_work(plan)(share))
    ahead = int((hours - before) / one_step)
    if ahead < 1:
        raise ValueError(
            f"--budget-hours={hours:g}: a step takes {one_step:.3g} hours. Give more hours or GPUs."
        )
    return _fit(plan, share, ahead, before + ahead * one_step)


def fit_tokens_and_hours(plan: Plan, hours: float) -> Fit | None:
    """Return the plan's run with the smallest share that ends within the hours.

    A longer growth saves more time: None where not even growth over the whole run is enough.
    """
    before, work = _hours_before(plan), _timed_work(plan)

    def needed(percent: int) -> float:
        return before + _hours(plan, plan.steps_ahead, work(Fraction(percent, 100)))

    low, high = 1, 100  # percent; the time falls with the share
    if needed(high) > hours:
        return None
    while low < high:
        middle = (low + high) // 2
        if needed(middle) <= hours:
            high = middle
        else:
            low = middle + 1
    return _fit(plan, Fraction(low, 100), plan.steps_ahead, needed(low))


def _fit(plan: Plan, share: Fraction, steps_ahead: int, hours: float | None) -> Fit:
    alpha = alpha_for_share(plan.config.schedule, steps_ahead, share)
    steps = plan.config.begin_steps + steps_ahead
    return Fit(share, alpha, steps, steps * plan.batch_tokens, hours)


def _hours_before(plan: Plan) -> float:
    """Return the hours of the steps before the schedule begins, at its first window."""
    over_mean = plan.over_mean(plan.window(0), plan.local_window(0))
    return _hours(plan, plan.config.begin_steps, plan.fraction_at(0) * over_mean)


def _hours(plan: Plan, steps: int, fraction: float) -> float:
    if plan.time is None:
        raise ValueError(
            "--budget-hours needs a time for each step. Give --device, --tflops or --calibrate."
        )
    return plan.time.gpu_hours(steps, fraction) / (plan.time.gpus or 1)


def _timed_work(plan: Plan) -> Callable[[Fraction], float]:
    """Return share -> the attention work that time goes by (`Plan.timed_fractions`).

    Of the steps from where the schedule begins. How much more the busiest context-parallel rank has
    is counted for growth over all of them and for the final window. Growth over a share spends that
    share of its steps in the one, the rest in the other: counting takes seconds where documents are
    masked, and is asked for many shares.
    """
    if plan.context_parallel_size == 1:
        return lambda share: _growing(plan, share).mean_fraction
    parts = (_growing(plan, Fraction(1)), _at_the_end(plan))
    means = [part.mean_fraction for part in parts]
    busiest = [part.timed_fractions[1] for part in parts]

    def work(share: Fraction) -> float:
        of_busiest, of_mean = (
            float(share) * growing + (1 - float(share)) * final
            for growing, final in (busiest, means)
        )
        return _growing(plan, share).mean_fraction * of_busiest / of_mean

    return work


def _growing(plan: Plan, share: Fraction) -> Plan:
    """Return a short run whose window grows over this share."""
    schedule = replace(
        plan.config.schedule, alpha=None, expand_fraction=share, total_steps=_MINIATURE_STEPS
    )
    local = plan.config.local_schedule
    if local is not None:
        local = replace(local, total_steps=_MINIATURE_STEPS)
    config = replace(plan.config, schedule=schedule, local_schedule=local, begin_samples=0)
    return replace(plan, config=config, total_steps=_MINIATURE_STEPS)


def _at_the_end(plan: Plan) -> Plan:
    """Return a run at the final window."""
    final = plan.config.schedule.final_window
    schedule = WindowSchedule("constant", final, final)
    config = replace(plan.config, schedule=schedule, local_schedule=None, begin_samples=0)
    return replace(plan, config=config, total_steps=1)
