"""The table as a picture: a bar with its error for each model, beside the paper's marks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_skyladder.evaluation.results import Result
from megatron_skyladder.evaluation.table import CAVEAT, Row
from megatron_skyladder.evaluation.tasks import MDQA, RULER
from megatron_skyladder.report import images

_WIDTH = 0.38  # of a bar, where a task has two


def draw(
    path: Path, table: Sequence[Row], names: Sequence[str], models: Sequence[Sequence[Result]]
) -> None:
    """Write the picture.

    Args:
        path: of an SVG file.
        table: the rows.
        names: of the models.
        models: their results, for RULER by length and the places of the answer in MDQA.
    """
    lengths, (length, places) = by_length(models), by_place(models)
    rows = 1 + bool(lengths) + bool(places)
    figure, panels = images.make_panels(rows, 1, (10.5, 4.2 * rows))
    axes = iter(panels.reshape(-1))
    _bars(next(axes), table, names)
    if lengths:
        _lengths(next(axes), lengths, names)
    if places:
        _places(next(axes), places, names, length)
    figure.supxlabel(CAVEAT.split(":")[0] + ".", fontsize=8, color="#555555")
    images.save(figure, path)


def _bars(axis: Any, table: Sequence[Row], names: Sequence[str]) -> None:
    width = _WIDTH if len(names) == 2 else 2 * _WIDTH
    for number, name in enumerate(names):
        shift = (number - (len(names) - 1) / 2) * width
        axis.bar(
            [place + shift for place in range(len(table))],
            [row.scores[number] for row in table],
            width,
            yerr=[row.errors[number] for row in table],
            color=images.colour_of(number),
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


def by_length(models: Sequence[Sequence[Result]]) -> list[dict[int, float]]:
    """Return tokens -> mean score of RULER in percent, for each model.

    Counted are the tasks that every model has at every one of the lengths; empty where that leaves
    fewer than two lengths.
    """
    scores = [
        {(each.task, each.length): each.percent for each in model if each.task in RULER}
        for model in models
    ]
    shared = set.intersection(*(set(each) for each in scores)) if scores else set()
    lengths = sorted({length for _, length in shared if length is not None})
    tasks = [task for task in RULER if all((task, length) in shared for length in lengths)]
    if len(lengths) < 2 or not tasks:
        return []
    return [
        {length: sum(each[task, length] for task in tasks) / len(tasks) for length in lengths}
        for each in scores
    ]


def _lengths(axis: Any, lengths: Sequence[dict[int, float]], names: Sequence[str]) -> None:
    for number, (name, found) in enumerate(zip(names, lengths, strict=True)):
        axis.plot([*found], [*found.values()], "o-", color=images.colour_of(number), label=name)
    axis.set_xscale("log", base=2)
    axis.set_xticks([*lengths[0]], [f"{length:,}" for length in lengths[0]])
    images.label(axis, "RULER, mean of the tasks", "tokens of the prompt", "score, %")


def by_place(models: Sequence[Sequence[Result]]) -> tuple[int, list[dict[int, float]]]:
    """Return MDQA's scores by place, at the greatest length of input that all models have.

    Returns:
        The length in tokens, and place of the answer -> score in percent for each model; 0 and
        nothing where there is no such length.
    """
    own = [{each.length or 0: each for each in model if each.task == MDQA} for model in models]
    length = max(set.intersection(*map(set, own)) if own else (), default=0)
    found = []
    for model in own if length else []:
        scores: dict[int, list[float]] = {}
        result = model[length]
        for group, score in zip(result.groups, result.scores[result.best], strict=True):
            scores.setdefault(int(group or 0), []).append(score)
        found.append({place: 100 * sum(each) / len(each) for place, each in scores.items()})
    return length, found


def _places(
    axis: Any, places: Sequence[dict[int, float]], names: Sequence[str], length: int
) -> None:
    for number, (name, found) in enumerate(zip(names, places, strict=True)):
        axis.plot(
            sorted(found), [found[place] for place in sorted(found)], "o-",
            color=images.colour_of(number), label=name,
        )  # fmt: skip
    images.label(
        axis, f"MDQA at {length:,}", "place of the document with the answer, of 30", "score, %"
    )
