"""Whether two models differ on the same questions.

Errors are over questions, as if these were drawn at random. They say nothing about another training
run of the same recipe, which differs too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of a mean (n - 1 in the variance); 0 for fewer than two values."""
    count = len(values)
    if count < 2:
        return 0.0
    mean = sum(values) / count
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    return math.sqrt(variance / count)


def grouped_error(
    values: Sequence[float],
    groups: Sequence[str | None],
    questions: Sequence[str] | None = None,
) -> float:
    """Return the standard error of the plain mean of the groups' means.

    Args:
        values: a score for each answer.
        groups: of each answer.
        questions: what each answer is to, where groups ask the same ones: answers to one question
            are alike, so that only questions count as drawn independently; None: each once.
    """
    if questions is not None:
        return _clustered_error(values, groups, questions)
    names = list(dict.fromkeys(groups))
    errors = [
        standard_error([v for v, name in zip(values, groups, strict=True) if name == group])
        for group in names
    ]
    return math.sqrt(sum(error**2 for error in errors)) / len(names)


def _clustered_error(
    values: Sequence[float], groups: Sequence[str | None], questions: Sequence[str]
) -> float:
    """Return the error over questions: what each one moves the score by, squared and summed.

    Where every group asks every question that is `standard_error` of the questions' means.
    """
    sizes = Counter(groups)
    means = dict.fromkeys(sizes, 0.0)
    for value, group in zip(values, groups, strict=True):
        means[group] += value / sizes[group]
    moved = dict.fromkeys(questions, 0.0)
    for value, group, question in zip(values, groups, questions, strict=True):
        moved[question] += (value - means[group]) / (sizes[group] * len(sizes))
    count = len(moved)
    if count < 2:
        return 0.0
    return math.sqrt(count / (count - 1) * sum(each**2 for each in moved.values()))


def paired_error(
    first: Sequence[float],
    second: Sequence[float],
    groups: Sequence[str | None],
    questions: Sequence[str] | None = None,
) -> float:
    """Return the standard error of the difference of two scores on the same questions."""
    return grouped_error([b - a for a, b in zip(first, second, strict=True)], groups, questions)


def mcnemar(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the exact two-sided p of McNemar's test: the chance of such a split of disagreements.

    It takes the answers as independent, so each has to be to another question.

    Args:
        first: 1 where the first model is right; any share above a half counts as right.
        second: the same of the second model.
    """
    pairs = [(a > 0.5, b > 0.5) for a, b in zip(first, second, strict=True)]
    only_first = sum(a and not b for a, b in pairs)
    only_second = sum(b and not a for a, b in pairs)
    if only_first + only_second == 0:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(only_first, only_first + only_second, 0.5).pvalue)
