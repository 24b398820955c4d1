"""One or two models side by side, as in the paper's Tables 1 and 2, with the paper's figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_skyladder import terminal
from megatron_skyladder.evaluation import mdqa, scoring, significance
from megatron_skyladder.evaluation.results import Result
from megatron_skyladder.evaluation.tasks import MDQA, PAPER, READING, RULER, STANDARD, TITLES

CAVEAT = (
    "Errors and p are over questions: how sure these two models differ on such questions. They say "
    "nothing about another training run of the same recipe."
)
NO_P = (
    "MDQA has no p: McNemar's test takes answers as independent, and each question stands at "
    f"{len(mdqa.PLACES)} places. Its errors are over questions, averaged over their places."
)


@dataclass(frozen=True)
class Row:
    """One task, or the mean of several.

    Args:
        name: of the task, or standard, reading, ruler, long.
        title: in the table.
        length: tokens of the input at most; None for standard tasks.
        scores: percent, one for each model.
        errors: their standard errors over questions.
        difference: of the second to the first; None for a single model.
        difference_error: its standard error, questions paired.
        p: of McNemar's test; None where scores are no yes or no, where a question is asked several
            times, or for means.
        paper: the paper's two figures, where there are some.
    """

    name: str
    title: str
    length: int | None
    scores: tuple[float, ...]
    errors: tuple[float, ...]
    difference: float | None
    difference_error: float | None
    p: float | None
    paper: tuple[float, float] | None


def rows(models: Sequence[Sequence[Result]], paper: str | None = None) -> list[Row]:
    """Return the rows of one model's results, or of two models' on the same questions.

    Args:
        models: the results of each; tasks that only one of two has are left out, and those of
            `asked_differently`.
        paper: a key of ``PAPER``.
    """
    figures = PAPER.get(paper or "", {})
    pairs = [pair for pair in _shared(models) if _asked_alike(pair)]
    kinds = list(dict.fromkeys(pair[0].asked for pair in pairs))
    made: list[Row] = []
    for kind in kinds:  # rows of one kind are alike; a mean over several would be none
        suffix = f" ({kind})" if len(kinds) > 1 else ""
        of_kind = [pair for pair in pairs if pair[0].asked == kind]
        made += _with_means(
            [_row(pair, figures.get(pair[0].task), suffix) for pair in of_kind], figures, suffix
        )
    return made


def asked_differently(models: Sequence[Sequence[Result]]) -> list[str]:
    """Return the titles of tasks that all models have, but no two alike.

    Other questions, other prompts, or another length of input.
    """
    shared = _shared(models)
    found = [pair[0].title for pair in shared if not _asked_alike(pair)]
    matched = {pair[0].task for pair in shared}
    tasks = dict.fromkeys(each.task for each in models[0])
    everywhere = [task for task in tasks if all(_has(model, task) for model in models)]
    return found + [TITLES[task] for task in everywhere if task not in matched]


def asked_by_others(models: Sequence[Sequence[Result]]) -> list[str]:
    """Return what asked the models that are compared, where it is not the same for all.

    Scores may differ by it alone: tokenizers, kernels and rounding change with libraries and
    devices. Each is a name with a value for each model, such as ``torch 2.14.0 and 2.15.0``.
    """
    found: dict[str, None] = {}
    for pair in _shared(models):
        if not _asked_alike(pair):
            continue
        for name in pair[0].versions:
            values = [each.versions.get(name, "") for each in pair]  # an older result may not say
            if all(values) and len(set(values)) > 1:
                found[f"{name} {' and '.join(values)}"] = None
    return list(found)


def _has(model: Sequence[Result], task: str) -> bool:
    return any(each.task == task for each in model)


def _shared(models: Sequence[Sequence[Result]]) -> list[list[Result]]:
    keyed = [{_key(each): each for each in model} for model in models]
    shared = [key for key in keyed[0] if all(key in other for other in keyed[1:])]
    return [[model[key] for model in keyed] for key in shared]


def _asked_alike(pair: Sequence[Result]) -> bool:
    return all((each.ids, each.data) == (pair[0].ids, pair[0].data) for each in pair)


def _with_means(made: list[Row], figures: dict[str, tuple[float, float]], suffix: str) -> list[Row]:
    """Return the rows with the mean of each suite, at each length of input.

    The mean of what needs a long context is that of MDQA and of RULER's mean, as in the paper.
    """
    found: list[Row] = []
    of_ruler: dict[int | None, Row] = {}
    for name, title, tasks in (
        ("standard", "", STANDARD),
        ("reading", "reading", READING),
        ("ruler", "RULER", RULER),
    ):
        of_suite = [row for row in made if row.name in tasks]
        for length in dict.fromkeys(row.length for row in of_suite):
            own = [row for row in of_suite if row.length == length]
            found += own
            if len(own) > 1:
                whole = len(own) == len(tasks)
                at = f"{title} {length:,}, " if length else ""
                text = f"{at}mean of {len(own)}{'' if whole else f' of {len(tasks)}'}{suffix}"
                found.append(_mean(name, text, own, figures.get(name) if whole else None))
                if name == "ruler" and whole:
                    of_ruler[length] = found[-1]
    found += [row for row in made if row not in found]
    for row in made:
        if row.name == MDQA and row.length in of_ruler:
            at = f"long {row.length:,}, " if row.length else "long, "
            parts = [row, of_ruler[row.length]]
            found.append(
                _mean("long", f"{at}mean of MDQA and RULER{suffix}", parts, figures.get("long"))
            )
    return found


def _key(result: Result) -> tuple[str, int | None, str]:
    return result.task, result.length, result.asked


def _row(pair: Sequence[Result], paper: tuple[float, float] | None, suffix: str) -> Row:
    first = pair[0]
    difference = error = p = None
    if len(pair) == 2:
        second = pair[1]
        one, other = first.scores[first.best], second.scores[second.best]
        difference = second.percent - first.percent
        error = 100 * significance.paired_error(one, other, first.groups, first.questions)
        if first.questions is None and {*one, *other} <= {0.0, 1.0}:
            p = significance.mcnemar(one, other)
    return Row(
        name=first.task,
        title=f"{first.title}{suffix}",
        length=first.length,
        scores=tuple(each.percent for each in pair),
        errors=tuple(each.error for each in pair),
        difference=difference,
        difference_error=error,
        p=p,
        paper=paper,
    )


def _mean(name: str, title: str, parts: Sequence[Row], paper: tuple[float, float] | None) -> Row:
    def error_of(errors: Sequence[float | None]) -> float:
        return math.sqrt(sum((each or 0.0) ** 2 for each in errors)) / len(errors)

    count = len(parts[0].scores)
    scores = tuple(scoring.mean(row.scores[i] for row in parts) for i in range(count))
    paired = count == 2
    return Row(
        name=name,
        title=title,
        length=parts[0].length,
        scores=scores,
        errors=tuple(error_of([row.errors[i] for row in parts]) for i in range(count)),
        difference=scores[1] - scores[0] if paired else None,
        difference_error=error_of([row.difference_error for row in parts]) if paired else None,
        p=None,
        paper=paper,
    )


def text(table: Sequence[Row], names: Sequence[str]) -> str:
    """Return the table for people."""
    return f"{terminal.table(cells(table, names), left=1)}\n\n{note(table)}"


def note(table: Sequence[Row]) -> str:
    """Return what the errors and p of a table say, and why a p is not there."""
    pairs = any(row.name == MDQA and row.difference is not None for row in table)
    return f"{CAVEAT} {NO_P}" if pairs else CAVEAT


def cells(table: Sequence[Row], names: Sequence[str]) -> list[list[str]]:
    """Return the table's texts, line by line, its head first."""
    has_paper = any(row.paper for row in table)
    head = ["task", *names]
    if len(names) == 2:
        head += ["difference", "McNemar's p"]
    if has_paper:
        head += ["paper: constant", "paper: SkyLadder"]
    return [head, *(_cells(row, has_paper, len(names) == 2) for row in table)]


def _cells(row: Row, has_paper: bool, paired: bool) -> list[str]:
    line = [row.title]
    line += [
        f"{score:.1f} ± {error:.1f}" for score, error in zip(row.scores, row.errors, strict=True)
    ]
    if paired:
        assert row.difference is not None and row.difference_error is not None
        line.append(f"{row.difference:+.1f} ± {row.difference_error:.1f}")
        line.append("" if row.p is None else f"{row.p:.2g}")
    if has_paper:
        line += [f"{value:.1f}" for value in row.paper] if row.paper else ["", ""]
    return line


def as_json(
    table: Sequence[Row], names: Sequence[str], models: Sequence[Sequence[Result]]
) -> dict[str, Any]:
    """Return the table for programs."""
    return {
        "models": list(names),
        "asked": sorted({each.asked for model in models for each in model}),
        "asked_by_others": asked_by_others(models),
        "rows": [asdict(row) for row in table],
        "cells": cells(table, names),
        "note": note(table),
    }
