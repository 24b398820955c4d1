"""One or two models side by side, as in the paper's Tables 1 and 2, with the paper's figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_skyladder.evaluation import scoring, significance
from megatron_skyladder.evaluation.results import Result
from megatron_skyladder.evaluation.tasks import PAPER, RULER, STANDARD

CAVEAT = (
    "Errors and p are over questions: how sure these two models differ on such questions. They say "
    "nothing about another training run of the same recipe."
)


@dataclass(frozen=True)
class Row:
    """One task, or the mean of several.

    Args:
        name: of the task, or standard, ruler.
        title: in the table.
        scores: percent, one for each model.
        errors: their standard errors over questions.
        difference: of the second to the first; None for a single model.
        difference_error: its standard error, questions paired.
        p: of McNemar's test; None where scores are no yes or no, or for means.
        paper: the paper's two figures, where there are some.
    """

    name: str
    title: str
    scores: tuple[float, ...]
    errors: tuple[float, ...]
    difference: float | None
    difference_error: float | None
    p: float | None
    paper: tuple[float, float] | None


def rows(models: Sequence[Sequence[Result]], paper: str | None = None) -> list[Row]:
    """Return the rows of one model's results, or of two models' on the same questions.

    Args:
        models: the results of each; tasks that only one of two has are left out.
        paper: a key of ``PAPER``.
    """
    figures = PAPER.get(paper or "", {})
    keyed = [{_key(each): each for each in model} for model in models]
    shared = [key for key in keyed[0] if all(key in other for other in keyed[1:])]
    pairs = [[model[key] for model in keyed] for key in shared]
    pairs = [pair for pair in pairs if len({tuple(each.ids) for each in pair}) == 1]
    made = [_row(pair, figures.get(pair[0].task)) for pair in pairs]
    standard = [row for row in made if row.name in STANDARD]
    needles = [row for row in made if row.name in RULER]
    if len(standard) > 1:
        title = f"mean of {len(standard)}" + ("" if len(standard) == len(STANDARD) else " of 9")
        figure = figures.get("standard") if len(standard) == len(STANDARD) else None
        made.insert(len(standard), _mean("standard", title, standard, figure))
    if len(needles) > 1:
        title = f"RULER, mean of {len(needles)}"
        figure = figures.get("ruler") if len(needles) == len(RULER) else None
        made.insert(made.index(needles[-1]) + 1, _mean("ruler", title, needles, figure))
    return made


def _key(result: Result) -> tuple[str, int | None, str]:
    return result.task, result.length, result.asked


def _row(pair: Sequence[Result], paper: tuple[float, float] | None) -> Row:
    first = pair[0]
    difference = error = p = None
    if len(pair) == 2:
        second = pair[1]
        one, other = first.scores[first.best], second.scores[second.best]
        difference = second.percent - first.percent
        error = 100 * significance.paired_error(one, other, first.groups)
        if {*one, *other} <= {0.0, 1.0}:
            p = significance.mcnemar(one, other)
    return Row(
        name=first.task,
        title=first.title,
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
        scores=scores,
        errors=tuple(error_of([row.errors[i] for row in parts]) for i in range(count)),
        difference=scores[1] - scores[0] if paired else None,
        difference_error=error_of([row.difference_error for row in parts]) if paired else None,
        p=None,
        paper=paper,
    )


def text(table: Sequence[Row], names: Sequence[str]) -> str:
    """Return the table for people."""
    from tabulate import tabulate

    has_paper = any(row.paper for row in table)
    headers = ["task", *names]
    if len(names) == 2:
        headers += ["difference", "McNemar's p"]
    if has_paper:
        headers += ["paper: constant", "SkyLadder"]
    lines = [_cells(row, has_paper, len(names) == 2) for row in table]
    drawn: str = tabulate(lines, headers, disable_numparse=True, colalign=("left",))
    return f"{drawn}\n\n{CAVEAT}"


def _cells(row: Row, has_paper: bool, paired: bool) -> list[str]:
    cells = [row.title]
    cells += [
        f"{score:.1f} ± {error:.1f}" for score, error in zip(row.scores, row.errors, strict=True)
    ]
    if paired:
        assert row.difference is not None and row.difference_error is not None
        cells.append(f"{row.difference:+.1f} ± {row.difference_error:.1f}")
        cells.append("" if row.p is None else f"{row.p:.2g}")
    if has_paper:
        cells += [f"{value:.1f}" for value in row.paper] if row.paper else ["", ""]
    return cells


def as_json(table: Sequence[Row], names: Sequence[str], asked: Sequence[str]) -> dict[str, Any]:
    """Return the table for programs."""
    return {
        "models": list(names),
        "asked": sorted({*asked}),
        "rows": [asdict(row) for row in table],
        "note": CAVEAT,
    }
