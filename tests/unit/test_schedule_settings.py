"""Settings that describe themselves: a new schedule in one place, and the checks without flags."""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import logging
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pytest

import megatron_skyladder
from megatron_skyladder.cli import main
from megatron_skyladder.ladder.config import (
    SkyLadderConfig,
    TrainingRun,
    make_config,
    setting_names,
)
from megatron_skyladder.ladder.flags import add_arguments, config_from_args, flag_of, name_of
from megatron_skyladder.ladder.fragments import window_pairs
from megatron_skyladder.ladder.numbers import exact
from megatron_skyladder.ladder.schedules import SCHEDULES, Ramp, WindowSchedule
from megatron_skyladder.ladder.settings import SettingError, setting

REPOSITORY = Path(__file__).resolve().parents[2]
RUN = TrainingRun(seq_length=2048, step_samples=128, train_samples=128_000)

# --- a schedule with a parameter, written in one place ------------------------------------------


@pytest.fixture
def power() -> Iterator[type[WindowSchedule]]:
    """A schedule that the package does not have, for the length of a test."""

    @dataclass(frozen=True)
    class Power(Ramp):
        schedule: str = "power"
        exponent: Any = field(
            default=2,
            metadata=setting(read=exact, metavar="P", help="power of the ramp. Default: 2."),
        )
        summary = "grows with a power of the ramp"
        formula = "w_s + (w_e - w_s) (x/T)^p"
        takes_arrays = False

        @property
        def _own_text(self) -> str:
            return f", power {self.exponent}"

        def _grown(self, done: int, ramp: int) -> int:
            return self.start_window + int(self._span * (done / ramp) ** float(self.exponent))

        def _check(self) -> None:
            if self.exponent <= 0:
                raise SettingError(f"$exponent={self.exponent} never grows. Give one above 0.")
            super()._check()

    yield Power
    del SCHEDULES["power"]


def test_a_new_schedule_needs_nothing_but_its_class(
    power: type[WindowSchedule], capsys: pytest.CaptureFixture[str]
) -> None:
    """Python, flags and their help, errors, plan, compare and the documentation's table."""
    config = make_config(RUN, {"schedule": "power", "start_window": 48, "exponent": "3"})
    assert config.fingerprint.startswith(
        "power 48 -> 2048, fraction 0.64 of 1000 steps, power 3; step of 128 samples;"
    )
    assert config.schedule.window_at(320) == 48 + 2000 // 8  # half of 640 steps, cubed
    parser = add_arguments(argparse.ArgumentParser())
    assert "--skyladder-exponent P" in (text := " ".join(parser.format_help().split()))
    assert "for power: power of the ramp. Default: 2." in text
    flags = "--skyladder-schedule power --skyladder-exponent"
    assert main(["plan", "--preset", "1b-8k", *f"{flags} 3 --at 0 --json".split()]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["schedule"].startswith("power 32 -> 8192, alpha 1/8, power 3;")
    rows = "--schedule linear power --skyladder-expand-fraction 0.5 --skyladder-exponent 3"
    assert main(["compare", "--preset", "1b-8k", "--json", *rows.split()]) == 0
    compared = json.loads(capsys.readouterr().out)["schedules"]
    assert [row["name"] for row in compared] == ["constant", "linear", "power"]
    assert main(["plan", "--preset", "1b-8k", *f"{flags} 0".split()]) == 1
    assert "--skyladder-exponent=0 never grows. Give one above 0." in capsys.readouterr().err
    sys.path.insert(0, str(REPOSITORY / "tools"))
    tables = importlib.import_module("write_tables")
    assert "| `power` | grows with a power of the ramp | w_s + (w_e - w_s) (x/T)^p |" in (
        tables.schedule_table()
    )


def test_two_schedules_of_one_name_are_our_mistake() -> None:
    with pytest.raises(AssertionError, match="two schedules are called linear"):
        type("Other", (Ramp,), {"schedule": "linear"})


def test_nobody_asks_for_a_schedules_name() -> None:
    """What a schedule is like, its class says: outside, no comparison with a name."""
    package = Path(megatron_skyladder.__file__).parent
    names = set(SCHEDULES) - {"linear"}  # a word of others too: rotary embeddings, layers
    found = []
    for path in package.rglob("*.py"):
        if path.parent.name == "schedules":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                sides = node.args if node.func.attr in ("startswith", "endswith") else []
            texts = [each for side in sides for each in ast.walk(side)]
            if any(isinstance(each, ast.Constant) and each.value in names for each in texts):
                found.append(f"{path.relative_to(package)}:{node.lineno}")  # type: ignore[attr-defined]
    assert found == []


# --- the same checks for Python callers and for flags -------------------------------------------

# settings | the error, with fields
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"schedule": "cosine"}, "schedule=cosine is unknown. Choose one of: constant, linear"),
    ({"schedule": "$alpha"}, "schedule=$alpha is unknown"),  # as typed
    ({"preset": "7b"}, "preset=7b is unknown. Choose one of: 120m-8k"),
    ({"preset": "continual"}, "preset=continual is no more: it was the paper's comparison run"),
    ({"preset": "1b-8k"}, "final_window=8192 (set by preset=1b-8k) is above seq_length=2048."),
    ({"final_window": 4096}, "final_window=4096 is above seq_length=2048. A window cannot be"),
    ({"start_window": 4096}, "start_window=4096 is above the final window of 2048"),
    ({"alpha": 1}, "takes 2,016 steps, but the run has 1,000: it would end at a window of 1031. "),
    ({"alpha": 1}, "Give a higher alpha, or expand_fraction=0.64, or accept it with allow_unfin"),
    ({"alpha": "1e-400"}, "alpha: '1e-400' is out of bounds"),
    ({"mask": "dense"}, "mask=dense is unknown. Choose one of: local, sliding."),
    ({"attention_backend": "triton"}, "attention_backend=triton is unknown. Choose one of: auto"),
    ({"init": "zero"}, "init=zero is unknown. Choose one of: megatron, reference."),
    ({"context_parallel_layout": "zig-zag"}, "context_parallel_layout=zig-zag is unknown. Choose "),
    (
        {"recurrent_state": "windows"},
        "recurrent_state=windows is unknown. Choose one of: fragments",
    ),
    ({"begin_samples": -1}, "begin_samples=-1: give 0 or more consumed samples"),
    ({"begin_samples": 128_000}, "begin_samples=128000 is not before the end of the run"),
    ({"stages": "128:0.5 final:0.5"}, "stages is for schedule=staged, but the schedule is linear"),
    ({"schedule": "points"}, "schedule=points needs points SHARE:WINDOW"),
    ({"schedule": "cyclic", "num_cycles": 0}, "num_cycles=0: give at least 1 cycle"),
    ({"eval_lengths": "4096"}, "eval_lengths has 4096, but context lengths lie between 1 and seq_"),
    ({"eval_lengths": "2048"}, "eval_lengths=2048 is the whole sequence"),
    ({"attention_stats_interval": 0}, "attention_stats_interval=0 has to be a multiple of log_in"),
]


def as_flags(settings: dict[str, Any]) -> list[str]:
    words = []
    for name, value in settings.items():
        words += (
            [f"{flag_of(name)}={value}"] if name != "stages" else [flag_of(name), *value.split()]
        )
    return words


@pytest.mark.parametrize(("settings", "message"), WRONG)
def test_python_callers_read_fields(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=re.escape(message)) as caught:
        make_config(RUN, settings)
    assert "--" not in str(caught.value)


def parsed(words: list[str]) -> argparse.Namespace:
    args = add_arguments(argparse.ArgumentParser()).parse_args(words)
    vars(args).update(seq_length=2048, global_batch_size=128, train_samples=None, train_iters=1000)
    return args


@pytest.mark.parametrize(
    "settings", [settings for settings, message in WRONG if not message.startswith("alpha:")]
)
def test_users_of_flags_read_flags(settings: dict[str, Any]) -> None:
    """The same error, each field under its flag."""
    with pytest.raises(SettingError) as python:
        make_config(RUN, settings)
    with pytest.raises(ValueError, match="--skyladder-") as flags:
        config_from_args(parsed(as_flags(settings)))
    assert str(flags.value) == python.value.renamed(flag_of)
    for name in settings:
        assert re.search(rf"(?<![-\w$]){name}\b[=:]", str(flags.value)) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_length": 0}, "seq_length=0: give 1 or more tokens"),
        ({"step_samples": 0}, "step_samples=0: give 1 or more samples"),
        ({"seq_length": 1024}, "final_window=2048 is above seq_length=1024"),
        ({"begin_samples": -1}, "begin_samples=-1: give 0 or more consumed samples"),
        ({"begin_samples": 10**20}, "a whole number up to 1e15"),
        ({"begin_samples": 0.5}, "begin_samples=0.5: give 0 or more consumed samples, a whole"),
        ({"attention_stats_interval": -1}, "attention_stats_interval=-1: give 0 or more iterat"),
        ({"mask": "dense"}, "mask=dense is unknown"),
        ({"attention_backend": "triton"}, "attention_backend=triton is unknown"),
        ({"init": "zero"}, "init=zero is unknown"),
        ({"eval_lengths": (0,)}, "eval_lengths has 0, but context lengths lie between 1 and"),
        ({"eval_lengths": "many"}, "'many' is not a list of lengths such as 512,4096,8192"),
        (
            {"schedule": WindowSchedule(final_window=2048, alpha=1, total_steps=1000)},
            "takes 2,016 steps, but the run has 1,000",
        ),
    ],
)
def test_the_configuration_checks_itself(change: dict[str, Any], message: str) -> None:
    config = make_config(RUN, {})
    with pytest.raises(SettingError, match=re.escape(message)):
        replace(config, **change)


def test_the_configuration_reads_text() -> None:
    config = replace(make_config(RUN, {}), eval_lengths="1024,512,512")
    assert config.eval_lengths == (512, 1024)


def test_an_unknown_setting_is_named() -> None:
    with pytest.raises(SettingError, match="speed is no setting"):
        make_config(RUN, {"speed": 2})


def test_python_callers_read_fields_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        make_config(RUN, {"num_cycles": 2, "round_to": "auto"})
    unused, auto = (record.getMessage() for record in caplog.records)
    assert unused == "num_cycles has no effect with schedule=linear."
    assert auto.startswith("round_to auto is 128, the largest number that divides kernel tiles")


def test_every_flag_sets_something() -> None:
    """What is no setting is read where it is used: how a run may be resumed."""
    flags = {action.dest for action in add_arguments(argparse.ArgumentParser())._actions}
    settings = {name_of(name) for name in setting_names()}
    assert settings < flags
    on_resume = {"skyladder_allow_schedule_change", "skyladder_end_ladder"}
    assert flags - settings == {"help"} | on_resume
    from_the_run = {"schedule", "seq_length", "step_samples", "local_layers", "local_schedule"}
    assert {each.name for each in fields(SkyLadderConfig)} - from_the_run <= set(setting_names())


# --- numbers are bounded before anything is computed with them ----------------------------------

NUMBERS = (
    *("--seq-length", "--global-batch-size", "--train-iters", "--hidden-size", "--vocab-size"),
    *("--context-parallel-size", "--micro-batch-size", "--gpus", "--tflops", "--mfu"),
    *("--price-per-gpu-hour", "--step-batch-size-schedule", "--skyladder-alpha"),
    *("--skyladder-expand-fraction", "--skyladder-start-window", "--skyladder-final-window"),
    *("--skyladder-round-to", "--skyladder-begin-samples", "--skyladder-eval-lengths"),
    *("--skyladder-attention-stats-interval", "--skyladder-cycles"),
)
COMPARED = ("--alpha", "--budget-share", "--budget-tokens", "--budget-hours")


@pytest.mark.parametrize("flag", [*NUMBERS, *COMPARED])
def test_a_number_out_of_bounds_is_refused(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What overflowed, did not return, or came out as nan."""
    command = "compare" if flag in COMPARED else "plan"
    for number in ("1e400", "1e99999999", "nan", "9" * 30, "9" * 5000):
        value = f"0:{number}" if flag == "--step-batch-size-schedule" else number
        try:
            code = main([command, "--preset", "1b-8k", "--device", "h100", f"{flag}={value}"])
        except SystemExit as stop:  # the parser's
            code = stop.code
        assert code in (1, 2), number
        assert flag in capsys.readouterr().err


def test_a_plan_for_a_million_tokens_and_as_many_windows_is_quick(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Under a second of processor time, where it took 18 s."""
    flags = "--preset 1b-32k --seq-length 1048576 --skyladder-final-window 1048576 --json"
    flags += " --skyladder-alpha 1 --train-iters 1500000 --context-parallel-size 16"
    began = time.process_time()
    assert main(["plan", *flags.split()]) == 0
    assert time.process_time() - began < 6
    plan = json.loads(capsys.readouterr().out)
    assert plan["full_window"]["step"] == 1048576 - 32
    length, steps = 1048576, range(375, 1_500_000, 750)  # every 750th step stands for its like
    sample = [window_pairs(min(32 + step, length), length) for step in steps]
    expected = sum(sample) / len(sample) / window_pairs(length, length)
    assert plan["attention_fraction"] == pytest.approx(expected, abs=1e-3)
