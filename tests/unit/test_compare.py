"""``skyladder compare``: rows, budgets, messages."""

from __future__ import annotations

import argparse
import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from test_plan import LAUNCH, write_log

from megatron_skyladder.cli import main
from megatron_skyladder.data.indexed import IndexedReader, IndexedWriter
from megatron_skyladder.planning import (
    budget,
    estimate,
    parallel,
    plots,
    run_flags,
    visible_context,
)
from megatron_skyladder.planning.evidence import MEASURED
from megatron_skyladder.report import images, runlog

BASE = "--preset 1b-8k"
TIMED = f"{BASE} --tflops 100 --gpus 8"
PARALLEL = (
    "--preset 1b-32k --device h100 --gpus 8 --context-parallel-size 4 "
    "--skyladder-context-parallel-layout"
)


def call(capsys: pytest.CaptureFixture[str], flags: str) -> str:
    assert main(["compare", *flags.split()]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def compare_json(capsys: pytest.CaptureFixture[str], flags: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(call(capsys, f"{flags} --json"))
    return result


def names(result: dict[str, Any]) -> list[str]:
    return [plan["name"] for plan in result["schedules"]]


# --- rows ---------------------------------------------------------------------------------------


def test_presets_have_their_own_models(capsys: pytest.CaptureFixture[str]) -> None:
    result = compare_json(capsys, "1b-8k 1b-32k")
    assert names(result) == ["constant (1b-8k)", "1b-8k", "constant (1b-32k)", "1b-32k"]
    flops = [round(plan["flops"]["ladder"] / 1e20, 2) for plan in result["schedules"]]
    assert flops == [11.57, 9.91, 25.50, 18.83]


def test_schedule_presets_share_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    result = compare_json(capsys, f"recommended shortformer 1b-8k {BASE}")
    assert names(result) == ["constant", "recommended", "shortformer", "1b-8k"]
    assert {plan["parameters"] for plan in result["schedules"]} == {1_100_048_384}
    assert [plan["windows"]["0"] for plan in result["schedules"]] == [8192, 8, 128, 32]


def test_schedules_of_one_run(capsys: pytest.CaptureFixture[str]) -> None:
    result = compare_json(capsys, f"{BASE} --schedule linear sinusoidal --schedule exponential")
    assert names(result) == ["constant", "linear", "sinusoidal", "exponential"]
    work = [plan["attention_fraction"] for plan in result["schedules"]]
    assert work[0] == 1 > work[2] > work[1] > work[3]


def test_constant_is_not_doubled(capsys: pytest.CaptureFixture[str]) -> None:
    assert names(compare_json(capsys, f"{BASE} --schedule constant linear")) == [
        "constant",
        "linear",
    ]


def test_rates(capsys: pytest.CaptureFixture[str]) -> None:
    result = compare_json(capsys, f"{BASE} --alpha 1/4 0.125")
    assert names(result) == ["constant", "linear 1/4", "linear 1/8"]
    assert [plan["full_window"]["step"] for plan in result["schedules"]] == [0, 32_640, 65_280]
    both = compare_json(capsys, f"{BASE} --alpha 1/4 1/8 --schedule linear stepwise constant")
    expected = ["linear 1/4", "linear 1/8", "stepwise 1/4", "stepwise 1/8", "constant"]
    assert names(both) == ["constant", *expected]


def test_every_combination_is_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    flags = f"{BASE} --schedule linear stepwise --alpha 1/4 --share 0.5 --start-window 8 64"
    result = compare_json(capsys, f"{flags} --round-to 128")
    expected = [
        f"{schedule} {growth} from {start} by 128"
        for schedule in ("linear", "stepwise")
        for growth in ("1/4", "50%")
        for start in (8, 64)
    ]
    assert names(result) == ["constant", *expected]
    for plan, name in zip(result["schedules"][1:], expected, strict=True):
        share = plan["full_window"]["step"] / 100_000
        assert share == pytest.approx(0.5 if "50%" in name else (8192 - 32) / 25_000, abs=0.01)
        assert plan["windows"]["0"] == (8 if "from 8 " in name else 64)
        middle = [int(w) for w in plan["windows"].values() if 200 < int(w) < 8192]
        assert middle and all(window % 128 == 0 for window in middle)


def test_what_a_schedule_has_no_use_for_is_not_swept(capsys: pytest.CaptureFixture[str]) -> None:
    """Such rows would be equal."""
    flags = "--schedule staged linear --skyladder-stages 128:0.5 final:0.5 --start-window 8 16"
    result = compare_json(capsys, f"{BASE} {flags} --round-to pow2")
    assert names(result) == [
        *("constant", "staged", "linear from 8 by pow2", "linear from 16 by pow2"),
    ]


def test_what_does_not_finish_is_a_marked_row(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = f"{BASE} --schedule linear cyclic --alpha 1/8 1/100"
    rows = {plan["name"]: plan for plan in compare_json(capsys, flags)["schedules"]}
    ends = {name: plan["finishes"] for name, plan in rows.items()}
    assert ends == {
        "constant": True,
        "linear 1/8": True,
        "linear 1/100": False,
        "cyclic 1/8": False,
        "cyclic 1/100": False,
    }
    text = call(capsys, flags)
    assert re.search(r"linear 1/100 +32 to 1,031 +unfinished", text)
    assert re.search(r"linear 1/8 +32 to 8,192 +65%", text)
    assert "training refuses unless --skyladder-allow-unfinished" in " ".join(text.split())
    monkeypatch.setenv("FORCE_COLOR", "1")
    coloured = call(capsys, flags)
    (line,) = (line for line in coloured.splitlines() if "linear 1/100" in line)
    assert "\x1b[1;33m" in line
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[1;33m" not in call(capsys, flags)


def test_our_flags_hold_for_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    result = compare_json(capsys, f"{BASE} --schedule linear stepwise --skyladder-start-window 8")
    assert [plan["windows"]["0"] for plan in result["schedules"]] == [8192, 8, 8]


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    text = call(capsys, f"{TIMED} --schedule linear exponential --budget-hours 100 --lr 1")
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "104.9B tokens, growing over 64%" in text
    assert "The paper found growth over 60 to 64 % of the tokens best" in " ".join(text.split())
    assert "Left out" not in text
    more = call(capsys, f"{TIMED} --schedule linear --lr 1 -v")
    assert "Left out, as they change nothing here: --lr." in more


def test_what_has_to_change_is_said_here_too(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(call(capsys, f"{BASE} --schedule linear --qk-clip").split())
    assert "Change: --qk-clip cannot stay" in text
    assert "Change:" not in call(capsys, f"{BASE} --schedule linear")


def test_a_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    call(capsys, f"{BASE} --schedule linear cyclic --skyladder-expand-fraction 0.5 "
         f"--plot {tmp_path}/c.svg")  # fmt: skip
    svg = (tmp_path / "c.svg").read_text(encoding="utf-8")
    assert svg.rstrip().endswith("</svg>")


def test_the_picture_shows_window_context_and_what_is_saved(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    drawn: list[Any] = []
    monkeypatch.setattr(images, "save", lambda figure, path: drawn.append(figure))
    result = compare_json(capsys, f"{BASE} --alpha 1/8 --plot c.svg")
    window, context, saved = drawn[0].axes
    titles = [axes.get_title(loc="left") for axes in drawn[0].axes]
    assert titles == ["Window", "Mean visible context", "Saved so far"]
    _, ladder = window.get_lines()
    assert (ladder.get_ydata()[0], ladder.get_ydata()[-1]) == (32, 8192)
    _, ladder = context.get_lines()
    assert (ladder.get_ydata()[0], ladder.get_ydata()[-1]) == (33 / 2, 8193 / 2)
    constant, ladder = saved.get_lines()
    flops = result["schedules"][1]["flops"]
    assert list(constant.get_ydata()) == pytest.approx([0] * len(constant.get_ydata()), abs=1e-9)
    end = (flops["constant"] - flops["ladder"]) / 1e20
    assert ladder.get_ydata()[-1] == pytest.approx(end, rel=0.01)


def test_all_rows_read_their_data_and_their_log_once(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with IndexedWriter(tmp_path / "docs", "<u2") as writer:
        for _ in range(300):
            writer.add_document([7] * 255 + [2])
    write_log(tmp_path / "run.log", batch=8)
    read: list[str] = []

    class Counted(IndexedReader):
        def __init__(self, prefix: str | Path) -> None:
            read.append("data")
            super().__init__(prefix)

    def parse(*args: Any, _do: Any = runlog._parse, **kwargs: Any) -> Any:
        read.append("log")
        return _do(*args, **kwargs)

    monkeypatch.setattr(visible_context, "IndexedReader", Counted)
    monkeypatch.setattr(runlog, "_parse", parse)
    flags = f"{LAUNCH} --share 0.5 0.64 --start-window 8 32 --calibrate {tmp_path}/run.log"
    result = compare_json(capsys, f"{flags} --data-path {tmp_path}/docs")
    assert len(names(result)) == 5  # with the constant window
    assert sorted(read) == ["data", "log"]


# --- evidence -----------------------------------------------------------------------------------


def evidence(capsys: pytest.CaptureFixture[str], flags: str) -> dict[str, dict[str, list[str]]]:
    """Return row -> kind -> what was found, with its setting."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, records in compare_json(capsys, f"{flags} --evidence")["evidence"].items():
        for record in records:
            text = f"{record['found']} ({record['of']})"
            found.setdefault(name, {}).setdefault(record["kind"], []).append(text)
    return found


def test_evidence_of_the_papers_own_runs(capsys: pytest.CaptureFixture[str]) -> None:
    found = evidence(capsys, "1b-8k 1b-32k 3b-8k")
    assert found.keys() == {"1b-8k", "1b-32k", "3b-8k"}  # a constant window has none
    short, long, large = (found[name] for name in ("1b-8k", "1b-32k", "3b-8k"))
    assert short["time"][0].startswith("13.1 % less, FLOPs 11.6e20 -> 9.9e20 (1B at 8K, linear")
    assert long["time"][0].startswith("22.2 % less, FLOPs 25.5e20 -> 18.8e20 (1B at 32K")
    assert [text.split(" (")[0][-22:] for text in short["benchmarks"]] == [
        *("46.3/15.3 -> 50.0/14.3", "52.5/11.1 -> 55.2/12.3"),
    ]
    assert "57.0/15.8 -> 60.5/19.3" in large["benchmarks"][0]
    assert "2.732/2.553/2.519" in short["validation loss"][0]


def test_evidence_goes_by_schedule_mask_documents_rate_and_start(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = evidence(capsys, f"{BASE} --schedule sinusoidal cyclic --skyladder-expand-fraction 0.2")
    assert "sinusoidal 54.2/14.2" in found["sinusoidal"]["benchmarks"][0]
    assert "Table 22" in found["cyclic"]["benchmarks"][0]
    assert "validation loss" not in found["cyclic"]  # measured for the linear one alone
    rates = evidence(capsys, f"{BASE} --share 0.1 0.3 0.95 --start-window 8 32")
    losses = {name: kinds["validation loss"][0][:43] for name, kinds in rates.items()}
    expected = {"10%": "2.751", "30%": "2.740", "95%": "2.729"}
    for name, loss in losses.items():
        assert expected[name.split()[1]] in loss
    (best,) = evidence(capsys, f"{BASE} --share 0.65 --start-window 8").values()
    assert "2.725/2.545/2.510" in best["validation loss"][0]
    (sliding,) = evidence(capsys, f"{BASE} --share 0.65 --skyladder-mask sliding").values()
    assert "sliding 54.4/12.8" in sliding["benchmarks"][0]
    (masked,) = evidence(capsys, f"{BASE} --share 0.65 --skyladder-intra-document").values()
    assert all("documents masked" in text for text in masked["benchmarks"])


def test_evidence_is_printed_once_for_rows_of_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    text = call(capsys, f"{BASE} --share 0.62 0.64 --evidence")
    assert "\nlinear 62%, linear 64%\n" in text
    assert text.count("13.1 % less") == 1
    assert all("arXiv:2503.15450" in record.source for record in MEASURED)
    assert "What the paper measured" not in call(capsys, f"{BASE} --share 0.62")


# --- budgets ------------------------------------------------------------------------------------


def fits(capsys: pytest.CaptureFixture[str], flags: str) -> list[dict[str, Any] | None]:
    return [budget["fit"] for budget in compare_json(capsys, flags)["budgets"]]


def test_the_papers_share_is_the_default_advice(capsys: pytest.CaptureFixture[str]) -> None:
    (fit,) = fits(capsys, f"{BASE} --schedule linear")
    assert fit and fit["share"] == 0.64
    assert fit["alpha"] == pytest.approx((8192 - 32) / 64_000)
    assert (fit["steps"], fit["hours"]) == (100_000, None)


def test_a_budget_of_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    (fit,) = fits(capsys, f"{BASE} --budget-tokens 20e9")
    assert fit and fit["steps"] == int(20e9 / 2**20) == 19_073
    assert fit["alpha"] == pytest.approx(8160 / (0.64 * 19_073))


def test_a_budget_as_a_share(capsys: pytest.CaptureFixture[str]) -> None:
    (fit,) = fits(capsys, f"{BASE} --budget-share 0.5")
    assert fit and fit["alpha"] == pytest.approx(8160 / 50_000)


def test_a_budget_of_hours(capsys: pytest.CaptureFixture[str]) -> None:
    """The rates that come out keep to the hours when they are planned."""
    _, longest, whole = fits(capsys, f"{TIMED} --budget-hours 270")
    assert longest and whole
    assert longest["steps"] < whole["steps"] == 100_000
    assert longest["share"] == 0.64 < whole["share"] <= 1
    for fit in (longest, whole):
        flags = f"{TIMED} --train-iters {fit['steps']} --skyladder-alpha {fit['alpha']}"
        assert main(["plan", "--json", *flags.split()]) == 0
        hours = json.loads(capsys.readouterr().out)["time"]["ladder"]["hours"]
        assert hours == pytest.approx(fit["hours"], rel=2e-3)
        assert hours <= 270 * 1.002
    assert longest["hours"] > 270 * 0.998
    smaller = f"{TIMED} --skyladder-expand-fraction {whole['share'] - 0.01}"
    assert main(["plan", "--json", *smaller.split()]) == 0
    assert json.loads(capsys.readouterr().out)["time"]["ladder"]["hours"] > 270


@pytest.mark.parametrize(
    "flags",
    [
        "--skyladder-round-to pow2",
        "--skyladder-begin-samples 6400100",
        "--skyladder-begin-samples 6400100 --skyladder-start-window 4096",
        *(f"--schedule {name}" for name in ("stepwise", "sinusoidal", "reversed", "cyclic")),
    ],
)
def test_budgets_are_of_the_tables_schedule(capsys: pytest.CaptureFixture[str], flags: str) -> None:
    result = compare_json(capsys, f"{TIMED} {flags} --share 0.64 --budget-hours 260")
    row, (whole, longest, _) = result["schedules"][1], (b["fit"] for b in result["budgets"])
    assert whole["hours"] == pytest.approx(row["time"]["ladder"]["hours"], rel=1e-3)
    assert longest["hours"] == pytest.approx(260, rel=1e-3)
    for fit in (whole, longest):  # planned with what came out it keeps to the hours
        sweep = f"--train-iters {fit['steps']} --alpha {fit['alpha']}"
        planned = compare_json(capsys, f"{TIMED} {flags} {sweep}")["schedules"][1]
        assert planned["time"]["ladder"]["hours"] == pytest.approx(fit["hours"], rel=1e-3)
        begin = 50_001 if "begin" in flags else 0
        ramp = planned["full_window"]["step"] - begin
        assert ramp / (fit["steps"] - begin) == pytest.approx(0.64, abs=1e-3)


def test_a_budget_names_the_schedule_where_it_is_not_linear(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def asked(flags: str) -> list[str]:
        budgets = compare_json(capsys, f"{TIMED} {flags} --budget-hours 270")["budgets"]
        return [each["asked"] for each in budgets]

    hours, tokens = "104.9B tokens in 270 hours", "104.9B tokens"
    growing = "growing over 64%"
    assert asked("--schedule linear cyclic") == [
        f"{tokens}, {growing}",
        f"270 hours, {growing}",
        hours,
    ]
    assert asked("--schedule cyclic linear") == [
        f"{tokens}, cyclic over 64%",
        "270 hours, cyclic over 64%",
        f"{hours}, cyclic",
    ]


@pytest.mark.parametrize("layout", ["zigzag", "balanced"])
def test_budgets_go_by_the_busiest_rank_as_the_table_does(
    capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    result = compare_json(capsys, f"{PARALLEL} {layout} --share 0.64 0.3 --budget-hours 116.5")
    of_64, of_30 = (row["time"]["ladder"]["hours"] for row in result["schedules"][1:])
    whole, longest, _ = (each["fit"] for each in result["budgets"])
    assert whole["hours"] == pytest.approx(of_64, rel=1e-3)
    assert longest["hours"] == pytest.approx(116.5, rel=1e-3)
    (whole, *_) = fits(capsys, f"{PARALLEL} {layout} --budget-share 0.3")
    assert whole and whole["hours"] == pytest.approx(of_30, rel=1e-3)


def test_pictures_have_the_hours_of_the_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    drawn: list[Any] = []
    monkeypatch.setattr(images, "save", lambda figure, path: drawn.append(figure))
    result = compare_json(capsys, f"{PARALLEL} zigzag --share 0.64 --plot c.svg")
    time = result["schedules"][1]["time"]
    constant, ladder = (time[name]["gpu_hours"] for name in ("constant", "ladder"))
    *_, saved = drawn[0].axes
    _, line = saved.get_lines()
    label = f"{ladder:,.4g} GPU-hours, {100 * (ladder / constant - 1):+.1f} %"
    assert line.get_label() == f"linear 64%: {label}"
    assert line.get_ydata()[-1] == pytest.approx(constant - ladder)
    flags = f"{PARALLEL} zigzag --skyladder-expand-fraction 0.64 --plot p.svg"
    assert main(["plan", *flags.split()]) == 0
    *_, cost = drawn[1].axes
    line, reference = cost.get_lines()
    assert line.get_label().endswith(label) and line.get_ydata()[-1] == pytest.approx(ladder)
    assert reference.get_ydata()[-1] == pytest.approx(constant)
    # and between windows that divide the sequence a step costs what the busiest rank's work does
    parser = argparse.ArgumentParser()
    run_flags.add_run_flags(parser)
    plan = estimate.make_plan(parser.parse_args(flags.split()[:-2]), name="run")
    work = parallel.parallel_costs(plan, plan.window(24_000)).work
    assert plan.time and max(work) > 1.1 * sum(work) / len(work)
    busiest = max(work) * len(work) / plan.causal_pairs
    of_attention = (
        plots._step_cost(plan, 24_000) - plan.time.step.fixed
    ) / plan.time.step.attention
    assert of_attention == pytest.approx(busiest, rel=0.01)


@pytest.mark.parametrize("command", ["plan", "compare --schedule linear stepwise"])
def test_pictures_of_a_model_that_is_not_counted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """It has windows and work, no FLOPs and no hours."""
    pytest.importorskip("matplotlib")
    drawn: list[Any] = []
    monkeypatch.setattr(images, "save", lambda figure, path: drawn.append(figure))
    launch = "--seq-length 8192 --global-batch-size 512 --train-iters 1000 --plot p.png"
    assert main([*command.split(), *launch.split()]) == 0, capsys.readouterr().err
    titles = [axes.get_title(loc="left") for axes in drawn[0].axes]
    assert titles == ["Window", "Attention work" if command == "plan" else "Mean visible context"]
    labels = [line.get_label() for line in drawn[0].axes[0].get_lines()]
    assert not any("FLOPs" in label or "hours" in label for label in labels)


def test_the_smallest_share_that_fits_is_found() -> None:
    """Against all hundred shares, for budgets between those of the shortest and longest growth."""
    parser = argparse.ArgumentParser()
    run_flags.add_run_flags(parser)
    plan = estimate.make_plan(parser.parse_args(TIMED.split()), name="run")
    hours = {
        percent: budget.fit_share(plan, Fraction(percent, 100)).hours or 0.0
        for percent in range(1, 101)
    }
    for percent in (1, 2, 37, 50, 63, 64, 99, 100):
        fit = budget.fit_tokens_and_hours(plan, hours[percent] + 1e-6)
        assert fit and fit.share == Fraction(percent, 100)
    assert budget.fit_tokens_and_hours(plan, hours[100] - 1e-3) is None


def test_hours_that_are_more_than_enough(capsys: pytest.CaptureFixture[str]) -> None:
    *_, whole = fits(capsys, f"{TIMED} --budget-hours 1000")
    assert whole and whole["share"] == 0.01


def test_hours_that_no_ladder_fits(capsys: pytest.CaptureFixture[str]) -> None:
    _, longest, whole = fits(capsys, f"{TIMED} --budget-hours 100")
    assert longest and whole is None
    assert "does not fit" in call(capsys, f"{TIMED} --budget-hours 100")


def test_budgets_start_from_the_first_ladder(capsys: pytest.CaptureFixture[str]) -> None:
    (fit,) = fits(capsys, f"shortformer recommended {BASE}")
    assert fit and fit["alpha"] == pytest.approx((8192 - 8) / 64_000)
    assert fits(capsys, f"shortformer {BASE}") == []


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "there is nothing to compare. Name presets"),
        ("7b", "7b is no preset. Choose from: 120m-8k"),
        ("shortformer", "not given: --seq-length, --global-batch-size, --train-iters"),
        (f"{BASE} --schedule cosine", "invalid choice: 'cosine'"),
        (f"{BASE} --alpha 0", "'0' is not a number above 0 such as 0.125 or 1/8"),
        (f"{BASE} --alpha x", "'x' is not a number above 0"),
        (f"{BASE} --budget-share 1.5", "--budget-share=1.5 is above 1. Give a share"),
        (f"{BASE} --budget-tokens 1000", "--budget-tokens=1,000 is less than a batch of 1,048,576"),
        (f"{BASE} --budget-hours 10", "--budget-hours needs a time for each step. Give --device"),
        (f"{TIMED} --budget-hours 1e-9", "--budget-hours=1e-09: a step takes"),
        (
            f"{TIMED} --budget-hours 9 --skyladder-begin-samples 6400000",
            "--budget-hours=9: the 50,000 steps before --skyladder-begin-samples take",
        ),
        (
            f"{BASE} --budget-tokens 1e9 --skyladder-begin-samples 6400000",
            "--budget-tokens=1,000,000,000: the schedule begins after 52.4B tokens (--skyladder-",
        ),
        (f"{BASE} --share 2", "is not a share of the run"),
        (f"{BASE} --start-window 9000", "is above the final window of 8192"),
        (f"{BASE} --round-to x", "'x' is neither a number, nor auto or pow2"),
        (f"{BASE} --schedule staged", "--skyladder-schedule=staged needs --skyladder-stages"),
    ],
)
def test_refused(capsys: pytest.CaptureFixture[str], flags: str, message: str) -> None:
    try:
        assert main(["compare", *flags.split()]) == 1
    except SystemExit as stop:
        assert stop.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_shares_are_exact() -> None:
    from megatron_skyladder.cli.compare import _count, _rate

    assert _rate("1/3") == Fraction(1, 3)
    assert _count("20e9") == 20 * 10**9
