"""Reading comprehension as the paper asks it: the rules of Zhao et al. (ACL 2024), and RACE.

Four tasks are answered in words, after some solved examples, and count where the first line is an
answer exactly. Their data is one archive, `eval_data.zip` of yuzhaouoe/eval_data on the Hugging
Face hub; unpack it and name the folder. RACE's choices are compared by likelihood, by lm-eval's own
prompts; its rows come from the hub too, or from a file in that folder.

Zhao et al. ask every question five times, after the examples that five seeds draw. Here each
question is asked once, with the seeds in turn: the same mean, at a fifth of the cost.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_skyladder.errors import UsageError
from megatron_skyladder.evaluation.data import Prompt, Question, whole_file

ARCHIVE = "huggingface.co/yuzhaouoe/eval_data (eval_data.zip)"
RACE, RACE_FILE = "EleutherAI/race", "race_high_test.jsonl"
RACE_PATH = "reading/race_high.cf.jsonl"  # in the folder of prepared data
SEEDS = (42, 43, 44, 45, 46)
_DOCUMENTS = 2  # of those that were retrieved for a question


@dataclass(frozen=True)
class Source:
    """Where a task's rows are and how they become text.

    Args:
        shots: solved examples before each question (the paper's Table 2).
        examples: the file they are drawn from.
        questions: the file that is asked.
        text: makes the text of a question up to "Answer:" from its row.
        answers: all that count; the first one is shown in examples.
    """

    shots: int
    examples: str
    questions: str
    text: Callable[[Any], str]
    answers: Callable[[Any], Sequence[str]]


def _passage(row: Any) -> str:
    passage, question = row["context"].strip(), row["question"].strip()
    return f"Passage: {passage}\nQuestion: {question}\nAnswer:"


def _retrieved(row: Any) -> str:
    return _documents(row, [(it["title"], it["text"]) for it in row["ctxs"][:_DOCUMENTS]])


def _paragraphs(row: Any) -> str:
    return _documents(row, [(title, "".join(sentences)) for title, sentences in row["context"]])


def _documents(row: Any, documents: Sequence[tuple[str, str]]) -> str:
    context = "".join(f"{title}. {text}\n" for title, text in documents)
    return f"Context: {context}Question: {row['question']}\nAnswer:"


def _trivia_answers(row: Any) -> Sequence[str]:
    target = [row["target"]] if "target" in row else []
    return [*target, *row["answers"]]


SOURCES = {
    "hotpotqa": Source(
        2,
        "hotpot_train_v1.1.json",
        "hotpot_dev_fullwiki_v1.json",
        _paragraphs,
        lambda row: [row["answer"]],
    ),
    "squad": Source(
        4,
        "squad_train.jsonl",
        "squad_validation.jsonl",
        _passage,
        lambda row: [text.strip() for text in row["answers"]["text"]],
    ),
    "nq": Source(
        2, "nq-dev-dense-results.json", "nq_test.json", _retrieved, lambda row: row["answers"]
    ),
    "triviaqa": Source(2, "tq_obqa_train.json", "tq_obqa_test.json", _retrieved, _trivia_answers),
}


def prompts(task: str, folder: Path) -> list[Prompt]:
    """Return the prompts of a task in `SOURCES`.

    Args:
        task: its name.
        folder: with the archive's files.

    Raises:
        UsageError: a file is not there, or has other rows.
    """
    source = SOURCES[task]
    examples, questions = (_rows(folder / name) for name in (source.examples, source.questions))
    try:
        shown = [_examples(source, examples, seed) for seed in SEEDS]
        return [
            Prompt(
                id=str(number),
                prompt=shown[number % len(SEEDS)] + source.text(row),
                answers=tuple(source.answers(row)),
            )
            for number, row in enumerate(questions)
        ]
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise UsageError(
            f"{source.examples} or {source.questions} in {folder} has other rows than those of "
            f"{ARCHIVE} ({type(error).__name__}: {error})."
        ) from None


def _examples(source: Source, rows: list[Any], seed: int) -> str:
    drawn = list(rows)
    np.random.RandomState(seed).shuffle(drawn)
    texts = [f"{source.text(row)} {source.answers(row)[0]}" for row in drawn[: source.shots]]
    return "".join(f"{text}\n\n" for text in texts)


def _rows(path: Path) -> list[Any]:
    if not path.is_file():
        raise UsageError(
            f"{path} is not there. Unpack {ARCHIVE} and name the folder with --reading-from."
        )
    with whole_file(path):
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        rows = json.loads(text)
    if not isinstance(rows, list):
        raise UsageError(f"{path} is no list of questions. Is it the file of {ARCHIVE}?")
    return rows


def race(folder: Path | None) -> list[Question]:
    """Return RACE's questions (high school, test), by lm-eval's prompts.

    Args:
        folder: may have `RACE_FILE`, a row of the data set on each line; else the hub is asked.

    Raises:
        UsageError: they cannot be had.
    """
    try:
        from lm_eval.tasks.race import preprocess_race
    except ImportError as error:
        raise UsageError(f"RACE needs lm-eval: pip install '.[evaluate]' ({error}).") from None
    return [
        Question(
            id=str(row.get("example_id", number)),
            contexts=(preprocess_race.doc_to_text(row),),
            continuations=tuple(f" {text}" for text in preprocess_race.doc_to_choice(row)),
            gold=preprocess_race.doc_to_target(row),
        )
        for number, row in enumerate(_race_rows(folder))
    ]


def _race_rows(folder: Path | None) -> list[Any]:
    if folder is not None and (folder / RACE_FILE).is_file():
        return _rows(folder / RACE_FILE)
    try:
        from datasets import load_dataset

        return list(load_dataset(RACE, "high", split="test"))
    except Exception as error:  # the hub's errors are of many types
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UsageError(
            f"{RACE} could not be read from the Hugging Face hub: {first}. Where there is a "
            f'network: load_dataset("{RACE}", "high", split="test").to_json("{RACE_FILE}"); put '
            "the file into the folder of --reading-from."
        ) from None
