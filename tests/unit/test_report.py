"""From logs to curves, figures, tables and the page."""

import json
import math
import re
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from report_logs import BATCH, GPUS, SEQ_LENGTH, STEPS, write_log

from megatron_skyladder.cli import main
from megatron_skyladder.ladder.schedules import WindowSchedule
from megatron_skyladder.planning.calibration import calibrate
from megatron_skyladder.report.by_length import loss_by_length, loss_by_length_over_training
from megatron_skyladder.report.curves import Run, axes_of, load_runs
from megatron_skyladder.report.groups import Group, group_runs
from megatron_skyladder.report.page import write_report
from megatron_skyladder.report.panels import smoothed, spread, thinned
from megatron_skyladder.report.pictures import PICTURES, Picture, throughput
from megatron_skyladder.report.runlog import parse, read_run
from megatron_skyladder.report.sentences import sentences
from megatron_skyladder.report.stability import Stability, loss_ratios, stability
from megatron_skyladder.report.tables import (
    differing_settings,
    schedule_settings,
    summary,
    to_json,
)

for package in ("bokeh", "jinja2"):
    pytest.importorskip(package)


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


def test_compute_is_unknown_where_the_printed_rate_is_rounded_to_nothing(runs: list[Run]) -> None:
    """Stock Megatron prints one decimal of a TFLOP/s: 0.0 for a model of toy size."""
    stock = " throughput per GPU (TFLOP/s/GPU): {} |"
    text = re.sub(r" skyladder/tflops_per_gpu: \S+ \|", stock.format("0.0"), _text_of(runs[0]))
    run = Run("small", parse(text))
    assert run.flops is None and to_json([run])[0]["flops"] is None
    assert "Compute" not in {row.label for row in summary([run])}
    assert set(axes_of([runs[1], run])) == {"tokens", "time"}
    # one line of a large model, whose iterations hung: these did nothing
    line = text.replace(stock.format("0.0"), stock.format("90.0"))
    hung = Run("hung", parse(line.replace(stock.format("90.0"), stock.format("0.0"), 1)))
    assert hung.flops is not None and hung.flops[0] == 0 and hung.flops[-1] > 0


def resized(runs: list[Run]) -> Run:
    """Return a run whose second half went on with a quarter of the GPUs."""
    text = _text_of(runs[0])
    head, first = text.split(" [2026", 1)[0], text.index("iteration    52500/")
    start = text.rindex(" [2026", 0, first)
    fewer = head.replace(f"world size: {GPUS}", f"world size: {GPUS // 4}")
    return Run("resized", parse(text[:start] + fewer + text[start:]))


def test_each_attempts_own_gpus_count(runs: list[Run]) -> None:
    run, same = resized(runs), runs[0]
    assert run.flops is not None and same.flops is not None
    # half of the run's work, and a quarter of the other half's
    assert run.flops[-1] == pytest.approx(same.flops[-1] * 5 / 8, rel=0.03)
    assert [row.cells for row in summary([run]) if row.label == "GPUs"] == [["8, then 2"]]
    (rate, *_) = throughput([Group("resized", (run,))])
    _, tokens = rate.lines[0].logged or rate.lines[0].curve
    assert rate.y_label == "tokens per second and GPU"
    assert tokens[-1] == pytest.approx(4 * tokens[5], rel=0.05)
    unknown = Run("unknown", parse(_text_of(runs[0]).split("\n", 1)[1]))
    assert unknown.flops is None
    (rate, *_) = throughput([Group("unknown", (unknown,))])
    assert rate.y_label == "tokens per second"


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
    panels = picture.draw(group_runs([run]))
    assert bool(panels) == (picture.name in ("training-loss", "throughput"))


def test_the_command_writes_one_page_that_needs_no_other_file(
    runs: list[Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = [str(run.log.path) for run in runs]
    assert main(["report", *logs[:1], f"<b>={logs[1]}", "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.endswith("report.html\n")
    page = (tmp_path / "out" / "report.html").read_text()
    assert len(page) < 2e6
    body = page.partition("<body>")[2]
    assert [f'id="{picture.name}"' in body for picture in PICTURES] == [True] * 8
    assert not re.findall(r'<(?:script|img|iframe)[^>]*src=|href="(?!#)', body)
    assert "&lt;b&gt;" in body
    assert "<b>&" in body and "<b><b>" not in body  # a name is text
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]


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


# --- runs that diverged -------------------------------------------------------------------------

FIGURE = re.compile(r"(?<=: )[-+.\dE]+(?= \|)|(?<=value: )[-+.\dE]+")


def damaged(text: str, value: str, share: float, name: str = "") -> str:
    """Put a value in place of figures of the lines after this share of the log."""
    lines = text.splitlines()
    first = int(share * len(lines))
    wanted = re.compile(rf"(?<={name}: )[-+.\dE]+(?= \|)") if name else FIGURE
    keep = re.compile(r"consumed samples: +\d+ \|")
    for place, entry in enumerate(lines[first:], start=first):
        samples = keep.search(entry)
        changed = wanted.sub(value, entry)
        lines[place] = keep.sub(samples[0], changed) if samples else changed
    return "\n".join(lines)


DIVERGED = {
    "loss nan from the middle": ("nan", 0.5, "lm loss"),
    "gradient inf all along": ("inf", 0.0, "grad norm"),
    "everything inf from the start": ("inf", 0.0, ""),
    "everything nan at the end": ("nan", 0.97, ""),
    "everything -inf from the middle": ("-inf", 0.5, ""),
    "loss above any frame": ("1.0E+12", 0.5, "lm loss"),
    "loss 0": ("0.0", 0.5, "lm loss"),
}


@pytest.fixture(scope="module")
def diverged(runs: list[Run]) -> list[Run]:
    return [Run(name, parse(damaged(_text_of(runs[1]), *how))) for name, how in DIVERGED.items()]


def refuse(constant: str) -> float:
    raise AssertionError(f"{constant} is not JSON")


@pytest.mark.filterwarnings("error")
def test_diverged_runs_do_not_break_the_report_for_the_others(
    runs: list[Run], diverged: list[Run], tmp_path: Path
) -> None:
    text = write_report([runs[0], *diverged], tmp_path).read_text()
    assert "Losses not finite" in text and "log lines, from iteration" in text
    figures = json.loads(json.dumps(to_json([runs[0], *diverged]), allow_nan=False))
    assert [run["losses_not_finite"] > 0 for run in figures] == [
        *(False, True, False, True, True, True, False, False),
    ]
    assert figures[0] == to_json([runs[0]])[0]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", [name for name in DIVERGED if name.startswith("everything")])
def test_a_diverged_run_alone_and_as_what_others_are_compared_with(
    runs: list[Run], diverged: list[Run], name: str
) -> None:
    (run,) = (run for run in diverged if run.name == name)
    for compared in ([run], [run, runs[0]]):
        for row in summary(compared):
            assert "loss" in row.label or not re.search("nan|inf", "".join(row.cells)), row
        for picture in PICTURES:
            for panel in picture.draw(group_runs(compared)):
                assert np.isfinite([end for end in panel.y_range if end is not None]).all()


def test_a_run_that_diverged_leaves_the_frame_to_the_others(
    runs: list[Run], diverged: list[Run]
) -> None:
    pictures = {picture.name: picture for picture in PICTURES}
    added = [run for run in diverged if run.has_diverged]
    assert axes_of([*runs, *added[:1], *added[2:]]).keys() == axes_of(runs).keys()
    assert {run.name for run in added} == DIVERGED.keys() - {"loss 0", "gradient inf all along"}
    for name in ("training-loss", "validation-loss", "stability"):
        alone, together = (
            pictures[name].draw(group_runs(shown)) for shown in (runs, [*runs, *added])
        )
        # the run without a single rate leaves no axis of compute to share
        for one, other in zip(alone, together, strict=name == "stability"):
            values = np.concatenate([line.curve[1] for line in one.lines])
            if one.y_range == (None, None):  # what bokeh frames is all of the data
                expected = [np.nanmin(values), np.nanmax(values)]
                np.testing.assert_allclose(other.y_range, expected, rtol=0.2)
            else:
                np.testing.assert_allclose(one.y_range, other.y_range, rtol=0.2)


def test_the_skipped_iterations_of_an_fp16_run_are_no_divergence(runs: list[Run]) -> None:
    """Megatron prints 0 for the mean of no losses."""
    text = _text_of(runs[1])
    for iteration in (1, 2500, 50_000):
        pattern = rf"(iteration +{iteration}/.*lm loss: )\S+(.*skipped iterations:) +0"
        text, found = re.subn(pattern, r"\g<1>0.000000E+00\g<2> 2500", text)
        assert found == 1
    run = Run("fp16", parse(text))
    assert not run.has_diverged and not run.lines_without_loss
    assert np.isnan(run.losses).sum() == 3 and np.nanmin(run.losses) > 1


def test_what_a_diverged_run_comes_to(runs: list[Run], diverged: list[Run]) -> None:
    text = damaged(_text_of(runs[1]), *DIVERGED[diverged[0].name])
    left_out = Run("as Megatron prints it", parse(text.replace(" lm loss: nan |", "")))
    for run in (diverged[0], left_out):
        rows = {row.label: row.cells for row in summary([run])}
        assert rows["Final training loss"] == ["nan"]
        assert rows["Losses not finite"][0].startswith("29 log lines, from iteration 30,000")


def test_a_damaged_log_still_calibrates(runs: list[Run], tmp_path: Path) -> None:
    whole = tmp_path / "whole.log"
    whole.write_text(_text_of(runs[1]))
    lines = whole.read_text().splitlines()
    lines[30] = damaged(lines[30], "nan", 0.0)
    lines[40] = damaged(lines[40], "inf", 0.0)
    (tmp_path / "damaged.log").write_text("\n".join(lines))
    expected = calibrate(read_run(whole))
    found = calibrate(read_run(tmp_path / "damaged.log"))
    assert found.step_time.fixed == pytest.approx(expected.step_time.fixed, rel=0.01)


def test_strict_json_on_the_command_line(
    diverged: list[Run], tmp_path: Path, runs: list[Run], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.log").write_text(damaged(_text_of(runs[1]), "inf", 0.5))
    assert main(["report", "--json", str(tmp_path / "run.log")]) == 0
    (run,) = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert run["validations"][-1]["loss"] is None and run["training_loss"] is None
    assert run["first_loss_not_finite"] == 30_000


def test_lengths_that_only_one_run_was_validated_at(runs: list[Run]) -> None:
    text = re.sub(r"skyladder/loss_at_512 ", "skyladder/loss_at_256 ", _text_of(runs[1]))
    other = Run("other", parse(text))
    for picture in PICTURES:
        assert picture.draw(group_runs([runs[0], other]))


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 1
    assert "skyladder report: no training line of Megatron" in capsys.readouterr().err


def test_what_draws_the_page_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["report", "x"]) == 1
    message = capsys.readouterr().err
    assert "needs bokeh and jinja2" in message
    assert "pip install 'megatron-skyladder[plot]'" in message


# --- seeds and the opening ----------------------------------------------------------------------


def with_settings(run: Run, name: str, *, shift: float = 0.0, **settings: str) -> Run:
    """Return a run with other arguments, and losses that are shifted."""
    text = _text_of(run)
    given = "".join(f"  {key} ..... {value}\n" for key, value in settings.items())
    text = text.replace("  bf16 ...", f"{given}  bf16 ...")

    def shifted(match: re.Match[str]) -> str:
        return f"{match[1]}{float(match[2]) + shift:.6E}"

    return Run(name, parse(re.sub(r"(lm loss(?: value)?: )([-+.\dE]+)", shifted, text)))


def test_seeds_of_one_configuration_are_a_group(runs: list[Run]) -> None:
    seeds = [with_settings(runs[1], f"ladder-seed{n}", seed=str(n), save=f"/{n}") for n in "12"]
    other = with_settings(runs[1], "other", seed="3", lr="1")
    groups = group_runs([runs[0], seeds[0], other, seeds[1]])
    assert [(group.name, len(group.runs)) for group in groups] == [
        ("constant", 1),
        ("ladder (2 seeds)", 2),
        ("other", 1),
    ]


def test_what_is_no_group(runs: list[Run]) -> None:
    """Equal seeds compare something that the arguments do not say; no seed says nothing."""
    for settings in ({"seed": "1"}, {}):
        same = [with_settings(runs[1], name, **settings) for name in ("before", "after")]
        assert [group.name for group in group_runs(same)] == ["before", "after"]
    constant = with_settings(runs[0], "a", seed="1")
    assert len(group_runs([constant, with_settings(runs[1], "b", seed="2")])) == 2


def test_a_band_by_hand() -> None:
    """The second curve lies at other places and is shorter; a gap in it is bridged."""
    first = np.array([0.0, 1, 2, 3]), np.array([1.0, 2, 3, 4])
    second = np.array([0.5, 1.5, 2.5]), np.array([0.0, np.nan, 4])
    (x, mean), (low, high) = spread([first, second])
    np.testing.assert_allclose(x, [1, 2])
    np.testing.assert_allclose(low, [1, 3])  # the second: 0 at 0.5, 4 at 2.5, so 1 and 3
    np.testing.assert_allclose(high, [2, 3])
    np.testing.assert_allclose(mean, [1.5, 3])


def test_thinning_keeps_ends_and_spikes() -> None:
    y = np.zeros(10_000)
    y[4321] = 7
    x, thin = thinned((np.arange(10_000.0), y), 100)
    assert len(x) <= 102 and x[0] == 0 and x[-1] == 9999
    assert thin[x == 4321] == 7 and (np.diff(x) > 0).all()


def said(runs: list[Run]) -> dict[str, str]:
    found = sentences(group_runs(runs), [picture.name for picture in PICTURES])
    return {sentence.name: sentence.text for sentence in found}


def test_the_opening_says_what_a_run_saved_and_whether_it_is_better(runs: list[Run]) -> None:
    texts = said(runs)
    assert texts["constant"].startswith("is what the others are compared with: it took 8.4 days")
    assert re.match(r"saved 9\.9 % of the time of constant \(20\.\d h\)", texts["ladder"])
    assert "is better by 0.0300 in validation loss; it had the loss that" in texts["ladder"]
    worse = said([runs[1], runs[0]])["constant"]
    assert "took 11." in worse and "is worse by 0.0300" in worse
    same = said([runs[0], with_settings(runs[1], "same", shift=0.031)])["same"]
    assert "is as good (+0.0010; the paper counts less than 0.01 as noise)" in same


def test_the_opening_on_runs_that_cannot_be_compared_at_their_ends(runs: list[Run]) -> None:
    text = _text_of(runs[1])
    half = Run("half", parse(text[: text.index("iteration    52500/")]))
    found = said([runs[0], half])["half"]
    assert "is at iteration 50,000 of 100,000" in found
    assert "has seen 50.0 % less tokens than constant, with" in found
    assert "is better by 0.0150 in validation loss where both were validated last" in found
    without = Run("w", parse("\n".join(x for x in text.splitlines() if "validation" not in x)))
    assert "nothing says whether it is better" in said([runs[0], without])["w"]


CAUTION = "too, so the schedule alone does not tell why"
OTHERWISE = "so nothing says whether it is better"


def beside(runs: list[Run], first: dict[str, str], second: dict[str, str]) -> str:
    """Return what is said of the ladder beside the constant window, with arguments of their own."""
    constant = with_settings(runs[0], "constant", **first)
    return said([constant, with_settings(runs[1], "ladder", **second)])["ladder"]


@pytest.mark.parametrize(
    ("first", "second", "caution"),
    [
        ({}, {"lr": "0.001"}, f"differs in lr {CAUTION}"),
        ({}, {"lr": "4.0e-4", "skyladder_alpha": "1", "log_interval": "7"}, ""),
        ({}, {"num_layers": "4", "train_iters": "5"}, f"in num_layers and train_iters {CAUTION}"),
        (
            {},
            dict.fromkeys(("hidden_size", "lr", "min_lr", "num_layers", "train_iters"), "9"),
            f"differs in num_layers, hidden_size, train_iters, lr and 1 more {CAUTION}",
        ),
        ({"clip_grad": "1.0"}, {}, ""),  # one log lacks it
        ({"data_path": "['/a/v1.2_text']"}, {"data_path": "['/b/v1.2_text']"}, ""),
        (
            {"data_path": "['/a/text']", "valid_data_path": "['/a/held-out']"},
            {"data_path": "['/a/more']", "valid_data_path": "['/b/held-out']"},
            f"differs in data_path {CAUTION}",
        ),
        ({"train_data_path": "['/a/x']"}, {"train_data_path": "['/a/y']"}, "in train_data_path"),
        ({"eval_iters": "60"}, {"eval_iters": "600"}, f"differs in eval_iters {CAUTION}"),
        (
            {"tokenizer_model": "/a/llama/tokenizer.model", "data_args_path": "/a/web/blend.txt"},
            {"tokenizer_model": "/b/llama/tokenizer.model", "data_args_path": "/b/web/blend.txt"},
            "",
        ),
        ({"tokenizer_model": "hub/starcoder"}, {"tokenizer_model": "/b/starcoder/"}, ""),
    ],
)
def test_the_opening_names_what_else_differs(
    runs: list[Run], first: dict[str, str], second: dict[str, str], caution: str
) -> None:
    text = beside(runs, first, second)
    assert "is better by 0.0300 in validation loss; it had the loss" in text
    assert caution in text and bool(caution) == (CAUTION in text)


def test_the_opening_says_where_time_is_of_more_gpus(runs: list[Run]) -> None:
    more = Run("more", replace(runs[1].log, num_gpus=32))
    assert "h, on 32 GPUs where it had 8) and is better" in said([runs[0], more])["more"]
    assert "GPUs where" not in said(runs)["ladder"]


@pytest.mark.parametrize(
    ("first", "second", "named"),
    [
        ({}, {"seq_length": "4096"}, "seq_length"),
        ({"split": "99,1,0"}, {"split": "98,2,0"}, "split"),
        ({"data_path": "['/a/text']"}, {"data_path": "['/a/other']"}, "data_path"),
        ({"valid_data_path": "None"}, {"valid_data_path": "['/a/text']"}, "valid_data_path"),
        ({"tokenizer_type": "A"}, {"tokenizer_type": "B"}, "tokenizer_type"),
        (
            {"tokenizer_model": "/tok/one/tokenizer.model"},
            {"tokenizer_model": "/tok/two/tokenizer.model"},
            "tokenizer_model",
        ),
        ({"tokenizer_model": "llama/"}, {"tokenizer_model": "starcoder/"}, "tokenizer_model"),
        ({"vocab_size": "512"}, {"vocab_size": "1024"}, "vocab_size"),
        (
            {"per_split_data_args_path": "/data/const.json"},
            {"per_split_data_args_path": "/data/other.json"},
            "per_split_data_args_path",
        ),
    ],
)
def test_losses_of_other_texts_are_not_compared(
    runs: list[Run], first: dict[str, str], second: dict[str, str], named: str
) -> None:
    text = beside(runs, first, second)
    assert f"validates otherwise ({named}), {OTHERWISE}" in text and "better by" not in text
    constant = with_settings(runs[0], "constant", **first)
    seeds = [with_settings(runs[1], f"s-{n}", seed=str(n), **second) for n in range(3)]
    assert "against constant" not in said([constant, *seeds])["s (3 seeds)"]
    labels = {row.label for row in summary([constant, seeds[0]])}
    assert "Time against constant" in labels and "Same loss: time" not in labels


@pytest.mark.parametrize(
    ("first", "second", "kept"),
    [({"split": "9,1,0"}, {"split": "8,2,0"}, False), ({}, {"seq_length": "4096"}, True)],
)
def test_differences_by_length_are_of_one_text(
    runs: list[Run], first: dict[str, str], second: dict[str, str], kept: bool
) -> None:
    pair = [
        with_settings(runs[0], "constant", **first),
        with_settings(runs[1], "ladder", **second),
    ]
    panels = loss_by_length(group_runs(pair))
    assert [line.name for line in panels[0].lines] == ["constant", "ladder"]
    over_training = loss_by_length_over_training(group_runs(pair))
    for panel in (*panels[2:], *over_training):
        assert [line.name for line in panel.lines][1:] == ["ladder"] * kept


def test_the_opening_on_seeds(runs: list[Run]) -> None:
    seeds = [
        with_settings(runs[1], f"s-{n}", seed=str(n), shift=shift)
        for n, shift in enumerate((-0.01, 0, 0.01))
    ]
    text = said([runs[0], *seeds])["s (3 seeds)"]
    assert "± 0.0100 (standard deviation of the seeds); -0.0300 against constant: better" in text
    wide = [
        with_settings(runs[1], f"s-{n}", seed=str(n), shift=shift)
        for n, shift in enumerate((-0.1, 0, 0.1))
    ]
    assert "no more than seeds or noise make" in said([runs[0], *wide])["s (3 seeds)"]


def until(run: Run, iteration: int) -> Run:
    """Return a run that has come to an iteration."""
    log = replace(
        run.log,
        iterations=[each for each in run.log.iterations if each.iteration <= iteration],
        validations=[each for each in run.log.validations if each.iteration <= iteration],
    )
    return Run(run.name, log)


def test_seeds_that_have_not_come_as_far(runs: list[Run]) -> None:
    """Losses after 50,000 iterations and after 100,000 are not averaged."""
    seeds = [with_settings(runs[1], f"s-{n}", seed=str(n), shift=-0.47) for n in (1, 2)]
    seeds[1] = until(seeds[1], 50_000)
    constant = runs[0].validations()
    half = constant[1].loss
    assert half is not None and constant[1].iteration == 50_000
    text = said([runs[0], *seeds])["s (2 seeds)"]
    at = "at 52.43 billion tokens"
    assert text == (  # a half of the advantage of 0.03, and the shift
        f"validation loss {half - 0.485:.4f} ± 0.0000 (standard deviation of the seeds) {at}, as "
        f"far as all have come; -0.4850 against constant {at}: better."
    )
    # as what others are compared with, too: the one that came as far has the time
    text = said([*seeds, runs[0]])["constant"]
    assert re.match(r"took 11\.\d % more time than s \(2 seeds\)", text)
    assert "is worse by 0.4850 in validation loss where both were validated last" in text
    without = [*seeds, with_settings(runs[1], "s-3", seed="3", shift=math.nan)]
    text = said([runs[0], *without])["s (3 seeds)"]
    assert text.endswith("better; 1 of 3 seeds left out: no finite validation loss to end with.")


def test_the_summary_says_which_runs_have_not_come_as_far(runs: list[Run]) -> None:
    half, whole = until(runs[1], 50_000), Run("whole", runs[1].log)
    rows = {row.label: row for row in summary([runs[0], half, whole])}
    for label in ("Time against constant", "Compute against constant"):
        assert rows[label].note == "ladder has seen 50.0 % less tokens than constant"
        assert float(rows[label].cells[1].removesuffix(" %")) < -50
    assert {row.note for row in summary(runs) if "against" in row.label} == {""}
    unknown = Run("unknown", parse(re.sub(r".*seq_length \.+.*\n", "", _text_of(runs[1]))))
    rows = {row.label: row for row in summary([runs[0], unknown])}
    assert rows["Time against constant"].note == ""  # it has samples, and no tokens


def test_losses_by_length_of_seeds_that_have_not_come_as_far(runs: list[Run]) -> None:
    seeds = [with_settings(runs[1], f"s-{n}", seed=str(n), shift=-0.47) for n in (1, 2)]
    whole = loss_by_length(group_runs([runs[0], *seeds]))
    seeds[1] = until(seeds[1], 50_000)
    own, _, difference, _ = loss_by_length(group_runs([runs[0], *seeds]))
    assert own.title == "Loss where all seeds have been, by context length"
    at_half = seeds[1].validations()[-1].by_length
    np.testing.assert_allclose(own.lines[1].curve[1], list(at_half.values()))
    assert (
        own.lines[1].band is not None and np.ptp(own.lines[1].band[0] - own.lines[1].band[1]) == 0
    )
    assert difference.title == "Difference to constant at equal tokens, by context length"
    # half of the advantages, and the shift of the plain loss alone
    np.testing.assert_allclose(difference.lines[1].curve[1], [-0.018, -0.018, -0.015], atol=1e-5)
    assert [panel.title for panel in whole[:1]] == ["Final loss by context length"]
    assert whole[2].title == "Difference to constant, by context length"
    np.testing.assert_allclose(whole[2].lines[1].curve[1], [-0.036, -0.036, -0.03], atol=1e-5)
    half = [runs[0], until(runs[1], 50_000)]  # also of runs alone
    np.testing.assert_allclose(
        loss_by_length(group_runs(half))[2].lines[1].curve[1], [-0.018, -0.018, -0.015], atol=1e-5
    )


def test_the_opening_on_diverged_runs(runs: list[Run], diverged: list[Run]) -> None:
    found = sentences([Group(run.name, (run,)) for run in (runs[0], diverged[0])], ["stability"])
    assert found[1].text.startswith("diverged: no finite loss at iteration 30,000")
    assert found[1].look_at == ("stability",)


def test_resolved_schedules_and_flags_are_shown(runs: list[Run]) -> None:
    rows = {row.label: row.cells for row in schedule_settings(runs)}
    assert rows["Schedule"][1].startswith("linear 32 -> 8192, alpha 1/8")
    assert rows["--skyladder-schedule"] == ["constant", "linear"]


def _text_of(run: Run) -> str:
    path = run.log.path
    return (path if path.is_file() else path / "train.log").read_text()
