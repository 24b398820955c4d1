"""Pictures of planned runs. matplotlib is loaded when one is asked for, and not before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_skyladder.planning.estimate import Plan
from megatron_skyladder.planning.text import scientific
from megatron_skyladder.report import images

POINTS = 1000  # along the run
FORMATS = (".png", ".svg")
LINES = ("-", "-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))  # lines may lie on each other


def draw_plans(path: str, plans: Sequence[Plan]) -> None:
    """Draw window, attention work and cost against tokens, one line for each plan.

    Raises:
        ValueError: the file's ending is no picture's, or matplotlib is missing.
    """
    figure, ((window, work, cost),) = _figure(path)
    cost_unit = "GPU-hours" if plans[0].time else "FLOPs x 1e20"
    scale, unit = _token_unit(max(plan.tokens for plan in plans))
    for index, plan in enumerate(plans):
        steps = _steps(plan)
        tokens = [step * plan.batch_tokens / scale for step in [*steps, plan.total_steps]]
        windows = [plan.window(step) for step in steps]
        fractions = [100 * plan.fraction_at(step) for step in steps]
        costs = _cumulated(plan, steps)
        style = {
            "color": images.colour_of(index),
            "linestyle": LINES[index % len(LINES)],
            "label": f"{plan.name}: {_total(plan, costs[-1])}",
        }
        window.plot(tokens, [*windows, windows[-1]], drawstyle="steps-post", **style)
        work.plot(tokens, [*fractions, fractions[-1]], drawstyle="steps-post", **style)
        cost.plot(tokens, costs, **style)
    if len(plans) == 1:
        figure.suptitle(plans[0].config.fingerprint, fontsize=9, x=0.01, ha="left")
        _references(work, cost, plans[0], scale)
    titles = ("Window", "Attention work", "Cost so far")
    units = ("tokens", "% of full causal", cost_unit)
    for axes, title, label in zip((window, work, cost), titles, units, strict=True):
        _label(axes, title, label, f"training tokens ({unit})")
    longest = max(plan.config.seq_length for plan in plans)
    window.set_yticks([longest * part // 4 for part in range(5)])
    _legend(figure, (window, work, cost))
    images.save(figure, path)


def draw_comparison(path: str, plans: Sequence[Plan]) -> None:
    """Draw window, mean visible context and what is saved so far against tokens.

    Raises:
        ValueError: the file's ending is no picture's, or matplotlib is missing.
    """
    figure, ((window, context, saved),) = _figure(path)
    timed = plans[0].time is not None
    scale, unit = _token_unit(max(plan.tokens for plan in plans))
    for index, plan in enumerate(plans):
        steps = _steps(plan)
        tokens = [step * plan.batch_tokens / scale for step in [*steps, plan.total_steps]]
        windows = [plan.window(step) for step in steps]
        contexts = [plan.context_at(step) for step in steps]
        full = _step_cost(plan, plan.pairs(plan.config.seq_length))
        costs = _cumulated(plan, steps)
        gained = [
            step * full - cost for step, cost in zip([*steps, plan.total_steps], costs, strict=True)
        ]
        style = {
            "color": images.colour_of(index),
            "linestyle": LINES[index % len(LINES)],
            "label": f"{plan.name}: {_total(plan, costs[-1])}",
        }
        window.plot(tokens, [*windows, windows[-1]], drawstyle="steps-post", **style)
        context.plot(tokens, [*contexts, contexts[-1]], drawstyle="steps-post", **style)
        saved.plot(tokens, gained, **style)
    titles = ("Window", "Mean visible context", "Saved so far")
    units = ("tokens", "tokens, of a token", "GPU-hours" if timed else "FLOPs x 1e20")
    for axes, title, label in zip((window, context, saved), titles, units, strict=True):
        _label(axes, title, label, f"training tokens ({unit})")
    _legend(figure, (window, context, saved))
    images.save(figure, path)


def _total(plan: Plan, cost: float) -> str:
    """Return what the run costs, and what it saves against a constant window."""
    constant = plan.total_steps * _step_cost(plan, plan.pairs(plan.config.seq_length))
    change = round(100 * (cost / constant - 1), 1)
    total = f"{cost:,.4g} GPU-hours" if plan.time else f"{scientific(cost * 1e20)} FLOPs"
    return f"{total}, {change:+.1f} %" if change else total


def _references(work: Any, cost: Any, plan: Plan, scale: float) -> None:
    """Draw what the run would be without the ladder, and what documents alone would leave."""
    style = {"color": "#888888", "linewidth": 1}
    end = plan.total_steps * _step_cost(plan, plan.pairs(plan.config.seq_length))
    cost.plot([0, plan.tokens / scale], [0, end], label="constant window", linestyle="--", **style)
    if plan.documents:
        left = plan.pairs_under(ladder=False, documents=True) / plan.causal_pairs
        name = "documents masked, full window"
        work.axhline(100 * float(left), label=name, linestyle=":", **style)


def _token_unit(tokens: int) -> tuple[float, str]:
    return next((u for u in ((1e12, "T"), (1e9, "B"), (1e6, "M")) if tokens >= u[0]), (1.0, ""))


def _cumulated(plan: Plan, steps: list[int]) -> list[float]:
    """Return the cost from the start to each of the steps and to the end."""
    ends = [*steps[1:], plan.total_steps]
    so_far = [0.0]
    for first, end in zip(steps, ends, strict=True):
        so_far.append(so_far[-1] + (end - first) * _step_cost(plan, plan.pairs_at(first)))
    return so_far


def _step_cost(plan: Plan, pairs: float) -> float:
    """Return GPU-hours of a step with so many pairs, or FLOPs in 1e20 where no time is known."""
    if plan.time:
        return plan.time.gpu_hours(1, pairs / plan.causal_pairs)
    return plan.flops(pairs) / plan.total_steps / 1e20


def _steps(plan: Plan) -> list[int]:
    """Return about POINTS steps along the run, those where a rare change lies among them."""
    even = {plan.total_steps * point // POINTS for point in range(POINTS)}
    if len(plan.layer_runs) <= POINTS:
        even |= {first for first, *_ in plan.layer_runs}
    return sorted(even)


def _label(axes: Any, title: str, unit: str, tokens: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_ylabel(unit, fontsize=8)
    axes.set_xlabel(tokens, fontsize=8)
    axes.set_ylim(bottom=0)
    axes.margins(x=0.01)
    axes.yaxis.set_major_formatter("{x:,.5g}")
    axes.tick_params(labelsize=8)
    axes.grid(color="#eeeeee")
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Any, panels: Sequence[Any]) -> None:
    """Name each line once, below all panels."""
    lines = {line.get_label(): line for axes in panels for line in axes.get_lines()}
    figure.legend(
        lines.values(), lines.keys(), loc="outside lower center", ncols=3, fontsize=8, frameon=False
    )


def _figure(path: str) -> tuple[Any, Any]:
    if Path(path).suffix.lower() not in FORMATS:
        raise ValueError(f"--plot {path}: give a file that ends in {' or '.join(FORMATS)}.")
    if not Path(path).parent.is_dir():
        raise ValueError(f"--plot {path}: there is no folder {Path(path).parent}. Make it first.")
    try:
        return images.make_panels(1, 3, (12, 4))
    except ImportError:
        raise ValueError(
            "--plot needs matplotlib, which is not installed here. "
            "pip install 'megatron-skyladder[plot]', or leave --plot out."
        ) from None
