"""``skyladder export-hf`` and ``import-hf`` as they are typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from random_models import LLAMA, assert_same_model, write_model

from megatron_skyladder import hugging_face
from megatron_skyladder.cli import main


def test_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, checkpoint, back = (tmp_path / name for name in ("hf", "megatron", "back"))
    write_model(source, LLAMA)
    assert main(["import-hf", str(source), str(checkpoint), "--seq-length", "256"]) == 0
    printed = capsys.readouterr()
    flags = printed.out.splitlines()
    assert f"--load {checkpoint}" in flags
    assert "--seq-length 256" in flags
    assert "--skyladder-preset extend-context" in flags
    assert "note: rotary base 10,000 for 64 positions becomes 63,496 for 256" in printed.err
    command = [
        "export-hf",
        str(checkpoint),
        str(back),
        "--without-tokenizer",
        "--vocab-size",
        "330",
    ]
    assert main(command) == 0
    assert capsys.readouterr().out == f"{back}: Llama, iteration 0, 330 tokens, float32\n"
    assert_same_model(back, source)
    assert main(command) == 0
    assert "(made by an earlier run)" in capsys.readouterr().out


def test_what_is_wrong_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export-hf", str(tmp_path), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("skyladder export-hf: ")
    assert "has no checkpoints (iter_*)" in error
    source = write_model(tmp_path / "hf", LLAMA)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    assert main(["import-hf", str(source), str(tmp_path / "out")]) == 1
    assert "skyladder import-hf: config.json" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["export-hf", "import-hf"])
def test_missing_packages_are_named(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    monkeypatch.setattr(hugging_face, "NEEDED", ("no_such_package",))
    assert main([command, str(tmp_path), str(tmp_path / "out")]) == 1
    assert "this needs no_such_package: pip install no_such_package" in capsys.readouterr().err
