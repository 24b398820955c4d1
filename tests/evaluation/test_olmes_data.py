"""The standard tasks' prompts: AI2's, byte for byte, and the shots that OLMES names."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest

from megatron_skyladder.errors import UsageError
from megatron_skyladder.evaluation import olmes
from megatron_skyladder.evaluation.data import Question
from megatron_skyladder.evaluation.olmes import Item
from megatron_skyladder.evaluation.tasks import CHOICE, CLOZE, FORMULATIONS, STANDARD

# questions and choices of the full sets, as arXiv:2406.08446 and AI2's package have them
COUNTS = {
    "arc_easy": (2376, 9501),
    "arc_challenge": (1172, 4687),
    "csqa": (1221, 6105),
    "hellaswag": (10042, 40168),
    "openbookqa": (500, 2000),
    "piqa": (1838, 3676),
    "siqa": (1954, 5862),
    "winogrande": (1267, 2534),
}
# OLMES' shots without ids: first 12 digits of sha256 over the fields, one on each line
PIQA = ("86f460e9bfef", "bd037b9ea39e", "d202e150ff3d", "5a7bf002974a", "20e777c9545f")
WINOGRANDE = ("246e96fcb008", "6f389a30cc3d", "044c3544d7ae", "ee6c949b2589", "92ec5ca6323b")
ITEM = Item("Question: Why?", ("so", "because"), 1)


@pytest.fixture(scope="session")
def questions(ai2: Path) -> dict[str, dict[str, list[Question]]]:
    """All tasks' questions; that this raises nothing is the comparison with AI2's requests."""
    return {name: olmes.questions(task, ai2) for name, task in STANDARD.items()}


def test_every_request_of_ai2s_is_ours(
    questions: dict[str, dict[str, list[Question]]],
) -> None:
    found = {
        name: (len(both[CLOZE]), sum(len(each.continuations) for each in both[CLOZE]))
        for name, both in questions.items()
        if name != "mmlu"
    }
    assert found == COUNTS
    assert 2 * sum(choices for _, choices in COUNTS.values()) == 149_066
    for both in questions.values():
        pairs = zip(both[CLOZE], both[CHOICE], strict=True)
        assert all((one.gold, one.sampled) == (other.gold, other.sampled) for one, other in pairs)


def test_mmlu(questions: dict[str, dict[str, list[Question]]]) -> None:
    found = questions["mmlu"][CHOICE]
    assert len(found) == 14_042 and len({each.group for each in found}) == 57
    law = [each.sampled for each in found if each.group == "professional_law"]
    assert len(law) == 1534 and sum(law) == 1000  # the one subject that is sampled
    first = found[0].contexts[0]
    head = "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
    assert first.startswith(f"{head}Question: ")
    assert first.count("\nAnswer: ") == 5 and first.endswith("\nAnswer:")
    cloze = questions["mmlu"][CLOZE][0].contexts[0]
    assert cloze.startswith(f"{head}Question: ") and " A. " not in cloze


def fields_of_choice(block: str) -> str:
    """Return the fields of a shot in the multiple-choice form, one on each line."""
    stem, *options = block.split("\n")[:-1]  # without the answer
    return "\n".join([stem.split(": ", 1)[1], *(option[len(" A. ") :] for option in options)])


@pytest.mark.parametrize(("name", "expected"), [("piqa", PIQA), ("winogrande", WINOGRANDE)])
def test_the_shots_are_those_that_olmes_names(
    questions: dict[str, dict[str, list[Question]]], name: str, expected: tuple[str, ...]
) -> None:
    shots = questions[name][CHOICE][0].contexts[0].split("\n\n")[:5]
    found = [
        hashlib.sha256(fields_of_choice(shot).replace("___", "_").encode()).hexdigest()[:12]
        for shot in shots
    ]
    assert tuple(found) == expected


def test_blocks_by_hand() -> None:
    assert olmes.block("arc_easy", ITEM, CLOZE) == "Question: Why?\nAnswer:"
    assert olmes.block("arc_easy", ITEM, CHOICE) == ("Question: Why?\n A. so\n B. because\nAnswer:")
    assert olmes.block("hellaswag", Item("He", ("runs", " sits"), 0), CHOICE) == (
        "He\nChoose the best continuation:\n A. runs\n B. sits\nAnswer:"
    )
    assert olmes.block("hellaswag", Item("He", ("runs", "sits"), 0), CLOZE) == "He"
    assert olmes.continuations(ITEM, CLOZE) == (" so", " because")
    assert olmes.continuations(ITEM, CHOICE) == (" A", " B")


def test_the_thousand_of_olmes() -> None:
    assert olmes.sampled(1500) == set(range(1500))
    assert olmes.sampled(1501) == set(random.Random(1234).sample(range(1501), 1000))


@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_another_rule_is_noticed(
    ai2: Path, monkeypatch: pytest.MonkeyPatch, formulation: str
) -> None:
    """A missing space before letters, or another introduction of the question."""
    right = olmes.block

    def wrong(task: str, item: Item, which: str) -> str:
        text = right(task, item, which)
        if which != formulation:
            return text
        return text.replace("\n A.", "\nA.") if which == CHOICE else text.removeprefix("Question: ")

    monkeypatch.setattr(olmes, "block", wrong)
    with pytest.raises(UsageError, match=rf"OBQA \({formulation}\)"):
        olmes.questions(STANDARD["openbookqa"], ai2)
