"""MDQA: questions over 30 documents, one of which has the answer (Liu et al., 2024).

Its data is seven gzip files in the repository nelson-liu/lost-in-the-middle, one for each place of
the document with the answer. The paper gives one figure, presumably their mean.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from megatron_skyladder.errors import UsageError
from megatron_skyladder.evaluation.data import Prompt, whole_file

DOCUMENTS = 30
PLACES = (0, 4, 9, 14, 19, 24, 29)
REPOSITORY = "nelson-liu/lost-in-the-middle"
FOLDER = f"qa_data/{DOCUMENTS}_total_documents"
INSTRUCTION = (
    "Write a high-quality answer for the given question using only the provided search results "
    "(some of which might be irrelevant)."
)


def file_of(place: int) -> str:
    """Return the name of the file for a place of the gold document."""
    return f"nq-open-{DOCUMENTS}_total_documents_gold_at_{place}.jsonl.gz"


def prompts(folder: Path) -> list[Prompt]:
    """Return the prompts of all places.

    Args:
        folder: with the seven files.

    Raises:
        UsageError: one of them is not there, is another file, or asks other questions.
    """
    missing = [file_of(place) for place in PLACES if not (folder / file_of(place)).is_file()]
    if missing:
        raise UsageError(
            f"MDQA needs {', '.join(missing)} in {folder}. They lie in {FOLDER} of github.com/"
            f"{REPOSITORY}; fetch them and name their folder with --mdqa-from."
        )
    found: list[Prompt] = []
    asked: list[list[object]] = []  # the questions of each place
    for place in PLACES:
        asked.append([])
        for number, row in enumerate(_rows(folder / file_of(place))):
            found.append(_prompt(row, place, number))
            asked[-1].append(row["question"])
        if asked[-1] != asked[0]:  # errors and pairs go by the question's number
            raise UsageError(
                f"{file_of(place)} in {folder} asks other questions than {file_of(PLACES[0])}, or "
                f"the same in another order. Fetch all seven files of {REPOSITORY} anew."
            )
    return found


def question_of(prompt_id: str) -> str:
    """Return what tells a question from others at any place, out of the id of a prompt."""
    return prompt_id.partition("/")[2]


def _rows(path: Path) -> list[Any]:
    with whole_file(path), gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file if line.strip()]


def _prompt(row: dict[str, object], place: int, number: int) -> Prompt:
    documents = row.get("ctxs")
    if not isinstance(documents, list) or len(documents) != DOCUMENTS:
        raise UsageError(
            f"question {number} of {file_of(place)} has no {DOCUMENTS} documents: is it the file "
            f"of {REPOSITORY}?"
        )
    results = "\n".join(
        f"Document [{index}](Title: {document['title']}) {document['text']}"
        for index, document in enumerate(documents, start=1)
    )
    text = f"{INSTRUCTION}\n\n{results}\n\nQuestion: {row['question']}\nAnswer:"
    answers = row["answers"]
    assert isinstance(answers, list)
    return Prompt(f"{place}/{number}", text, tuple(map(str, answers)), group=str(place))
