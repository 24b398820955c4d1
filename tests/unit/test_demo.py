"""`skyladder demo` around its trainings: what a second call does with what the first has left."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from megatron_skyladder.cli import demo
from megatron_skyladder.demo import generation
from megatron_skyladder.demo.runs import Run
from megatron_skyladder.hugging_face.output import Staging, is_finished


@pytest.fixture
def around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The demo with trainings of no time, and exports that go by the checkpoint's times."""
    trained: list[str] = []

    def train(self: Run, *_: Any) -> None:
        trained.append(self.name)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        weights = self.checkpoints / "weights"
        weights.touch()
        os.utime(weights, ns=(len(trained), len(trained)))
        self._finished.touch()

    def export(checkpoints: Path, out: Path) -> Path:
        settings = {"made from": (checkpoints / "weights").stat().st_mtime_ns}
        if not is_finished(out, settings):
            with Staging(out, settings) as partial:
                (partial / "config.json").write_text("{}")
        return out

    monkeypatch.setattr(Run, "train", train)
    monkeypatch.setattr(generation, "export_run", export)
    monkeypatch.setattr(generation, "line_of", lambda folder: "a line")
    monkeypatch.setattr(demo, "_check_packages", lambda: None)
    monkeypatch.setattr(demo, "_prepare", lambda output: (output / "data", output / "tokenizer"))
    monkeypatch.setattr(demo, "_conclude", lambda output, runs: None)
    monkeypatch.setattr(demo, "GENERATING", ())
    return trained


def call(folder: Path, *, fresh: bool = False, train_iters: int = 160) -> int:
    given = {"output": str(folder), "train_iters": train_iters, "lr": 2e-3, "fresh": fresh}
    return demo.run(argparse.Namespace(**given))


def test_models_that_are_trained_anew_are_exported_anew(tmp_path: Path, around: list[str]) -> None:
    assert call(tmp_path) == 0 and call(tmp_path) == 0
    assert around == ["constant", "skyladder"]
    assert call(tmp_path, fresh=True) == 0 and call(tmp_path, train_iters=40) == 0
    assert len(around) == 6
    (tmp_path / "constant/finished").unlink()  # one of them to be done again
    assert call(tmp_path, train_iters=40) == 0
    assert around[6:] == ["constant"]
