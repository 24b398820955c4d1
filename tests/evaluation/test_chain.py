"""From text to the table: prepare, train on Megatron, export, evaluate; as it is typed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from prepare_inputs import make_hf_folder, make_texts, write_json_lines
from trained import BASE, GROUPS, PP2, TP2, UNTIED, Runs

from megatron_skyladder.cli import main
from megatron_skyladder.demo import generation
from megatron_skyladder.testing import ProcessPool, requires_megatron

pytestmark = requires_megatron

LENGTH = 4096
QUESTIONS = 100
TRAINER = str(Path(__file__).resolve().parents[1] / "hugging_face")  # trained_bodies


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with ProcessPool([Path(TRAINER)]) as pool:
        yield Runs(pool, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_folder(tmp_path_factory.mktemp("chain") / "tokenizer")


@pytest.fixture(scope="module")
def checkpoints(runs: Runs, tokenizer: Path) -> dict[str, Path]:
    """A constant window and a ladder, at TP2 x PP2, on prepared text."""
    folder = runs.folder
    text = write_json_lines(folder / "text.jsonl", make_texts(600))
    flags = f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {tokenizer}"
    command = ["prepare", "--input", str(text), "--output-prefix", str(folder / "data")]
    assert main([*command, *flags.split(), "--append-eod"]) == 0
    runs.__dict__["data"] = folder / "data_text_document"
    model = (
        f"{BASE} {GROUPS} {UNTIED} {TP2} {PP2} --sequence-parallel {flags} --seq-length {LENGTH} "
        f"--max-position-embeddings {LENGTH} --micro-batch-size 1 --global-batch-size 2"
    )
    made = {}
    for name, ladder in (
        ("constant", "--skyladder-schedule constant"),
        ("ladder", "--skyladder-start-window 32 --skyladder-expand-fraction 0.5"),
    ):
        made[name] = folder / name
        save = f"--save {made[name]} --save-interval 3 --ckpt-format torch_dist"
        runs.train(f"{model} {ladder} --skyladder-intra-document {save}", 4)
    return made


def test_from_text_to_the_table(
    checkpoints: dict[str, Path],
    tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, out = str(tmp_path / "data"), str(tmp_path / "scores")
    tasks = "arc_challenge,niah_multikey_2"
    words = ["--tasks", tasks, "--length", str(LENGTH)]
    assert main(["evaluate", "--prepare", data, "--tokenizer", str(tokenizer), *words]) == 0
    exported = []
    for name, checkpoint in checkpoints.items():
        folder = str(tmp_path / "exported" / name)
        assert main(["export-hf", str(checkpoint), folder]) == 0
        exported.append(folder)
    assert generation.line_of(Path(exported[1])).startswith(
        r"import os\n\ndef "
    )  # as the demo does
    command = ["evaluate", *exported, "--data", data, "--out", out, "--device", "cpu"]
    command += ["--batch-size", "8", *words, "--paper", "1b-8k-cc-intradoc"]
    assert main([*command, "--limit", str(QUESTIONS), "--tasks", "arc_challenge"]) == 0
    assert main([*command, "--limit", "2", "--tasks", "niah_multikey_2"]) == 0
    capsys.readouterr()
    assert main(["evaluate", "--table", f"{out}/constant", f"{out}/ladder"]) == 0
    both = capsys.readouterr().out
    assert "ARC-C" in both and "RULER MK-2 4,096" in both
    print(both)
    table = json.loads((tmp_path / "scores/results.json").read_text())
    assert [row["name"] for row in table["rows"]] == ["niah_multikey_2"]
    assert table["cells"][0][:3] == ["task", "constant", "ladder"]
    found = json.loads(
        (tmp_path / f"scores/ladder/results/arc_challenge.first{QUESTIONS}.json").read_text()
    )
    assert len(found["scores"]["cf"]) == len(found["scores"]["mcf"]) == QUESTIONS
    chance = sum(found["scores"]["cf"]) / QUESTIONS
    assert 0.08 < chance < 0.45  # a model of three steps: a quarter, and its error
