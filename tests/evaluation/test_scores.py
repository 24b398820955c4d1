"""Scores, errors and tables against hand counts."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_skyladder.errors import UsageError
from megatron_skyladder.evaluation import picture, results, scoring, significance, table
from megatron_skyladder.evaluation.results import Result
from megatron_skyladder.evaluation.tasks import PAPER, STANDARD, Metric, Normalization


@pytest.mark.parametrize(
    ("normalization", "unconditional", "expected"),
    [
        (Normalization.NONE, (), 0),  # -4 > -6 > -6.5
        # -4 / 2, -6 / 6, -6.5 / 7; without the leading space it would be -4 / 1, -6 / 5, -6.5 / 6
        (Normalization.PER_CHARACTER, (), 2),
        (Normalization.UNCONDITIONAL, (-1.0, -6.0, -3.0), 1),  # -3, 0, -3.5
    ],
)
def test_each_normalization_has_a_winner_of_its_own(
    normalization: Normalization, unconditional: tuple[float, ...], expected: int
) -> None:
    texts = (" a", " bbbbb", " cccccc")
    assert scoring.choice((-4.0, -6.0, -6.5), texts, normalization, unconditional) == expected


def test_the_leading_space_is_a_character() -> None:
    # -2 / 2 = -1 is above -4.4 / 4 = -1.1; without the spaces -2 / 1 would be below -4.4 / 3
    assert scoring.choice((-2.0, -4.4), (" a", " abc"), Normalization.PER_CHARACTER) == 0


def test_of_equal_choices_the_first_counts() -> None:
    assert scoring.choice((-1.0, -1.0), (" a", " b"), Normalization.NONE) == 0


def test_subjects_count_alike() -> None:
    assert scoring.accuracy([1, 1, 1, 0], ["a", "a", "a", "b"]) == 0.5  # not 0.75
    assert scoring.accuracy([1, 1, 1, 0], [None] * 4) == 0.75


@pytest.mark.parametrize(
    ("text", "answers", "metric", "expected"),
    [
        ("it is 17 or 4", ["17", "23"], Metric.RECALL, 0.5),
        ("ABC", ["abc"], Metric.RECALL, 1.0),
        ("The answer is: the Eiffel-Tower!", ["Eiffel Tower"], Metric.BEST_SUBSPAN, 0.0),
        ("It is the Eiffel Tower.", ["an eiffel  tower"], Metric.BEST_SUBSPAN, 1.0),
    ],
)
def test_generated_texts(text: str, answers: list[str], metric: Metric, expected: float) -> None:
    assert scoring.generated(text, answers, metric) == expected


def test_errors_by_hand() -> None:
    # 1 0 1 1: mean 3/4, variance (3 * 1/16 + 9/16) / 3 = 1/4, error sqrt(1/4 / 4) = 1/4
    assert significance.standard_error([1, 0, 1, 1]) == pytest.approx(0.25)
    assert significance.standard_error([1]) == 0.0
    # differences -1 0 1 1: mean 1/4, sum of squares 3 - 4/16 = 11/4, variance 11/12
    paired = significance.paired_error([1, 0, 0, 0], [0, 0, 1, 1], [None] * 4)
    assert paired == pytest.approx(math.sqrt(11 / 12 / 4))
    # two groups of equal weight: sqrt(e1^2 + e2^2) / 2
    grouped = significance.grouped_error([1, 0, 1, 1, 1, 1], ["a"] * 4 + ["b"] * 2)
    assert grouped == pytest.approx(0.125)


def test_a_question_that_several_groups_ask_counts_once() -> None:
    """Questions q and r each at places a and b: two independent figures, not four."""
    values, groups, questions = [1, 0, 1, 1], ["a", "a", "b", "b"], ["q", "r", "q", "r"]
    # means over places: q 1, r 1/2; variance 2 * 1/16 = 1/8, error sqrt(1/8 / 2) = 1/4
    assert significance.grouped_error(values, groups, questions) == pytest.approx(0.25)
    # a thousand copies of a place bring no information: the error is that of one place
    once = significance.standard_error([1, 0, 1, 1])
    places = [str(place) for place in range(1000) for _ in range(4)]
    copies = significance.grouped_error([1, 0, 1, 1] * 1000, places, list("qrst") * 1000)
    assert copies == pytest.approx(once) == 0.25
    assert significance.grouped_error([1, 0, 1, 1] * 1000, places) < 0.01  # taken as independent
    # differences b - a: q 0, -1; r 1, 1: means -1/2 and 1, variance 9/8, error sqrt(9/16)
    paired = significance.paired_error([1, 0, 1, 0], [1, 1, 0, 1], groups, questions)
    assert paired == pytest.approx(0.75)
    assert significance.grouped_error([1, 0], ["a", "b"], ["q", "q"]) == 0.0  # one question


def test_the_error_over_questions_is_what_drawing_questions_anew_gives() -> None:
    """Also where only some questions stand at both places, as with --limit."""
    random = np.random.default_rng(1)
    easy = random.normal(size=400)
    values = (easy[:, None] + random.normal(size=(400, 2)) > 0).astype(float)
    places = [0] * 400 + [1] * 250
    questions = [*range(400), *range(250)]
    scores = [*values[:, 0], *values[:250, 1]]
    found = significance.grouped_error(scores, [*map(str, places)], [*map(str, questions)])
    drawn = []
    for _ in range(2000):
        chosen = random.integers(400, size=400)
        first, second = values[chosen, 0], values[chosen[chosen < 250], 1]
        drawn.append((first.mean() + second.mean()) / 2)
    assert found == pytest.approx(np.std(drawn), rel=0.06)
    as_independent = significance.grouped_error(scores, [*map(str, places)])
    assert as_independent < 0.92 * found


def test_mdqa_has_errors_over_questions_and_no_p() -> None:
    ids = [f"{place}/{number}" for place in (0, 4) for number in (0, 1)]
    own = {"ids": ids, "groups": ["0", "0", "4", "4"], "length": 8192}
    first = result("a", "mdqa", [1, 0, 1, 0], [0] * 4, **own)
    second = result("b", "mdqa", [1, 1, 0, 1], [0] * 4, **own)
    (row,) = table.rows([[first], [second]])
    # questions' means: first 1, 0; second 1/2, 1; differences -1/2, 1: as above
    assert row.errors == pytest.approx((50.0, 25.0)) and row.difference == 25.0
    assert row.difference_error == pytest.approx(75.0) and row.p is None
    assert "MDQA has no p: McNemar's test takes" in table.text([row], ("a", "b"))
    assert table.as_json([row], ("a", "b"), [[first], [second]])["note"].endswith("their places.")
    assert "MDQA" not in table.note(table.rows([[first]]))


def test_mcnemar_by_hand() -> None:
    first = [1.0] * 1 + [0.0] * 5 + [1.0] * 10
    second = [0.0] * 1 + [1.0] * 5 + [1.0] * 10
    # 1 against 5 disagreements: 2 * (1 + 6) / 2^6
    assert significance.mcnemar(first, second) == pytest.approx(14 / 64)
    assert significance.mcnemar(first, first) == 1.0


def result(model: str, task: str, cf: list[float], mcf: list[float], **more: object) -> Result:
    values: dict[str, object] = {
        "length": None,
        "asked": "sampled",
        "ids": [str(each) for each in range(len(cf))],
        "groups": [None] * len(cf),
        "data": {},
        "weights": model,
        "seconds": 1.0,
        **more,
    }
    return Result(model=model, task=task, scores={"cf": cf, "mcf": mcf}, **values)  # type: ignore[arg-type]


def test_the_better_formulation_counts_for_each_model() -> None:
    first = result("a", "arc_easy", [1, 0, 0, 0], [1, 1, 0, 0])
    second = result("b", "arc_easy", [1, 1, 1, 0], [0, 0, 0, 0])
    (row,) = table.rows([[first], [second]])
    assert row.scores == (50.0, 75.0) and row.difference == 25.0
    assert row.p == 1.0  # one disagreement
    # 0 0 1 0: mean 1/4, variance (3/16 + 9/16) / 3 = 1/4
    assert row.difference_error == pytest.approx(25.0)


def test_the_table_has_the_means_and_the_papers_figures() -> None:
    names = list(STANDARD)
    models = [
        [result(model, name, [1, score, 0, 0], [0, 0, 0, 0]) for name in names]
        for model, score in (("constant", 0), ("ladder", 1))
    ]
    rows = table.rows(models, "1b-8k-cc-intradoc")
    assert [row.name for row in rows] == [*names, "standard"]
    assert rows[0].paper == (61.8, 64.8) and rows[-1].paper == (47.4, 49.3)
    assert rows[-1].scores == (25.0, 50.0) and rows[-1].p is None
    # nine differences with error 25 each: 25 * 3 / 9
    assert rows[-1].difference_error == pytest.approx(25 / 3)
    text = table.text(rows, ("constant", "ladder"))
    assert "ARC-E" in text and "+25.0 ± 25.0" in text and "49.3" in text
    assert "nothing about another training run" in text


def test_rows_asked_in_different_ways_have_means_of_their_own() -> None:
    sampled = [result("a", name, [1, 0], [0, 0]) for name in ("arc_easy", "piqa")]
    first = [result("a", name, [1, 1], [0, 0], asked="first2") for name in ("arc_easy", "piqa")]
    rows = table.rows([[*sampled, *first]])
    means = [(row.title, row.scores) for row in rows if row.name == "standard"]
    assert means == [("mean of 2 of 9 (sampled)", (50.0,)), ("mean of 2 of 9 (first2)", (100.0,))]


def test_rulers_mean_is_that_of_one_length() -> None:
    found = [
        result("a", name, [score], [0.0], length=length)
        for length, score in ((4096, 1.0), (8192, 0.0))
        for name in ("niah_multikey_2", "niah_multikey_3")
    ]
    means = [(row.title, row.scores) for row in table.rows([found]) if row.name == "ruler"]
    assert means == [
        ("RULER 4,096, mean of 2 of 3", (100.0,)),
        ("RULER 8,192, mean of 2 of 3", (0.0,)),
    ]


def test_a_score_is_of_one_length_of_input() -> None:
    """What two models read of the same long prompts, cut at different lengths, is not the same."""
    short, long = (
        [result("a", name, [score], [0.0], length=length) for name in ("squad", "nq", "mdqa")]
        for length, score in ((2048, 0.0), (8192, 1.0))
    )
    rows = table.rows([[*short, *long]])
    assert [(row.title, row.scores) for row in rows] == [
        ("SQuAD at 2,048", (0.0,)),
        ("NQ, documents at 2,048", (0.0,)),
        ("reading 2,048, mean of 2 of 5", (0.0,)),
        ("SQuAD at 8,192", (100.0,)),
        ("NQ, documents at 8,192", (100.0,)),
        ("reading 8,192, mean of 2 of 5", (100.0,)),
        ("MDQA, 30 documents at 2,048", (0.0,)),
        ("MDQA, 30 documents at 8,192", (100.0,)),
    ]
    assert table.rows([short, long]) == []
    assert table.asked_differently([short, long]) == [
        "SQuAD",
        "NQ, documents",
        "MDQA, 30 documents",
    ]
    assert table.asked_differently([short, [*short, *long]]) == []
    assert len({each.file_name for each in (*short, *long)}) == 6


def test_the_picture_has_places_of_one_length() -> None:
    short, long = (
        result("a", "mdqa", [score, 0.0], [0.0, 0.0], length=length, groups=["0", "4"])
        for length, score in ((2048, 0.0), (8192, 1.0))
    )
    assert picture.by_place([[short, long], [long]]) == (8192, [{0: 100.0, 4: 0.0}] * 2)
    assert picture.by_place([[short, long], [short]]) == (2048, [{0: 0.0, 4: 0.0}] * 2)
    assert picture.by_place([[short], [long]]) == (0, [])


def test_a_result_that_does_not_say_where_its_prompts_were_cut_is_refused(tmp_path: Path) -> None:
    for task in ("piqa", "mdqa"):  # as earlier versions kept both
        results.write(tmp_path, result("a", task, [1.0], [0.0], length=None))
    with pytest.raises(UsageError, match=r"mdqa.sampled.json does not say .* were cut. Remove it"):
        results.read(tmp_path)
    (tmp_path / "results/mdqa.sampled.json").unlink()
    assert [each.task for each in results.read(tmp_path)] == ["piqa"]


def test_the_picture_has_ruler_by_length(tmp_path: Path) -> None:
    def model(name: str, scores: dict[int, float]) -> list[Result]:
        return [
            result(name, task, [score, 0.0], [0.0, 0.0], length=length)
            for length, score in scores.items()
            for task in ("niah_multikey_2", "niah_multikey_3")
        ]

    models = [model("a", {4096: 1.0, 8192: 0.0, 32768: 1.0}), model("b", {4096: 1.0, 8192: 1.0})]
    assert picture.by_length(models) == [{4096: 50.0, 8192: 0.0}, {4096: 50.0, 8192: 50.0}]
    assert picture.by_length([model("a", {4096: 1.0})]) == []
    picture.draw(tmp_path / "x.svg", table.rows(models), ("a", "b"), models)
    assert "<svg" in (tmp_path / "x.svg").read_text()


def test_only_the_same_questions_are_compared() -> None:
    first = result("a", "piqa", [1, 0], [0, 0])
    other = result("b", "piqa", [1, 0], [0, 0], ids=["7", "8"])
    assert table.rows([[first], [other]]) == []
    assert len(table.rows([[first]])) == 1
    assert table.asked_differently([[first], [other]]) == ["PIQA"]


def test_what_asked_the_models_is_named_where_it_differs() -> None:
    def model(name: str, **versions: str) -> list[Result]:
        return [
            result(name, task, [1, 0], [0, 0], versions=versions) for task in ("piqa", "arc_easy")
        ]

    old, new = model("a", torch="2.14.0", device="cpu"), model("b", torch="2.15.0", device="cuda")
    assert table.asked_by_others([old, new]) == ["torch 2.14.0 and 2.15.0", "device cpu and cuda"]
    assert table.asked_by_others([old, model("b", torch="2.14.0", backend="hf")]) == []
    assert table.asked_by_others([old]) == []
    others = [replace(each, ids=["7", "8"]) for each in new]  # not compared at all
    assert table.asked_by_others([old, others]) == []
    found = table.as_json(table.rows([old, new]), ("a", "b"), [old, new])
    assert found["asked_by_others"] and found["asked"] == ["sampled"]


def test_the_same_needles_under_another_tokenizer_are_not_compared() -> None:
    """Numbered alike, but the texts around them are others."""
    name = "niah_multikey_2"
    one, other = (
        result("a", name, [1, 0], [0, 0], length=4096, data={f"long/{name}.4096.{tokenizer}": "0"})
        for tokenizer in ("11111111", "22222222")
    )
    assert table.rows([[one], [other]]) == []
    assert table.asked_differently([[one], [other]]) == ["RULER MK-2 4,096"]
    assert table.asked_differently([[one], [one]]) == []


@pytest.mark.parametrize("run", ["1b-8k-cc", "1b-8k-cc-intradoc"])
def test_the_papers_averages_are_the_means_of_its_tasks(run: str) -> None:
    figures = PAPER[run]
    for model in (0, 1):
        mean = sum(figures[name][model] for name in STANDARD) / len(STANDARD)
        assert figures["standard"][model] == round(mean, 1)
        long = (figures["mdqa"][model] + figures["ruler"][model]) / 2
        assert figures["long"][model] == pytest.approx(long, abs=0.051)  # of rounded figures


def test_the_mean_of_long_contexts_is_that_of_mdqa_and_rulers_mean() -> None:
    found = [
        result("a", name, [score], [0.0], length=length)
        for length in (4096, 8192)
        for name, score in (
            *(("niah_multikey_2", 0.0), ("niah_multikey_3", 0.0), ("niah_multivalue", 0.6)),
            ("mdqa", 1.0),
        )
        if (name, length) != ("niah_multivalue", 4096)  # of two tasks there is none
    ]
    rows = [row for row in table.rows([found], "1b-32k") if row.name == "long"]
    # (100 + (0 + 0 + 60) / 3) / 2
    (row,) = rows
    assert row.scores == (pytest.approx(60.0),) and row.paper == (9.7, 13.5)
    assert row.title == "long 8,192, mean of MDQA and RULER"


def test_results_are_kept(tmp_path: Path) -> None:
    kept = [
        result("a", "piqa", [1.0, 0.0], [0.0, 0.0]),
        result("a", "arc_easy", [1.0, 0.0], [0.0, 0.0]),
    ]
    for each in kept:
        results.write(tmp_path, each)
    assert results.read(tmp_path) == [kept[1], kept[0]]  # in the order of the tasks
