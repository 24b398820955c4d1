"""From logs to curves, figures, tables and the page."""

import json
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from report_logs import BATCH, GPUS, SEQ_LENGTH, STEPS, write_log

from megatron_skyladder.cli import main
from megatron_skyladder.ladder.schedules import WindowSchedule
from megatron_skyladder.report.curves import Run, axes_of, load_runs
from megatron_skyladder.report.drawing import smoothed
from megatron_skyladder.report.pictures import PICTURES, Picture
from megatron_skyladder.report.runlog import parse
from megatron_skyladder.report.stability import Stability, loss_ratios, stability
from megatron_skyladder.report.tables import differing_settings, summary

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    folder = tmp_path_factory.mktemp("runs")
    interval = 2500
    constant, ladder = folder / "constant" / "train.log", folder / "ladder" / "train.log"
    write_log(constant, WindowSchedule(schedule="constant"), interval=interval)
    write_log(ladder, WindowSchedule(alpha="1/8"), advantage=0.03, interval=interval)
    return load_runs([str(constant), str(ladder.parent)])


def test_names_come_from_the_command_line_the_folder_or_the_file(tmp_path: Path) -> None:
    write_log(tmp_path / "a" / "train.log", WindowSchedule(schedule="constant"), interval=50_000)
    write_log(tmp_path / "a" / "b.log", WindowSchedule(schedule="constant"), interval=50_000)
    folder = str(tmp_path / "a")
    given = [folder, f"{folder}/b.log", f"long name={folder}/train.log"]
    assert [run.name for run in load_runs(given)] == ["a", "b", "long name"]
    assert load_runs([f"{folder}/train.log"])[0].name == "a"


def test_two_runs_of_one_name_are_refused(tmp_path: Path) -> None:
    for place in ("x", "y"):
        schedule = WindowSchedule(schedule="constant")
        write_log(tmp_path / place / "run" / "train.log", schedule, interval=50_000)
    with pytest.raises(ValueError, match=r"two runs are called 'run'. Name them: .* first="):
        load_runs([str(tmp_path / "x" / "run"), str(tmp_path / "y" / "run")])


def test_tokens_time_and_compute(runs: list[Run]) -> None:
    constant, ladder = runs
    assert constant.tokens[-1] == STEPS * BATCH * SEQ_LENGTH
    assert constant.seconds[-1] == pytest.approx(STEPS * 7.3, rel=0.01)
    # the imagined rate is work / time, so their product is the work again
    assert constant.flops is not None
    assert constant.flops[-1] == pytest.approx(STEPS * (5.2 + 1.6) * 130e12 * GPUS, rel=0.01)
    assert ladder.flops is not None
    assert ladder.flops[-1] < constant.flops[-1]


def test_compute_is_left_out_where_a_run_has_no_rate(runs: list[Run]) -> None:
    text = re.sub(r" skyladder/tflops_per_gpu: \S+ \|", "", _text_of(runs[0]))
    without = Run("without", parse(text))
    assert without.flops is None
    assert set(axes_of([runs[1], without])) == {"tokens", "time"}
    assert set(axes_of(runs)) == {"tokens", "time", "flops"}


def test_units_fit_the_longest_run(runs: list[Run]) -> None:
    axes = axes_of(runs)
    assert axes["tokens"][0].label == "training tokens (billions)"
    assert axes["tokens"][0].values[-1] == pytest.approx(104.8576)
    assert axes["time"][0].label == "training time (days)"
    assert axes["flops"][0].label == "compute spent (1e18 FLOPs)"


def test_samples_stand_in_for_tokens_where_the_row_length_is_unknown(runs: list[Run]) -> None:
    text = re.sub(r".*seq_length \.+.*\n", "", _text_of(runs[0]))
    run = Run("short", parse(text))
    assert run.tokens[-1] == STEPS * BATCH
    assert axes_of([run])["tokens"][0].label.startswith("training samples")


def test_validation_lies_where_its_iteration_does(runs: list[Run]) -> None:
    run = runs[0]
    records = run.validations()
    assert len(records) == 4
    assert run.at(run.tokens, records)[-1] == run.tokens[-1]


# --- stability ----------------------------------------------------------------------------------


def test_the_papers_figures_by_hand() -> None:
    losses = np.array([4.0, 2.0] * 6)  # twelve losses: three windows of ten, each of spread 1
    norms = np.array([0.5, 3.0] * 6)
    found = stability(losses, norms)
    assert found.volatility == pytest.approx(1.0)
    assert found.smoothness == pytest.approx(2.0)
    # lowest before: 4, then 2: 2/4, then ten times 4/2 or 2/2 in turn
    assert found.mean_loss_ratio == pytest.approx((0.5 + 5 * 2 + 5 * 1) / 11)
    assert found.mean_grad_norm == pytest.approx((0.5 + 1.0) / 2)  # as clipped at 1


def test_records_without_a_loss_are_left_out() -> None:
    losses = np.array([4.0, np.nan, 2.0] * 6)
    assert stability(losses, losses) == stability(np.array([4.0, 2.0] * 6), np.ones(1))


def test_loss_ratios_by_hand() -> None:
    # lowest before:                    4    4    2    2
    np.testing.assert_allclose(
        loss_ratios(np.array([4.0, 5.0, 2.0, 3.0, 2.0])), [1.25, 0.5, 1.5, 1]
    )


def test_too_short_a_run_has_no_stability() -> None:
    found = stability(np.array([3.0]), np.array([np.nan]))
    assert np.isnan([found.volatility, found.smoothness, found.mean_grad_norm]).all()


# --- tables and pictures ------------------------------------------------------------------------


def test_summary_compares_with_the_first_run(runs: list[Run]) -> None:
    rows = {row.label: row.cells for row in summary(runs)}
    assert rows["Training tokens"] == ["104.9 billion", "104.9 billion"]
    assert rows["Started"] == ["once", "once"]
    assert rows["Time against constant"][0] == ""
    assert -12 < float(rows["Time against constant"][1].removesuffix(" %")) < -8
    # 0.03 nats lower at the end: the baseline's last loss is passed well before
    assert -25 < float(rows["Same loss: tokens"][1].removesuffix(" %")) < -5
    assert "Test loss" not in rows


def test_no_saving_is_claimed_where_the_loss_is_not_reached(runs: list[Run]) -> None:
    rows = {row.label: row.cells for row in summary([runs[1], runs[0]])}
    assert "Same loss: tokens" not in rows


def test_settings_that_differ_leave_out_places(runs: list[Run]) -> None:
    rows = {row.label: row.cells for row in differing_settings(runs)}
    assert rows == {"skyladder_schedule": ["constant", "linear"]}


def test_smoothing_keeps_length_ends_and_gaps() -> None:
    values = np.arange(400.0)
    np.testing.assert_allclose(smoothed(values), values)
    values[7] = np.nan
    assert np.isfinite(smoothed(values)[7])


@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: picture.name)
def test_pictures_of_a_bare_log_are_left_out_or_drawn(picture: Picture) -> None:
    line = (
        " iteration {0:8d}/ 40 | consumed samples: {0} | elapsed time per iteration (ms): 100.0 |"
        " lm loss: 5.0E+00 | loss scale: 1.0 |"
    )
    run = Run("bare", parse("\n".join(line.format(step) for step in (1, 2, 3))))
    figure = picture.draw([run])
    assert (figure is not None) == (picture.name in ("training-loss", "throughput"))


def test_the_command_writes_one_page_that_needs_no_other_file(
    runs: list[Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = [str(run.log.path) for run in runs]
    assert main(["report", *logs[:1], f"<b>={logs[1]}", "--output", str(tmp_path / "out")]) == 0
    assert "report.html (8 pictures beside it)" in capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 8
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"report.html", *(f"{picture.name}.png" for picture in PICTURES)}


def test_figures_for_other_programs(
    runs: list[Run], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # nothing is drawn
    assert main(["report", "--json", *(str(run.log.path) for run in runs)]) == 0
    constant, ladder = json.loads(capsys.readouterr().out)
    assert (constant["name"], ladder["name"]) == ("constant", "ladder")
    assert constant["tokens"] == ladder["tokens"] == STEPS * BATCH * SEQ_LENGTH
    assert ladder["flops"] < constant["flops"]
    last = ladder["validations"][-1]
    assert last["loss"] < constant["validations"][-1]["loss"]
    assert last["by_length"][str(SEQ_LENGTH)] == pytest.approx(last["loss"], abs=0.01)
    assert constant["stability"].keys() == {field.name for field in fields(Stability)}


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 1
    assert "skyladder report: no training line of Megatron" in capsys.readouterr().err


def test_matplotlib_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["report", "x"]) == 1
    assert "pip install megatron-skyladder[plot]" in capsys.readouterr().err


def _text_of(run: Run) -> str:
    path = run.log.path
    return (path if path.is_file() else path / "train.log").read_text()
