"""The picture of the study: how arms differ from the reference, at the end and along a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_skyladder.report import images
from megatron_skyladder.study import results, verdicts
from megatron_skyladder.study.records import Record
from megatron_skyladder.study.results import Arm
from megatron_skyladder.study.tables import Given

Value = Callable[[Record, Record], float | None]
Points = Callable[[Record, Record], list[tuple[float, float]]]

_SHOWN = 1.3  # of the largest difference in a run's second half: what is above is cut


def draw(given: Given, path: Path) -> None:
    """Draw the arms that have finished runs against the reference.

    Args:
        given: with finished runs of the reference.
        path: of the picture.

    Raises:
        ImportError: matplotlib is not installed.
    """
    reference = given.reference
    if reference is None:
        return
    arms = [arm for arm in given.arms if arm is not reference]
    figure, panels = images.make_panels(2, 2, (11, 8))
    at_end, at_equal_time, along, by_length = panels.flat
    bar = verdicts.bar_of_one_seed(given)
    _dots(at_end, arms, reference, results.final_difference, bar)
    _dots(at_equal_time, arms, reference, _at_equal_time(given), bar)
    styles = {name: _style(place) for place, name in enumerate(given.study.arms)}
    latest = []
    for arm in arms:
        latest += _line(along, arm, reference, _along, styles[arm.name])
        _line(by_length, arm, reference, _by_length, styles[arm.name])
    if latest:
        highest = _SHOWN * max(map(abs, latest))
        along.set_ylim(-highest, highest)
    nats = "difference (nats per token)"
    images.label(at_end, "At the end, equal tokens", nats, "")
    images.label(at_equal_time, "At the end, equal time", nats, "")
    images.label(along, "Validation along the run, one seed", "tokens (millions)", nats)
    images.label(by_length, "At the end by context, one seed", "context (tokens)", nats)
    lengths = sorted({key for arm in given.arms for it in arm.records for key in it.losses})
    by_length.set_xscale("log", base=2)
    by_length.set_xticks(lengths, [f"{length:,}" for length in lengths])
    handles, labels = by_length.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    images.save(figure, path)


def _dots(axes: Any, arms: Sequence[Arm], reference: Arm, value: Value, bar: float | None) -> None:
    """Draw a line of points for each arm, one for each seed: the first full, others hollow."""
    others = {record.seed: record for record in reference.records}
    if bar is not None:
        axes.axvspan(-bar, bar, color="#eeeeee", zorder=0)
    axes.axvline(0, color="#888888", linewidth=0.8)
    for place, arm in enumerate(arms):
        for record in arm.records:
            found = value(record, others[record.seed]) if record.seed in others else None
            if found is not None:
                is_first = record.seed == reference.records[0].seed
                face = images.colour_of(0) if is_first else "white"
                axes.plot(found, place, "o", color=images.colour_of(0), markerfacecolor=face)
    axes.set_yticks(range(len(arms)), [arm.name for arm in arms])
    axes.set_ylim(len(arms) - 0.5, -0.5)


def _line(
    axes: Any, arm: Arm, reference: Arm, points: Points, style: dict[str, Any]
) -> list[float]:
    """Draw an arm's first seed that the reference has too; return the later half of its values."""
    others = {record.seed: record for record in reference.records}
    pair = next(((it, others[it.seed]) for it in arm.records if it.seed in others), None)
    found = points(*pair) if pair else []
    if found:
        x, y = zip(*found, strict=True)
        axes.plot(x, y, marker="o", markersize=3, linewidth=1.4, label=arm.name, **style)
    return [value for _, value in found[len(found) // 2 :]]


def _at_equal_time(given: Given) -> Value:
    def value(record: Record, other: Record) -> float | None:
        budgets = given.budgets(record.seed)
        if any(record is it for it in budgets):
            return None
        return results.equal_time_difference(record, budgets)

    return value


def _along(record: Record, other: Record) -> list[tuple[float, float]]:
    """Only runs of as many steps validate on the same text."""
    if record.steps != other.steps:
        return []
    return [
        (mine.iteration * record.step_tokens / 1e6, mine.loss - its.loss)
        for mine, its in zip(record.validations, other.validations, strict=False)
        if mine.iteration == its.iteration
    ]


def _by_length(record: Record, other: Record) -> list[tuple[float, float]]:
    lengths = sorted(set(record.losses) & set(other.losses))
    return [(length, record.losses[length] - other.losses[length]) for length in lengths]


def _style(place: int) -> dict[str, Any]:
    """Return what an arm looks like, by its place in the study: the palette has ten colours."""
    return {"color": images.colour_of(place), "linestyle": ("-", "--", ":")[place // 10 % 3]}
