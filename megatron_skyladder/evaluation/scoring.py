"""From log-likelihoods and generated texts to scores; arithmetic only.

OLMES (v0.1): the choice with the highest score is the answer; a task's score is the share of right
answers, over MMLU's subjects their plain mean; of the two formulations the better one counts.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterable, Sequence

from megatron_skyladder.evaluation.tasks import Metric, Normalization


def choice(
    likelihoods: Sequence[float],
    continuations: Sequence[str],
    normalization: Normalization,
    unconditional: Sequence[float] = (),
) -> int:
    """Return the place of the choice with the highest score; of equal ones the first.

    Args:
        likelihoods: natural logarithms, of each continuation after its context.
        continuations: the texts, with their leading space, which counts as a character.
        normalization: how a likelihood becomes a score.
        unconditional: log-likelihoods after "Answer:" alone, for that normalization.
    """
    match normalization:
        case Normalization.NONE:
            scores = list(likelihoods)
        case Normalization.PER_CHARACTER:
            scores = [
                value / len(text) for value, text in zip(likelihoods, continuations, strict=True)
            ]
        case Normalization.UNCONDITIONAL:
            scores = [value - own for value, own in zip(likelihoods, unconditional, strict=True)]
    return max(range(len(scores)), key=lambda place: (scores[place], -place))


def accuracy(right: Sequence[float], groups: Sequence[str | None]) -> float:
    """Return the mean of the groups' means; of all where there are no groups.

    Args:
        right: 1 or 0 for each question (or a share).
        groups: each question's subject, or None.
    """
    means = []
    for group in dict.fromkeys(groups):
        own = [value for value, name in zip(right, groups, strict=True) if name == group]
        means.append(sum(own) / len(own))
    return sum(means) / len(means)


def generated(text: str, answers: Sequence[str], metric: Metric) -> float:
    """Return the score of a generated text, 0 to 1."""
    match metric:
        case Metric.RECALL:
            found = sum(answer.lower() in text.lower() for answer in answers)
            return found / len(answers)
        case Metric.BEST_SUBSPAN:
            return float(any(normalized(answer) in normalized(text) for answer in answers))
        case Metric.EXACT:
            first = _decomposed(text.split("\n")[0])
            return float(any(_decomposed(answer) == first for answer in answers))


def _decomposed(text: str) -> str:
    """Return a text as Zhao et al. compare it: by SQuAD's rules, accents apart from letters."""
    return normalized(unicodedata.normalize("NFD", text))


def normalized(text: str) -> str:
    """Return a text as SQuAD compares it: no case, punctuation, articles, doubled spaces."""
    text = "".join(each for each in text.lower() if each not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def mean(values: Iterable[float]) -> float:
    """Return the plain mean."""
    values = list(values)
    return sum(values) / len(values)
