"""Real lm-eval on models whose answers are known, with no connection to anywhere."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from prepare_inputs import make_hf_folder, make_texts
from random_models import LLAMA, write_model
from safetensors.torch import load_file, save_file

from megatron_skyladder.cli import main
from megatron_skyladder.errors import UsageError
from megatron_skyladder.evaluation import engine, run
from megatron_skyladder.evaluation.data import DataFolder, Prompt, Question
from megatron_skyladder.evaluation.run import Settings
from megatron_skyladder.evaluation.tasks import (
    GENERATIVE,
    UNCONDITIONAL_CONTEXT,
    Normalization,
)

CPU = Settings(device="cpu", batch_size="4", length=512)
pytestmark = pytest.mark.usefixtures("closed_sockets")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a tokenizer."""
    path = tmp_path_factory.mktemp("model") / "random"
    write_model(path, replace(LLAMA, vocab_size=300, max_positions=2048))
    return make_hf_folder(path)


@pytest.fixture(scope="session")
def questions() -> list[Question]:
    texts = iter(make_texts(400, seed=3))
    made = []
    for number in range(12):
        context = f"Question: {next(texts)[:60]}\nAnswer:"
        choices = tuple(f" {next(texts)[: 4 + 5 * place] or 'x'}" for place in range(3))
        made.append(Question(str(number), (context,), choices, number % 3))
    return made


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return engine.load(folder, "hf", max_length=2048, batch_size="4", device="cpu")


def by_hand(folder: Path, context: str, text: str) -> float:
    """Return log P(text | context) by the model itself."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    before = len(tokenizer(context, add_special_tokens=False).input_ids)
    tokens = tokenizer(context + text, add_special_tokens=False).input_ids
    with torch.no_grad():
        logs = network(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return sum(logs[place - 1, tokens[place]].item() for place in range(before, len(tokens)))


@pytest.mark.parametrize("rule", Normalization)
def test_scores_are_those_worked_out_by_hand(
    folder: Path, model: Any, questions: list[Question], rule: Normalization
) -> None:
    found = engine.scores(model, engine.OlmesTask("made_up", questions, rule))
    for question, score in zip(questions[:6], found, strict=False):
        values = [by_hand(folder, question.contexts[0], text) for text in question.continuations]
        if rule is Normalization.PER_CHARACTER:
            texts = question.continuations
            values = [value / len(text) for value, text in zip(values, texts, strict=True)]
        if rule is Normalization.UNCONDITIONAL:
            own = [by_hand(folder, UNCONDITIONAL_CONTEXT, text) for text in question.continuations]
            values = [value - other for value, other in zip(values, own, strict=True)]
        assert score == float(values.index(max(values)) == question.gold)


def test_log_likelihoods(folder: Path, model: Any, questions: list[Question]) -> None:
    task = engine.OlmesTask("made_up", questions[:4], Normalization.UNCONDITIONAL)
    asked = [
        request.args
        for place in range(4)
        for request in task.construct_requests({"place": place}, "", metadata=("", 0, 1))
    ]
    assert len(asked) == 4 * 6 and asked[3][0] == UNCONDITIONAL_CONTEXT
    instances = [
        request
        for place in range(4)
        for request in task.construct_requests({"place": place}, "", metadata=("", 0, 1))
    ]
    found = [value for value, _ in model.loglikelihood(instances)]
    wanted = [by_hand(folder, *pair) for pair in asked]
    assert found == pytest.approx(wanted, abs=2e-4)


def test_a_context_for_each_choice(folder: Path, model: Any) -> None:
    """WinoGrande's cloze: the sentence with each option, and the same rest."""
    question = Question("0", ("The cup of Ann", "The dog of Bob"), (" is red.",) * 2, 0)
    values = [by_hand(folder, context, " is red.") for context in question.contexts]
    task = engine.OlmesTask("made_up", [question], Normalization.NONE)
    assert engine.scores(model, task) == [float(values[0] > values[1])]


class Copier:
    """A model that finds the needle, or says something else."""

    def __init__(self, finds: bool) -> None:
        self.finds = finds

    def answer(self, prompt: str) -> str:
        """Return the number of the last key that is asked for."""
        key = prompt.rsplit(" for ", 1)[1].split(" mentioned", 1)[0]
        line = next(each for each in prompt.split("\n") if f"for {key} is: " in each)
        return f" {line.rsplit(' is: ', 1)[1]}" if self.finds else " 42"


@pytest.mark.parametrize("finds", [True, False])
def test_who_copies_the_needle_gets_everything_and_who_does_not_nothing(
    folder: Path, model: Any, monkeypatch: pytest.MonkeyPatch, finds: bool
) -> None:
    from megatron_skyladder.evaluation import ruler

    rows = ruler.prompts("niah_multikey_2", 1024, folder)[:5]
    copier = Copier(finds)
    monkeypatch.setattr(
        model,
        "generate_until",
        lambda requests, **_: [copier.answer(each.args[0]) for each in requests],
    )
    found = engine.scores(model, engine.GeneratedTask(GENERATIVE["niah_multikey_2"], rows))
    assert found == [float(finds)] * 5


def test_generated_texts_of_a_real_model(folder: Path, model: Any) -> None:
    rows = [Prompt("0", "Document [1](Title: a) b\n\nQuestion: c\nAnswer:", ("qqqqqqq",))]
    assert engine.scores(model, engine.GeneratedTask(GENERATIVE["mdqa"], rows)) == [0.0]


@pytest.fixture
def data(tmp_path: Path, questions: list[Question]) -> DataFolder:
    made = DataFolder(tmp_path / "data")
    for task in ("arc_easy", "piqa"):
        for formulation in ("cf", "mcf"):
            made.write(f"standard/{task}.{formulation}.jsonl", task, questions, "made up")
    return made


def test_an_evaluation_goes_on_where_it_was(
    tmp_path: Path, folder: Path, data: DataFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[str] = []
    settings = replace(CPU, tasks=("arc_easy",))
    out = tmp_path / "out"
    first = run.evaluate("random", folder, out, data, settings, lines.append)
    assert [each.task for each in first] == ["arc_easy"] and "(done before)" not in lines[0]
    both = replace(CPU, tasks=("arc_easy", "piqa"))
    again = run.evaluate("random", folder, out, data, both, lines.append)
    assert [each.task for each in again] == ["arc_easy", "piqa"]
    assert again[0] == first[0] and "(done before)" in lines[1] and "left" not in lines[2]
    # other data under the same name is asked anew
    rows = data.questions("standard/arc_easy.cf.jsonl")[:6]
    for formulation in ("cf", "mcf"):
        data.write(f"standard/arc_easy.{formulation}.jsonl", "arc_easy", rows, "made up")
    last = run.evaluate("random", folder, out, data, settings, lines.append)
    assert len(last[0].ids) == 6 and "(done before)" not in lines[3]


def test_another_length_of_input_is_asked_anew(
    tmp_path: Path, folder: Path, data: DataFolder
) -> None:
    """Prompts of 1,000 tokens and more, cut on the left to 300 or 600."""
    text = "\n\n".join(f"Document [{i}](Title: {i}) of {i}" for i in range(30))
    rows = [Prompt(f"0/{i}", f"{text}\n\nQuestion: {i}\nAnswer:", ("x",), "0") for i in range(2)]
    data.write("long/mdqa.jsonl", "mdqa", rows, "made up")
    lines: list[str] = []
    for length in (300, 600, 300):
        settings = replace(CPU, tasks=("mdqa",), length=length)
        found = run.evaluate("random", folder, tmp_path / "out", data, settings, lines.append)
    assert ["(done before)" in line for line in lines] == [False, False, True]
    assert [each.length for each in found] == [300, 600]
    assert ["at 300:" in line for line in lines] == [True, False, True]


def test_another_model_under_the_same_name_is_asked_anew(
    tmp_path: Path, folder: Path, data: DataFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what the first one answered elsewhere is not taken for the other's."""
    lines: list[str] = []
    settings, out = replace(CPU, tasks=("arc_easy",)), tmp_path / "out"
    run.evaluate("m", folder, out, data, replace(CPU, tasks=("piqa",)), [].append)
    run.evaluate("m", folder, out, data, settings, lines.append)
    other = tmp_path / "other"
    write_model(other, replace(LLAMA, vocab_size=300, max_positions=2048))
    make_hf_folder(other)
    weights = load_file(other / "model.safetensors")
    save_file({k: v * 2 for k, v in weights.items()}, other / "model.safetensors")
    run.evaluate("m", other, out, data, settings, lines.append)
    found = run.evaluate("m", other, out, data, settings, lines.append)
    assert ["(done before)" in line for line in lines] == [False, False, True]
    assert [each.task for each in found] == ["arc_easy"]
    assert main(["evaluate", "--table", str(out)]) == 1
    error = capsys.readouterr().err
    assert "results of 2 models: arc_easy.sampled.json; piqa.sampled.json. Move" in error
    (out / "results/piqa.sampled.json").write_text('{"model": "m"}')
    assert main(["evaluate", "--table", str(out)]) == 1
    assert "piqa.sampled.json is no result of this version" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tokenizer.model", "pytorch_model.bin", "config.json"])
def test_every_file_that_matters_tells_a_model_from_another(tmp_path: Path, name: str) -> None:
    (tmp_path / "README.md").write_text("of today")
    (tmp_path / name).write_text("one")
    before = run.identity_of(tmp_path)
    (tmp_path / "README.md").write_text("of tomorrow")
    assert run.identity_of(tmp_path) == before
    (tmp_path / name).write_text("two")
    assert run.identity_of(tmp_path) != before


def test_what_is_left_out_is_said_and_what_is_missing_refused_before_anything_is_run(
    folder: Path, data: DataFolder
) -> None:
    lines: list[str] = []
    found = run.jobs(data, replace(CPU, tasks=("arc_easy", "long")), "00000000", lines.append)
    assert [job.task for job in found] == ["arc_easy"]
    assert [line.split(":")[0] for line in lines] == [
        "RULER MK-2",
        "RULER MK-3",
        "RULER MV",
        "MDQA, 30 documents",
    ]
    with pytest.raises(UsageError, match=r"has no standard/arc_challenge"):
        run.jobs(data, replace(CPU, tasks=("standard",)), "00000000", lines.append)


def test_the_command(
    tmp_path: Path, folder: Path, data: DataFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    write_model(other, replace(LLAMA, vocab_size=300, max_positions=2048, init_std=0.5))
    make_hf_folder(other)
    command = ["evaluate", str(folder), str(other), "--data", str(data.path), "--device", "cpu"]
    command += ["--out", str(tmp_path / "out"), "--tasks", "arc_easy,piqa", "--batch-size", "4"]
    assert main([*command, "--paper", "1b-8k-cc-intradoc"]) == 0
    printed = capsys.readouterr().out
    assert "random: 1/2 ARC-E: " in printed and "other: 2/2 PIQA: " in printed
    assert "mean of 2 of 9" in printed and "McNemar's p" in printed and "61.8" in printed
    content = json.loads((tmp_path / "out/results.json").read_text())
    assert content["models"] == ["random", "other"] and len(content["rows"]) == 3
    assert (tmp_path / "out/results.svg").read_text().startswith("<?xml")
    folders = [str(tmp_path / "out" / name) for name in ("random", "other")]
    assert main(["evaluate", "--table", *folders]) == 0
    assert "mean of 2 of 9" in capsys.readouterr().out


def test_what_is_wrong_is_said_in_one_line(
    tmp_path: Path, folder: Path, data: DataFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    here = ["--data", str(data.path), "--out", str(tmp_path / "out"), "--device", "cpu"]
    for words, message in (
        ([str(folder)], "--data is needed"),
        ([*here], "no MODEL is given"),
        ([str(folder)] * 3 + here, "a table compares two at most"),
        ([str(folder), str(folder), *here], "a model is given twice"),
        ([str(tmp_path / "none"), *here], "is no folder"),
        ([str(folder), *here, "--tasks", "hellaswag"], "has no standard/hellaswag.cf.jsonl"),
        ([str(folder), *here, "--tasks", "helaswag"], "--tasks helaswag is unknown"),
        ([str(folder), *here, "--limit", "0"], "at least 1 question"),
        ([str(folder), *here, "--device", "cuda"], "torch sees no CUDA device"),
        (["--table", str(tmp_path)], "has no results"),
    ):
        assert main(["evaluate", *words]) == 1, words
        assert message in capsys.readouterr().err
