"""The table as a picture: a bar with its error for each model, beside the paper's marks."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_skyladder.evaluation.results import Result
from megatron_skyladder.evaluation.table import CAVEAT, Row
from megatron_skyladder.hugging_face.output import write_text
from megatron_skyladder.report import drawing

_WIDTH = 0.38  # of a bar, where a task has two


def draw(
    path: Path, table: Sequence[Row], names: Sequence[str], models: Sequence[Sequence[Result]]
) -> None:
    """Write the picture.

    Args:
        path: of an SVG file.
        table: the rows.
        names: of the models.
        models: their results, for the places of the answer in MDQA.
    """
    places = _by_place(models)
    figure, panels = drawing.make_panels(1, height=4.2 * (1 + bool(places)), rows=1 + bool(places))
    axes = panels.reshape(-1)
    _bars(axes[0], table, names)
    if places:
        _places(axes[1], places, names)
    figure.supxlabel(CAVEAT.split(":")[0] + ".", fontsize=8, color="#555555")
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    write_text(path, buffer.getvalue())


def _bars(axis: Any, table: Sequence[Row], names: Sequence[str]) -> None:
    width = _WIDTH if len(names) == 2 else 2 * _WIDTH
    for number, name in enumerate(names):
        shift = (number - (len(names) - 1) / 2) * width
        axis.bar(
            [place + shift for place in range(len(table))],
            [row.scores[number] for row in table],
            width,
            yerr=[row.errors[number] for row in table],
            color=drawing.colour_of(number),
            label=name,
            error_kw={"lw": 1, "capsize": 2},
        )
        marked = [place for place, row in enumerate(table) if row.paper]
        axis.plot(
            [place + shift for place in marked],
            [table[place].paper[number] for place in marked if table[place].paper],  # type: ignore[index]
            linestyle="none",
            marker="D",
            markersize=4,
            markerfacecolor="white",
            markeredgecolor="black",
            label="the paper's" if number == 0 and marked else None,
        )
    axis.set_xticks(range(len(table)), [row.title for row in table], rotation=35, ha="right")
    axis.set_ylabel("score, %")
    axis.legend(frameon=False)


def _by_place(models: Sequence[Sequence[Result]]) -> list[dict[int, float]]:
    """Return place of the answer -> score in percent, for each model that has MDQA."""
    found = []
    for model in models:
        for result in model:
            if result.task != "mdqa":
                continue
            scores: dict[int, list[float]] = {}
            for group, score in zip(result.groups, result.scores[result.best], strict=True):
                scores.setdefault(int(group or 0), []).append(score)
            found.append({place: 100 * sum(each) / len(each) for place, each in scores.items()})
    return found if len(found) == len(models) else []


def _places(axis: Any, places: Sequence[dict[int, float]], names: Sequence[str]) -> None:
    for number, (name, found) in enumerate(zip(names, places, strict=True)):
        axis.plot(
            sorted(found), [found[place] for place in sorted(found)], "o-",
            color=drawing.colour_of(number), label=name,
        )  # fmt: skip
    drawing.label(axis, "MDQA", "place of the document with the answer, of 30", "score, %")
