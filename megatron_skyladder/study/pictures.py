"""The picture of the study: losses against tokens and time, by length, and copying."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_skyladder.report import images
from megatron_skyladder.study.records import Record
from megatron_skyladder.study.results import NOTHING, Arm


def draw(arms: Sequence[Arm], path: Path) -> None:
    """Draw the arms; each is the mean of its seeds, with a band from the lowest to the highest.

    Args:
        arms: at least one; the first is what the others are compared with.
        path: of the picture.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, panels = images.make_panels(2, 2, (11, 8))
    by_tokens, by_time, by_length, copying = panels.flat
    for place, arm in enumerate(arms):
        style = {"color": images.colour_of(place), "linestyle": _dashes(place)}
        _band(by_tokens, arm, _tokens, _losses, style)
        timed = [record for record in arm.records if record.seconds is not None]
        by_time.plot(
            [(record.seconds or 0.0) / 3600 for record in timed],
            [record.loss for record in timed],
            marker="osD^v<>"[place // 10 % 7],
            linestyle="",
            color=style["color"],
        )
        _band(
            by_length,
            arm,
            lambda record: sorted(record.losses),
            lambda record: [record.losses[length] for length in sorted(record.losses)],
            style,
        )
        if all(record.copying for record in arm.records):
            _band(
                copying,
                arm,
                lambda record: sorted(record.copying),
                lambda record: [100 * record.copying[it].accuracy for it in sorted(record.copying)],
                style,
            )
    loss = "loss (nats per token)"
    images.label(by_tokens, "Validation on the way, whole sequences", "tokens (millions)", loss)
    images.label(by_time, "Trained models, one point a run", "time of training (core hours)", loss)
    images.label(by_length, "Trained models, by context", "context (tokens)", loss)
    images.label(copying, "Random tokens copied from a distance", "distance (tokens)", "right (%)")
    for axes, found in (
        (by_length, [list(record.losses) for arm in arms for record in arm.records]),
        (copying, [list(record.copying) for arm in arms for record in arm.records]),
    ):
        keys = sorted({key for keys in found for key in keys})
        if keys:
            axes.set_xscale("log", base=2)
            axes.set_xticks(keys, [f"{key:,}" for key in keys])
    copying.set_ylim(0, max(NOTHING, copying.get_ylim()[1]))  # chance is not drawn out
    figure.legend(
        *by_tokens.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False
    )
    images.save(figure, path)


def _dashes(place: int) -> str:
    return ("-", "--", ":")[place // 10 % 3]  # the palette has ten colours


def _losses(record: Record) -> list[float]:
    return [it.loss for it in record.validations]


def _tokens(record: Record) -> list[float]:
    return [it.iteration * record.step_tokens / 1e6 for it in record.validations]


def _band(
    axes: Any,
    arm: Arm,
    x_of: Callable[[Record], list[float]],
    y_of: Callable[[Record], list[float]],
    style: dict[str, Any],
) -> None:
    lengths = {len(y_of(record)) for record in arm.records}
    if len(lengths) != 1 or not lengths.pop():
        return  # seeds that do not have the same points are no band
    x = np.mean([x_of(record) for record in arm.records], axis=0)
    y = np.array([y_of(record) for record in arm.records], dtype=float)
    axes.plot(x, y.mean(axis=0), marker="o", markersize=3, linewidth=1.6, label=arm.name, **style)
    if len(y) > 1:
        axes.fill_between(x, y.min(axis=0), y.max(axis=0), color=style["color"], alpha=0.18, lw=0)
