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

    There is no cost where the model of a plan cannot be counted.

    Raises:
        ValueError: the file's ending is no picture's, or matplotlib is missing.
    """
    unit_of_cost = _unit_of_cost(plans)
    figure, panels = _figure(path, 3 if unit_of_cost else 2)
    window, work = panels[:2]
    scale, unit = _token_unit(max(plan.tokens for plan in plans))
    for index, plan in enumerate(plans):
        steps = _steps(plan)
        tokens = [step * plan.batch_tokens / scale for step in [*steps, plan.total_steps]]
        windows = [plan.window(step) for step in steps]
        fractions = [100 * plan.fraction_at(step) for step in steps]
        style = _style(plan, index, unit_of_cost)
        window.plot(tokens, [*windows, windows[-1]], drawstyle="steps-post", **style)
        work.plot(tokens, [*fractions, fractions[-1]], drawstyle="steps-post", **style)
        if unit_of_cost:
            panels[2].plot(tokens, _cumulated(plan, steps), **style)
    if len(plans) == 1:
        figure.suptitle(plans[0].config.fingerprint, fontsize=9, x=0.01, ha="left")
        _references(panels, plans[0], scale)
    titles = ("Window", "Attention work", "Cost so far")
    units = ("tokens", "% of full causal", unit_of_cost)
    for axes, title, label in zip(panels, titles, units, strict=False):
        _label(axes, title, label, f"training tokens ({unit})")
    longest = max(plan.config.seq_length for plan in plans)
    window.set_yticks([longest * part // 4 for part in range(5)])
    _legend(figure, panels)
    images.save(figure, path)


def draw_comparison(path: str, plans: Sequence[Plan]) -> None:
    """Draw window, mean visible context and what is saved so far against tokens.

    There is nothing saved where the model of a plan cannot be counted.

    Raises:
        ValueError: the file's ending is no picture's, or matplotlib is missing.
    """
    unit_of_cost = _unit_of_cost(plans)
    figure, panels = _figure(path, 3 if unit_of_cost else 2)
    window, context = panels[:2]
    scale, unit = _token_unit(max(plan.tokens for plan in plans))
    for index, plan in enumerate(plans):
        steps = _steps(plan)
        tokens = [step * plan.batch_tokens / scale for step in [*steps, plan.total_steps]]
        windows = [plan.window(step) for step in steps]
        contexts = [plan.context_at(step) for step in steps]
        style = _style(plan, index, unit_of_cost)
        window.plot(tokens, [*windows, windows[-1]], drawstyle="steps-post", **style)
        context.plot(tokens, [*contexts, contexts[-1]], drawstyle="steps-post", **style)
        if unit_of_cost:
            full = _costs(plan)[0] / plan.total_steps
            ends = zip([*steps, plan.total_steps], _cumulated(plan, steps), strict=True)
            panels[2].plot(tokens, [step * full - cost for step, cost in ends], **style)
    titles = ("Window", "Mean visible context", "Saved so far")
    units = ("tokens", "tokens, of a token", unit_of_cost)
    for axes, title, label in zip(panels, titles, units, strict=False):
        _label(axes, title, label, f"training tokens ({unit})")
    _legend(figure, panels)
    images.save(figure, path)


def _style(plan: Plan, index: int, unit_of_cost: str) -> dict[str, Any]:
    total = f": {_total(plan)}" if unit_of_cost else ""
    return {
        "color": images.colour_of(index),
        "linestyle": LINES[index % len(LINES)],
        "label": f"{plan.name}{total}",
    }


def _total(plan: Plan) -> str:
    """Return what the run costs, and what it saves against a constant window."""
    constant, ladder = _costs(plan)
    change = round(100 * (ladder / constant - 1), 1)
    total = f"{scientific(ladder * 1e20)} FLOPs"
    if plan.time:
        total = f"{ladder:,.4g} {plan.time.unit}"
    return f"{total}, {change:+.1f} %" if change else total


def _references(panels: Sequence[Any], plan: Plan, scale: float) -> None:
    """Draw what the run would be without the ladder, and what documents alone would leave."""
    style = {"color": "#888888", "linewidth": 1}
    work, *cost = panels[1:]
    for axes in cost:
        ends = [0, plan.tokens / scale], [0, _costs(plan)[0]]
        axes.plot(*ends, label="constant window", linestyle="--", **style)
    if plan.documents:
        left = plan.pairs_under(ladder=False, documents=True) / plan.causal_pairs
        name = "documents masked, full window"
        work.axhline(100 * float(left), label=name, linestyle=":", **style)


def _token_unit(tokens: int) -> tuple[float, str]:
    return next((u for u in ((1e12, "T"), (1e9, "B"), (1e6, "M")) if tokens >= u[0]), (1.0, ""))


def _unit_of_cost(plans: Sequence[Plan]) -> str:
    """Return the unit that all plans have; an empty string where one cannot be counted."""
    units = {plan.time.unit if plan.time else "" for plan in plans}
    if len(units) == 1 and "" not in units:
        return units.pop()
    # some with a time and some without: no unit for one axis
    counted = all(plan.shape and not plan.time for plan in plans)
    return "FLOPs x 1e20" if counted else ""


def _costs(plan: Plan) -> tuple[float, float]:
    """Return what the run costs without the ladder and with it, as the tables have it.

    In GPU-hours (`TimeModel.unit`); in FLOPs, 1e20, where no time is known.
    """
    if plan.time:
        constant, ladder = plan.timed_fractions
        hours = plan.time.gpu_hours
        return hours(plan.total_steps, constant), hours(plan.total_steps, ladder)
    return plan.constant_flops / 1e20, plan.ladder_flops / 1e20


def _cumulated(plan: Plan, steps: list[int]) -> list[float]:
    """Return the cost from the start to each of the steps and to the end."""
    ends = [*steps[1:], plan.total_steps]
    so_far = [0.0]
    for first, end in zip(steps, ends, strict=True):
        so_far.append(so_far[-1] + (end - first) * _step_cost(plan, first))
    # windows between the steps are not looked at, so the sum is close to the run's cost; the end is
    # that cost
    return [cost * _costs(plan)[1] / so_far[-1] for cost in so_far]


def _step_cost(plan: Plan, step: int) -> float:
    """Return the cost of a step, relative to that of others."""
    if plan.time:
        return plan.time.step.seconds(plan.timed_fraction_at(step))
    return plan.flops(plan.pairs_at(step))


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


def _figure(path: str, num_panels: int) -> tuple[Any, Sequence[Any]]:
    if Path(path).suffix.lower() not in FORMATS:
        raise ValueError(f"--plot {path}: give a file that ends in {' or '.join(FORMATS)}.")
    if not Path(path).parent.is_dir():
        raise ValueError(f"--plot {path}: there is no folder {Path(path).parent}. Make it first.")
    try:
        figure, panels = images.make_panels(1, num_panels, (4 * num_panels, 4))
        return figure, list(panels.reshape(-1))
    except ImportError:
        raise ValueError(
            "--plot needs matplotlib, which is not installed here. "
            "pip install 'megatron-skyladder[plot]', or leave --plot out."
        ) from None
