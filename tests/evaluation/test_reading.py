"""The reading tasks: prompts written out by hand, exact answers, through real lm-eval."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prepare_inputs import make_hf_folder
from random_models import LLAMA, write_model

from megatron_skyladder.cli import main
from megatron_skyladder.evaluation import reading, run, scoring, table
from megatron_skyladder.evaluation.data import DataFolder
from megatron_skyladder.evaluation.tasks import PAPER, READING, Metric

EXAMPLES, QUESTIONS = 20, 12


def retrieved(number: int) -> dict[str, Any]:
    documents = [{"title": f"T{number}{i}", "text": f"text {number} {i}"} for i in range(5)]
    return {"question": f"what {number}", "answers": [f"a {number}", "b"], "ctxs": documents}


def paragraphs(number: int) -> dict[str, Any]:
    context = [[f"P{i}", [f"one {number}.", " two."]] for i in range(2)]
    return {"question": f"which {number}", "answer": f"c {number}", "context": context}


def passage(number: int) -> dict[str, Any]:
    answers = {"text": [f"d {number} ", "e"], "answer_start": [1, 2]}
    return {"question": f" who {number} ", "context": f" p {number} ", "answers": answers}


def problems(number: int) -> dict[str, Any]:
    asked = [
        {"question": "It is  _  .", "answer": "B", "options": ["w", "x", "y", "z"]},
        {"question": "Why?", "answer": "C", "options": ["w", "x", "y", "z"]},
    ]
    return {"article": f"text {number}", "problems": repr(asked), "example_id": f"h{number}"}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up rows in the fields, files and formats of the archive, which lies on the hub."""
    folder = tmp_path_factory.mktemp("eval_data")
    makers = {"hotpotqa": paragraphs, "squad": passage, "nq": retrieved, "triviaqa": retrieved}
    for task, make in makers.items():
        source = reading.SOURCES[task]
        for name, count in ((source.examples, EXAMPLES), (source.questions, QUESTIONS)):
            rows = [make(number) for number in range(count)]
            if task == "triviaqa" and name == source.examples:
                rows = [{**row, "target": f"t {n}"} for n, row in enumerate(rows)]
            lines = [json.dumps(row) for row in rows]
            text = "\n".join(lines) if name.endswith("l") else f"[{', '.join(lines)}]"
            (folder / name).write_text(text)
    race = "\n".join(json.dumps(problems(number)) for number in range(3))
    (folder / reading.RACE_FILE).write_text(race)
    return folder


def drawn(question: int, shots: int) -> list[int]:
    """Which examples stand before a question, by numpy's generator of the seed in turn."""
    numbers = list(range(EXAMPLES))
    np.random.RandomState(42 + question % 5).shuffle(numbers)
    return numbers[:shots]


def test_prompts_with_retrieved_documents(archive: Path) -> None:
    found = reading.prompts("nq", archive)
    assert len(found) == QUESTIONS and found[3].answers == ("a 3", "b")
    one, two = drawn(7, 2)
    assert found[7].prompt == (
        f"Context: T{one}0. text {one} 0\nT{one}1. text {one} 1\nQuestion: what {one}\n"
        f"Answer: a {one}\n\n"
        f"Context: T{two}0. text {two} 0\nT{two}1. text {two} 1\nQuestion: what {two}\n"
        f"Answer: a {two}\n\n"
        "Context: T70. text 7 0\nT71. text 7 1\nQuestion: what 7\nAnswer:"
    )
    first = drawn(0, 2)[0]
    trivia = reading.prompts("triviaqa", archive)[0]
    assert f"Question: what {first}\nAnswer: t {first}\n\n" in trivia.prompt
    assert trivia.answers == ("a 0", "b")


def test_prompts_with_paragraphs_and_passages(archive: Path) -> None:
    (one, two), found = drawn(1, 2), reading.prompts("hotpotqa", archive)[1]
    assert found.answers == ("c 1",)
    assert found.prompt == (
        f"Context: P0. one {one}. two.\nP1. one {one}. two.\nQuestion: which {one}\n"
        f"Answer: c {one}\n\n"
        f"Context: P0. one {two}. two.\nP1. one {two}. two.\nQuestion: which {two}\n"
        f"Answer: c {two}\n\n"
        "Context: P0. one 1. two.\nP1. one 1. two.\nQuestion: which 1\nAnswer:"
    )
    squad = reading.prompts("squad", archive)[4]
    shown = [f"Passage: p {n}\nQuestion: who {n}\nAnswer: d {n}\n\n" for n in drawn(4, 4)]
    assert squad.prompt == "".join(shown) + "Passage: p 4\nQuestion: who 4\nAnswer:"
    assert squad.answers == ("d 4", "e")


def test_race_is_lm_evals(archive: Path) -> None:
    (question, *others) = reading.race(archive)
    assert len(others) == 2 and question.id == "h0"
    assert question.contexts == ("Article: text 0\n\nIt is x\nWhy?",)
    assert question.continuations == (" w", " x", " y", " z") and question.gold == 2


@pytest.mark.parametrize(
    ("text", "answers", "score"),
    [
        (" The  Eiffel Tower.\nQuestion: next", ("eiffel tower",), 1.0),
        (" Eiffel Tower in Paris", ("eiffel tower",), 0.0),
        (" x", ("y", "X!"), 1.0),
        (" Beyoncé", ("Beyonce\u0301",), 1.0),  # composed and not
        (" Beyonce", ("Beyoncé",), 0.0),
        ("", ("y",), 0.0),
    ],
)
def test_exact(text: str, answers: tuple[str, ...], score: float) -> None:
    assert scoring.generated(text, answers, Metric.EXACT) == score


def test_from_the_archive_to_the_table(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a random model: prepared, asked offline by lm-eval, with the mean of the suite."""
    data = tmp_path / "data"
    words = ["evaluate", "--prepare", str(data), "--tasks", "reading"]
    assert main([*words, "--reading-from", str(archive)]) == 0
    assert "5 files written, 0 there already, 51 rows" in capsys.readouterr().out
    model = tmp_path / "model"
    write_model(model, replace(LLAMA, vocab_size=300, max_positions=2048))
    make_hf_folder(model)
    settings = run.Settings(tasks=("reading",), length=512, batch_size="4", device="cpu")
    found = run.evaluate("m", model, tmp_path / "out", DataFolder(data), settings, print)
    assert {each.task: len(each.ids) for each in found} == {
        **dict.fromkeys(("hotpotqa", "squad", "nq", "triviaqa"), QUESTIONS),
        "race_high": 3,
    }
    rows = table.rows([found, found], "1b-8k-cc-intradoc")
    assert [row.name for row in rows[-6:]] == [*found_names(found), "reading"]
    assert rows[-1].title == "reading 512, mean of 5" and rows[-1].paper == (28.7, 29.1)


def found_names(found: list[Any]) -> list[str]:
    return [each.task for each in found]


def test_the_papers_means_are_means() -> None:
    """Table 2's averages are those of its columns, to its rounding."""
    for figures in (PAPER["1b-8k-cc"], PAPER["1b-8k-cc-intradoc"]):
        for place in (0, 1):
            mean = sum(figures[name][place] for name in READING) / len(READING)
            assert figures["reading"][place] == pytest.approx(mean, abs=0.1)


def test_what_is_not_there_or_another_file(archive: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["evaluate", "--prepare", str(tmp_path / "data"), "--tasks", "nq,hotpotqa"]
    assert main([*words, "--reading-from", str(tmp_path)]) == 1
    assert "nq-dev-dense-results.json is not there. Unpack hugg" in capsys.readouterr().out
    for name in ("nq-dev-dense-results.json", "nq_test.json"):
        (tmp_path / name).write_text('[{"question": "q"}]')
    main([*words, "--reading-from", str(tmp_path)])
    assert "has other rows than those of hugg" in capsys.readouterr().out
