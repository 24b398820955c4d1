"""The report's pictures. Each is a function of the runs that returns a figure, or None."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_skyladder.report.by_length import loss_by_length, loss_by_length_over_training
from megatron_skyladder.report.curves import Run, axes_of
from megatron_skyladder.report.drawing import (
    SIGNIFICANT,
    along_run,
    colour_of,
    frame,
    make_panels,
    name_runs,
    smoothed,
    whole_numbers,
)
from megatron_skyladder.report.stability import loss_ratios


@dataclass(frozen=True)
class Picture:
    """One picture of the report.

    Args:
        name: of the file, without its ending.
        title: its heading.
        caption: what is to be seen, for somebody who was not there.
        draw: returns the figure, or None where the logs do not have what it shows.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[list[Run]], Any]


def windows(runs: list[Run]) -> Any:
    """Draw the window, and the attention work it leaves, against tokens."""
    if all(np.isnan(run.column("skyladder/window")).all() for run in runs):
        return None
    figure, (window, work) = make_panels(2)
    for index, (run, axis) in enumerate(zip(runs, axes_of(runs)["tokens"], strict=True)):
        style = {"color": colour_of(index), "linewidth": 2, "drawstyle": "steps-post"}
        window.plot(axis.values, run.column("skyladder/window"), **style)
        work.plot(axis.values, 100 * run.column("skyladder/attention_fraction"), **style)
    along_run(window, axis, "Attention window", "tokens")
    along_run(work, axis, "Attention work", "% of full causal attention")
    whole_numbers(window)
    for axes in (window, work):
        axes.set_ylim(bottom=0)
    name_runs(figure, runs)
    return figure


def training_loss(runs: list[Run]) -> Any:
    """Draw the training loss against tokens, time and FLOPs."""
    if all(np.isnan(run.losses).all() for run in runs):
        return None
    axes_by_kind = axes_of(runs)
    figure, panels = make_panels(len(axes_by_kind))
    for axes, kind in zip(panels, axes_by_kind.values(), strict=True):
        for index, (run, axis) in enumerate(zip(runs, kind, strict=True)):
            colour = colour_of(index)
            axes.plot(axis.values, run.losses, color=colour, linewidth=0.6, alpha=0.3)
            axes.plot(axis.values, smoothed(run.losses), color=colour, linewidth=2)
        along_run(axes, kind[0], f"Training loss against {kind[0].name}")
        frame(axes, runs, [run.losses for run in runs])
    panels[0].set_ylabel("loss (nats per token)")
    name_runs(figure, runs)
    return figure


def validation_loss(runs: list[Run]) -> Any:
    """Draw the validation loss (whole sequences visible) against tokens, time and FLOPs."""
    if not any(run.validations() for run in runs):
        return None
    axes_by_kind = axes_of(runs)
    figure, panels = make_panels(len(axes_by_kind))
    for axes, kind in zip(panels, axes_by_kind.values(), strict=True):
        for index, (run, axis) in enumerate(zip(runs, kind, strict=True)):
            records = run.validations()
            axes.plot(
                run.at(axis.values, records),
                run.validation_losses(records),
                color=colour_of(index),
                linewidth=1.8,
                marker="o",
                markersize=4,
            )
        along_run(axes, kind[0], f"Validation loss against {kind[0].name}")
        if any(run.has_diverged for run in runs):
            frame(axes, runs, [run.validation_losses(run.validations()) for run in runs], early=0)
    panels[0].set_ylabel("loss (nats per token)")
    name_runs(figure, runs)
    return figure


def throughput(runs: list[Run]) -> Any:
    """Draw tokens and FLOPs per second and GPU against tokens."""
    rates = [_tokens_per_second(run) for run in runs]
    has_flops = all(run.flops is not None for run in runs)
    figure, panels = make_panels(2 if has_flops else 1)
    for index, (run, axis) in enumerate(zip(runs, axes_of(runs)["tokens"], strict=True)):
        colour = colour_of(index)
        panels[0].plot(axis.values, rates[index], color=colour, linewidth=0.6, alpha=0.3)
        panels[0].plot(axis.values, smoothed(rates[index]), color=colour, linewidth=2)
        if has_flops:
            tflops = run.column(lambda record: record.tflops_per_gpu)
            panels[1].plot(axis.values, tflops, color=colour, linewidth=0.6, alpha=0.3)
            panels[1].plot(axis.values, smoothed(tflops), color=colour, linewidth=2)
    per_gpu = " and GPU" if all(run.log.num_gpus for run in runs) else ""
    along_run(panels[0], axis, "Throughput", f"tokens per second{per_gpu}")
    whole_numbers(panels[0])
    if has_flops:
        along_run(panels[1], axis, "Rate of the hardware", "TFLOP/s per GPU")
    for axes in panels:
        axes.set_ylim(bottom=0)
    name_runs(figure, runs)
    return figure


def _tokens_per_second(run: Run) -> np.ndarray:
    tokens = np.diff(run.tokens, prepend=0.0)
    tokens[0] = np.nan  # what the first record covers is unknown where a log begins later
    seconds = np.diff(run.seconds, prepend=0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = tokens / seconds / (run.log.num_gpus or 1)
    return np.where(np.isfinite(rate), rate, np.nan)


def stability(runs: list[Run]) -> Any:
    """Draw the gradient norm and the loss ratio against tokens."""
    norms = [run.column("grad norm") for run in runs]
    ratios = [np.append(np.nan, loss_ratios(run.losses)) for run in runs]
    if max(len(column) for column in norms) < 3:
        return None
    if all(np.isnan(x).all() for x in norms) or all(np.isnan(x).all() for x in ratios):
        return None
    figure, panels = make_panels(2)
    for axes, columns in zip(panels, (norms, ratios), strict=True):
        for index, axis in enumerate(axes_of(runs)["tokens"]):
            colour = colour_of(index)
            axes.plot(axis.values, columns[index], color=colour, linewidth=0.6, alpha=0.3)
            axes.plot(axis.values, smoothed(columns[index]), color=colour, linewidth=2)
        frame(axes, runs, columns)
    along_run(panels[0], axis, "Gradient norm", "before clipping")
    along_run(panels[1], axis, "Loss ratio", "loss / lowest loss before")
    panels[1].axhline(1.0, color="#999999", linewidth=0.8)
    name_runs(figure, runs)
    return figure


def attention(runs: list[Run]) -> Any:
    """Draw the largest logit, the entropy and the sinks against tokens."""
    panels_of = {
        "skyladder/max_attention_logit": ("Largest attention logit", "scaled, of all layers"),
        "skyladder/attention_entropy": ("Attention entropy", "nats, mean over layers"),
        "skyladder/attention_sink": ("Attention sink", "% of heads on the first token"),
    }
    columns = {name: [run.column(name) for run in runs] for name in panels_of}
    known = [name for name in panels_of if not all(np.isnan(x).all() for x in columns[name])]
    if not known:
        return None
    figure, panels = make_panels(len(known))
    for axes, name in zip(panels, known, strict=True):
        scale = 100 if name.endswith("sink") else 1
        for index, axis in enumerate(axes_of(runs)["tokens"]):
            values = columns[name][index]
            measured = np.isfinite(values)
            style = {"color": colour_of(index), "linewidth": 1.8, "marker": "o", "markersize": 3}
            axes.plot(axis.values[measured], scale * values[measured], **style)
        along_run(axes, axis, *panels_of[name])
        axes.set_ylim(bottom=0)
        if scale == 100:  # shares that are all 0 are no reason to look at thousandths
            axes.set_ylim(top=max(1.0, axes.get_ylim()[1]))
    name_runs(figure, runs)
    return figure


PICTURES = (
    Picture(
        "windows",
        "How far attention sees",
        "Left: the window, the number of tokens that attention may look across. Right: the "
        "attention work this leaves, compared with ordinary causal attention over whole rows.",
        windows,
    ),
    Picture(
        "training-loss",
        "Training loss",
        "The same losses three times: for tokens seen, time spent and compute spent. While windows "
        "are short a token has less context to be predicted from, so training losses of different "
        "windows are not comparable; those at the end, at equal windows, and validation losses "
        "are. Thin: as logged; thick: smoothed. The first steps may lie above the frame.",
        training_loss,
    ),
    Picture(
        "validation-loss",
        "Validation loss",
        "Measured with the whole sequence visible, whatever the window in training.",
        validation_loss,
    ),
    Picture(
        "loss-by-length",
        "Loss by context length",
        "The last validation. Left: the same tokens under blocked windows of each length, so that "
        "no token sees more than that. Right: whole sequences visible, by token position. Grey: "
        f"differences below {SIGNIFICANT}, which the paper counts as noise.",
        loss_by_length,
    ),
    Picture(
        "loss-by-length-over-training",
        "Loss by context length over training",
        "Each panel is one context length; lower is better. Grey as above.",
        loss_by_length_over_training,
    ),
    Picture(
        "throughput",
        "Speed",
        "Left: what counts for the schedule of a run. Right: how well the hardware is used; it "
        "counts only the attention that windows leave, so a run can be faster at a lower rate.",
        throughput,
    ),
    Picture(
        "attention",
        "Attention",
        "Left: the largest logit; one that grows without end is a warning. Middle: how spread out "
        "attention is; a token that sees less has less to spread it over. Right: the share of "
        "heads that put more than 0.3 of their attention on the first of 64 tokens. Measured under "
        "the window of the step (--skyladder-attention-stats-interval).",
        attention,
    ),
    Picture(
        "stability",
        "Stability",
        "Left: the gradient norm. Right: each loss relative to the lowest one before it; spikes "
        "are steps back.",
        stability,
    ),
)
