"""The section of the report with what ``skyladder evaluate`` found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_logs import write_log

from megatron_skyladder.cli import main
from megatron_skyladder.ladder.schedules import WindowSchedule

RESULTS = {  # the part of results.json that the report reads; tests/evaluation writes a real one
    "note": "Errors are over questions.",
    "cells": [
        ["task", "constant", "<ladder>", "difference"],
        ["ARC-E", "61.8 ± 1.5", "64.8 ± 1.4", "+3.0 ± 1.2"],
        ["mean of 9", "47.4 ± 0.5", "49.3 ± 0.5", ""],
    ],
}


def test_the_table_and_its_picture_are_in_the_page(tmp_path: Path) -> None:
    pytest.importorskip("bokeh")
    write_log(tmp_path / "train.log", WindowSchedule(schedule="constant"), interval=50_000)
    scores = tmp_path / "scores"
    scores.mkdir()
    (scores / "results.json").write_text(json.dumps(RESULTS))
    (scores / "results.svg").write_text("<svg/>")
    command = ["report", str(tmp_path / "train.log"), "--output", str(tmp_path / "out")]
    assert main([*command, "--evaluation", str(scores)]) == 0
    page = (tmp_path / "out/report.html").read_text()
    assert "<h2>Benchmarks</h2>" in page and "Errors are over questions." in page
    assert "<th>&lt;ladder&gt;</th><th>difference</th>" in page
    assert "<td>ARC-E</td><td>61.8 ± 1.5</td><td>64.8 ± 1.4</td><td>+3.0 ± 1.2</td>" in page
    assert "<td>49.3 ± 0.5</td><td></td>" in page
    assert "data:image/svg+xml;base64,PHN2Zy8+" in page


def test_a_folder_without_results_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("bokeh")
    write_log(tmp_path / "train.log", WindowSchedule(schedule="constant"), interval=50_000)
    command = ["report", str(tmp_path / "train.log"), "--output", str(tmp_path / "out")]
    assert main([*command, "--evaluation", str(tmp_path)]) == 1
    assert "Give the folder that skyladder evaluate --out names." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
