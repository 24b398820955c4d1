"""What an evaluation found: one JSON file per model and task, with the score of every question.

Scores of single questions are kept because two models are compared question by question. A file is
written when its task is done, so that an interrupted evaluation goes on with the next one.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_skyladder.errors import UsageError
from megatron_skyladder.evaluation import mdqa, scoring, significance
from megatron_skyladder.evaluation.tasks import GENERATIVE, MDQA, RACE, RULER, STANDARD, TITLES
from megatron_skyladder.files import write_text

FOLDER = "results"


@dataclass(frozen=True)
class Result:
    """One model on one task.

    Args:
        model: its name in tables.
        task: a name in `tasks`.
        length: tokens of the model's input at most, and of RULER's rows; None for standard tasks,
            whose limit is ``STANDARD_TOKENS``.
        asked: sampled, full, or how many questions.
        scores: by formulation (or "generated"), one number for each question.
        ids: of the questions.
        groups: their subjects or places.
        data: file -> sha256, of what was asked.
        weights: tells the model from another under its name.
        seconds: that it took.
        versions: of what asked, and its backend and device.
    """

    model: str
    task: str
    length: int | None
    asked: str
    scores: dict[str, list[float]]
    ids: list[str]
    groups: list[str | None]
    data: dict[str, str]
    weights: str
    seconds: float
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The task's name in tables."""
        title = TITLES[self.task]
        if self.length is None:
            return title
        return f"{title} {self.length:,}" if self.task in RULER else f"{title} at {self.length:,}"

    def score(self, formulation: str) -> float:
        """Return the score in one formulation, 0 to 1."""
        return scoring.accuracy(self.scores[formulation], self.groups)

    @property
    def best(self) -> str:
        """The formulation that counts: the better one, of equal ones the first."""
        return max(
            self.scores, key=lambda each: (self.score(each), each == next(iter(self.scores)))
        )

    @property
    def percent(self) -> float:
        """The score that counts, in percent."""
        return 100 * self.score(self.best)

    @property
    def error(self) -> float:
        """The standard error of that, over questions, in percent."""
        return 100 * significance.grouped_error(self.scores[self.best], self.groups, self.questions)

    @property
    def questions(self) -> list[str] | None:
        """What each answer is to, where a question is asked several times; None: once each."""
        return [mdqa.question_of(each) for each in self.ids] if self.task == MDQA else None

    @property
    def file_name(self) -> str:
        """Where it is kept, in the folder of its model."""
        parts = [self.task, *([str(self.length)] if self.length else []), self.asked]
        return f"{FOLDER}/{'.'.join(parts)}.json"


def write(folder: Path, result: Result) -> None:
    """Keep a result in the folder of its model."""
    path = folder / result.file_name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(asdict(result)) + "\n")


def read(folder: Path) -> list[Result]:
    """Return the results in the folder of a model, in the order of the tasks.

    Raises:
        UsageError: one cannot be read.
    """
    order = [*STANDARD, *GENERATIVE, RACE.name]
    found = []
    for path in sorted((folder / FOLDER).glob("*.json")):
        try:
            result = Result(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UsageError(
                f"{path} is no result of this version ({error}). Remove it; skyladder evaluate "
                "asks its task again."
            ) from None
        # until November 2026 RULER's alone had one: a score may be of prompts cut anywhere
        if result.length is None and result.task not in STANDARD:
            raise UsageError(
                f"{path} does not say at how many tokens its prompts were cut. Remove it; "
                "skyladder evaluate asks its task again."
            )
        found.append(result)
    return sorted(found, key=lambda each: (order.index(each.task), each.length or 0, each.asked))


def of_one_model(folder: Path) -> list[Result]:
    """Return the results in a folder that has those of one model alone.

    Raises:
        UsageError: there is none, one cannot be read, or they are of several models.
    """
    found = read(folder)
    if not found:
        raise UsageError(f"{folder} has no results. Give the folder of a model in OUT.")
    files: dict[str, list[str]] = {}
    for each in found:
        files.setdefault(each.weights, []).append(Path(each.file_name).name)
    if len(files) > 1:
        groups = "; ".join(", ".join(names) for names in files.values())
        raise UsageError(
            f"{folder / FOLDER} has results of {len(files)} models: {groups}. Move all but those "
            "of one model elsewhere."
        )
    return found
