"""The benchmarks, as data: what each is called, how it is scored, what the paper got.

Standard tasks follow OLMES (Gu et al., 2024, v0.1) in both of its formulations: cloze (the text of
a choice is scored) and multiple choice (its letter is). The better one counts. Sources of what the
SkyLadder paper evaluated: arXiv:2503.15450, Tables 1, 2 and 28.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

CLOZE, CHOICE = "cf", "mcf"
FORMULATIONS = (CLOZE, CHOICE)
UNCONDITIONAL_CONTEXT = "Answer:"  # what a choice's own likelihood is measured after
MDQA = "mdqa"  # the one task that asks a question several times
STANDARD_TOKENS = 2048  # of input at most, cut on the left


class Normalization(Enum):
    """How the log-likelihood of a choice becomes its score."""

    NONE = "none"
    PER_CHARACTER = "per character"  # divided by the length, leading space included
    UNCONDITIONAL = "unconditional"  # less the log-likelihood after "Answer:" alone


class Metric(Enum):
    """How a generated text is scored, 0 to 1."""

    RECALL = "recall"  # share of the answers that occur in it
    BEST_SUBSPAN = "best subspan"  # whether any answer occurs in it, both normalised
    EXACT = "exact"  # whether its first line is an answer, both normalised


@dataclass(frozen=True)
class StandardTask:
    """A task whose choices are compared by their log-likelihoods.

    Args:
        name: in files and flags.
        title: in tables.
        cloze: how choices are scored in the cloze formulation; letters are never normalised.
        source: the folder of AI2's requests, and the part of it with all questions.
    """

    name: str
    title: str
    cloze: Normalization
    source: tuple[str, str] | None


@dataclass(frozen=True)
class GenerativeTask:
    """A task whose answers are generated, greedily.

    Args:
        name: in files and flags.
        title: in tables.
        suite: of ``SUITES``.
        metric: how an answer is scored.
        max_new_tokens: after which generation ends.
        stop: texts at which it ends before.
    """

    name: str
    title: str
    suite: str
    metric: Metric
    max_new_tokens: int
    stop: tuple[str, ...] = ()


STANDARD = {
    task.name: task
    for task in (
        StandardTask("arc_easy", "ARC-E", Normalization.PER_CHARACTER, ("arc_easy", "test")),
        StandardTask(
            "arc_challenge", "ARC-C", Normalization.UNCONDITIONAL, ("arc_challenge", "test")
        ),
        StandardTask("csqa", "CSQA", Normalization.UNCONDITIONAL, ("csqa", "val")),
        StandardTask("hellaswag", "HellaSwag", Normalization.PER_CHARACTER, ("hellaswag", "val")),
        StandardTask("openbookqa", "OBQA", Normalization.UNCONDITIONAL, ("openbookqa", "test")),
        StandardTask("piqa", "PIQA", Normalization.PER_CHARACTER, ("piqa", "val")),
        StandardTask("siqa", "SIQA", Normalization.PER_CHARACTER, ("socialiqa", "val")),
        StandardTask("winogrande", "WinoGrande", Normalization.NONE, ("winogrande", "val")),
        StandardTask("mmlu", "MMLU", Normalization.PER_CHARACTER, None),
    )
}
GENERATIVE = {
    task.name: task
    for task in (
        GenerativeTask("niah_multikey_2", "RULER MK-2", "long", Metric.RECALL, 50),
        GenerativeTask("niah_multikey_3", "RULER MK-3", "long", Metric.RECALL, 100),
        GenerativeTask("niah_multivalue", "RULER MV", "long", Metric.RECALL, 50),
        GenerativeTask(MDQA, "MDQA, 30 documents", "long", Metric.BEST_SUBSPAN, 100, ("\n",)),
        GenerativeTask("hotpotqa", "HotpotQA", "reading", Metric.EXACT, 20, ("\n",)),
        GenerativeTask("squad", "SQuAD", "reading", Metric.EXACT, 16, ("\n",)),
        GenerativeTask("nq", "NQ, documents", "reading", Metric.EXACT, 16, ("\n",)),
        GenerativeTask("triviaqa", "TriviaQA, documents", "reading", Metric.EXACT, 16, ("\n",)),
    )
}
RACE = StandardTask("race_high", "RACE-high", Normalization.NONE, None)  # the cloze form alone
READING = ("hotpotqa", "squad", "nq", "triviaqa", RACE.name)
CHOICES = {**STANDARD, RACE.name: RACE}  # all whose choices are compared
TITLES = {
    **{name: task.title for name, task in CHOICES.items()},
    **{name: task.title for name, task in GENERATIVE.items()},
}
RULER = ("niah_multikey_2", "niah_multikey_3", "niah_multivalue")
SUITES = ("standard", "long", "reading")
BACKENDS = ("hf", "vllm")

# The paper's figures, percent: model -> row -> (constant window, SkyLadder). Tables 1 and 2 have
# tasks, of other models only averages are at hand. RULER is the mean over the three tasks, long the
# mean of MDQA and RULER.
_RANDOM = (
    (58.0, 32.7, 49.6, 43.0, 40.2, 64.8, 46.4, 51.9, 29.9),
    (65.4, 35.6, 56.8, 47.0, 42.8, 64.8, 48.9, 56.0, 32.4),
)
_INTRADOC = (
    (61.8, 33.4, 52.7, 45.6, 38.0, 64.3, 45.7, 54.8, 30.5),
    (64.8, 33.8, 55.4, 47.9, 39.4, 66.1, 48.0, 56.4, 31.8),
)
_READING = ((6.5, 37.0, 15.8, 37.7, 30.7), (12.4, 40.2, 20.4, 43.0, 35.0))
_READING_INTRADOC = ((11.4, 39.0, 18.2, 42.3, 32.3), (11.0, 38.5, 20.4, 41.5, 34.3))
PAPER: dict[str, dict[str, tuple[float, float]]] = {
    "1b-8k-cc": {
        **dict(zip(STANDARD, zip(*_RANDOM, strict=True), strict=True)),
        "standard": (46.3, 50.0),
        **dict(zip(READING, zip(*_READING, strict=True), strict=True)),
        "reading": (25.5, 30.2),
        "mdqa": (17.7, 18.3),
        "ruler": (12.8, 10.3),
        "long": (15.3, 14.3),
    },
    "1b-8k-cc-intradoc": {
        **dict(zip(STANDARD, zip(*_INTRADOC, strict=True), strict=True)),
        "standard": (47.4, 49.3),
        **dict(zip(READING, zip(*_READING_INTRADOC, strict=True), strict=True)),
        "reading": (28.7, 29.1),
        "mdqa": (15.3, 15.6),
        "ruler": (10.6, 10.7),
        "long": (13.0, 13.2),
    },
    "1b-8k-fineweb-pro": {"standard": (52.5, 55.2), "long": (11.1, 12.3)},
    "1b-8k-fineweb-pro-intradoc": {"standard": (54.3, 54.8), "long": (12.7, 13.9)},
    "1b-32k": {"standard": (50.7, 54.3), "long": (9.7, 13.5)},
    "1b-32k-intradoc": {"standard": (54.0, 54.9), "long": (13.0, 14.4)},
    "3b-8k": {"standard": (57.0, 60.5), "long": (15.8, 19.3)},
    "360m-8k": {"standard": (47.2, 49.6), "long": (8.9, 8.9)},
    "120m-8k": {"standard": (40.1, 41.2), "long": (5.8, 5.1)},
}
