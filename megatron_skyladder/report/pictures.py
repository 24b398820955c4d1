"""The report's pictures. Each is a function of the groups of runs that returns its panels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_skyladder.report.by_length import LOSS, loss_by_length, loss_by_length_over_training
from megatron_skyladder.report.curves import Axis, Run
from megatron_skyladder.report.groups import Group
from megatron_skyladder.report.panels import (
    EARLY,
    SIGNIFICANT,
    Curve,
    Panel,
    Range,
    axes_by_kind,
    framed,
    lines_of,
    runs_of,
)
from megatron_skyladder.report.stability import loss_ratios


@dataclass(frozen=True)
class Picture:
    """One picture of the report.

    Args:
        name: its anchor in the page.
        title: its heading.
        caption: what is to be seen, for somebody who was not there.
        draw: returns the panels, none where the logs do not have what it shows.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[list[Group]], list[Panel]]


def _curve(axes: dict[str, Axis], values: Callable[[Run], np.ndarray]) -> Callable[[Run], Curve]:
    """Return the function from a run to its curve of one value for each record."""
    return lambda run: (axes[run.name].values, values(run))


def _label(axes: dict[str, Axis]) -> str:
    return next(iter(axes.values())).label


def windows(groups: list[Group]) -> list[Panel]:
    """Show the window (and that of local layers), and the work it leaves, against tokens."""
    tokens = axes_by_kind(groups)["tokens"]
    window = _curve(tokens, lambda run: run.column("skyladder/window"))
    of_local = _curve(tokens, lambda run: run.column("skyladder/local_window"))
    work = _curve(tokens, lambda run: 100 * run.column("skyladder/attention_fraction"))
    panels = [
        Panel(title, _label(tokens), unit, lines_of(groups, curve), (0, None), steps=True)
        for title, unit, curve in (
            ("Attention window", "tokens", window),
            ("Attention window of local layers", "tokens", of_local),
            ("Attention work", "% of full causal attention", work),
        )
    ]
    if not panels[0].lines:
        return []
    return [panel for panel in panels if panel.lines or panel is not panels[1]]


def training_loss(groups: list[Group]) -> list[Panel]:
    """Show the training loss against tokens, time and FLOPs."""
    panels = []
    for axes in axes_by_kind(groups).values():
        curve = _curve(axes, lambda run: run.losses)
        name = next(iter(axes.values())).name
        lines, frame = lines_of(groups, curve, smooth=True), framed(groups, curve, EARLY)
        panels.append(Panel(f"Training loss against {name}", _label(axes), LOSS, lines, frame))
    return panels if panels[0].lines else []


def validation_loss(groups: list[Group]) -> list[Panel]:
    """Show the validation loss (whole sequences visible) against tokens, time and FLOPs."""
    panels = []
    has_diverged = any(run.has_diverged for run in runs_of(groups))
    for axes in axes_by_kind(groups).values():

        def curve(run: Run, axes: dict[str, Axis] = axes) -> Curve:
            records = run.validations()
            return run.at(axes[run.name].values, records), run.validation_losses(records)

        title = f"Validation loss against {next(iter(axes.values())).name}"
        frame: Range = framed(groups, curve, 0) if has_diverged else (None, None)
        lines = lines_of(groups, curve)
        panels.append(Panel(title, _label(axes), LOSS, lines, frame, marked=True))
    return panels if panels[0].lines else []


def throughput(groups: list[Group]) -> list[Panel]:
    """Show tokens and FLOPs per second and GPU against tokens."""
    runs = runs_of(groups)
    tokens = axes_by_kind(groups)["tokens"]
    shown: list[tuple[str, str, Callable[[Run], np.ndarray]]] = []
    per_gpu = " and GPU" if all(run.gpus is not None for run in runs) else ""

    def tokens_per_second(run: Run) -> np.ndarray:
        rate = _tokens_per_second(run)
        return rate / run.gpus if per_gpu and run.gpus is not None else rate

    shown.append(("Throughput", f"tokens per second{per_gpu}", tokens_per_second))
    if all(run.flops is not None for run in runs):

        def rate(run: Run) -> np.ndarray:
            return run.column(lambda record: record.tflops_per_gpu)

        shown.append(("Rate of the hardware", "TFLOP/s per GPU", rate))
    panels = [
        Panel(
            title,
            _label(tokens),
            unit,
            lines_of(groups, _curve(tokens, values), smooth=True),
            (0, None),
        )
        for title, unit, values in shown
    ]
    return panels if panels[0].lines else []


def _tokens_per_second(run: Run) -> np.ndarray:
    tokens = np.diff(run.tokens, prepend=0.0)
    tokens[0] = np.nan  # what the first record covers is unknown where a log begins later
    seconds = np.diff(run.seconds, prepend=0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = tokens / seconds
    return np.where(np.isfinite(rate), rate, np.nan)


def stability(groups: list[Group]) -> list[Panel]:
    """Show the gradient norm and the loss ratio against tokens."""
    if max(len(run.losses) for run in runs_of(groups)) < 3:
        return []
    tokens = axes_by_kind(groups)["tokens"]
    norm = _curve(tokens, lambda run: run.column("grad norm"))
    ratio = _curve(tokens, lambda run: np.append(np.nan, loss_ratios(run.losses)))
    panels = [
        Panel(
            title,
            _label(tokens),
            unit,
            lines_of(groups, curve, smooth=True),
            framed(groups, curve, EARLY),
            level=level,
        )
        for title, unit, curve, level in (
            ("Gradient norm", "before clipping", norm, None),
            ("Loss ratio", "loss / lowest loss before", ratio, 1.0),
        )
    ]
    return panels if all(panel.lines for panel in panels) else []


def attention(groups: list[Group]) -> list[Panel]:
    """Show the largest logit, the entropy and the sinks against tokens."""
    tokens = axes_by_kind(groups)["tokens"]
    panels = []
    for name, title, unit, scale in (
        ("skyladder/max_attention_logit", "Largest attention logit", "scaled, of all layers", 1),
        ("skyladder/attention_entropy", "Attention entropy", "nats, mean over layers", 1),
        ("skyladder/attention_sink", "Attention sink", "% of heads on the first token", 100),
    ):

        def curve(run: Run, name: str = name, scale: int = scale) -> Curve:
            values = scale * run.column(name)
            measured = np.isfinite(values)
            return tokens[run.name].values[measured], values[measured]

        lines = lines_of(groups, curve)
        if not lines:
            continue
        highest = max(float(np.nanmax(line.curve[1])) for line in lines)
        # shares that are all 0 are no reason to look at thousandths
        top = 1.0 if scale == 100 and highest < 1.0 else None
        panels.append(Panel(title, _label(tokens), unit, lines, (0, top), marked=True))
    return panels


PICTURES = (
    Picture(
        "windows",
        "How far attention sees",
        "The window is the number of tokens that attention may look across. The work is what it "
        "leaves, compared with ordinary causal attention over whole sequences.",
        windows,
    ),
    Picture(
        "training-loss",
        "Training loss",
        "The same losses for tokens seen, time spent and compute spent. While windows are short a "
        "token has less context to be predicted from, so training losses of different windows are "
        "not comparable; those at the end, at equal windows, and validation losses are. Thin: as "
        "logged; thick: smoothed. The first steps may lie above the frame.",
        training_loss,
    ),
    Picture(
        "validation-loss",
        "Validation loss",
        "Measured over whole sequences, whatever the window in training.",
        validation_loss,
    ),
    Picture(
        "loss-by-length",
        "Loss by context length",
        "The last validation. By context length: the same tokens under blocked windows of each "
        "length, so that no token sees more than that. By position: whole sequences. Grey: "
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
        "Throughput counts for how long a run takes. The rate of the hardware counts only the "
        "attention that windows leave, so a run can be faster at a lower rate.",
        throughput,
    ),
    Picture(
        "attention",
        "Attention",
        "A largest logit that grows without end is a warning. Entropy: how spread out attention "
        "is; a token that sees less has less to spread it over. Sink: the share of heads that put "
        "more than 0.3 of their attention on the first of 64 tokens. Measured under the window of "
        "the step (--skyladder-attention-stats-interval).",
        attention,
    ),
    Picture(
        "stability",
        "Stability",
        "The gradient norm, and each loss relative to the lowest one before it; spikes are steps "
        "back.",
        stability,
    ),
)
