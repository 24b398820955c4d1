"""The --skyladder-* flags: what they mean, what is left to default, what is refused."""

from __future__ import annotations

import argparse
import io
import logging
import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_skyladder.ladder.config import BACKENDS, MASKS, SkyLadderConfig
from megatron_skyladder.ladder.flags import add_arguments, config_from_args, is_requested
from megatron_skyladder.ladder.schedules import WindowSchedule

ROWS = 128


def parse(flags: str = "", **megatron: int | None) -> argparse.Namespace:
    """Return what Megatron would hand us for a run of 1,000 steps of 128 rows of 2,048 tokens."""
    args = add_arguments(argparse.ArgumentParser()).parse_args(flags.split())
    defaults = {
        "seq_length": 2048,
        "global_batch_size": ROWS,
        "train_samples": None,
        "train_iters": 1000,
    }
    vars(args).update({**defaults, **megatron})
    return args


def configure(flags: str, **megatron: int | None) -> SkyLadderConfig:
    config = config_from_args(parse(flags, **megatron))
    assert config
    return config


# --- what the flags mean ------------------------------------------------------------------------


def test_without_our_flags_there_is_no_configuration() -> None:
    assert not is_requested(parse())
    assert config_from_args(parse()) is None


@pytest.mark.parametrize(
    "flags",
    [
        "--skyladder-schedule linear",
        "--skyladder-start-window 32",
        "--skyladder-intra-document",
        "--skyladder-preset recommended",
        "--skyladder-mask sliding",
    ],
)
def test_any_flag_switches_it_on(flags: str) -> None:
    assert is_requested(parse(flags))
    assert config_from_args(parse(flags)) is not None


def test_defaults() -> None:
    config = configure("--skyladder-schedule linear")
    assert config == SkyLadderConfig(
        schedule=WindowSchedule(
            "linear", 32, 2048, expand_fraction=Fraction(64, 100), total_steps=1000
        ),
        seq_length=2048,
        step_samples=ROWS,
        begin_samples=0,
        intra_document=False,
        mask="local",
        attention_backend="auto",
        probe=True,
    )


def test_every_flag_arrives() -> None:
    config = configure(
        "--skyladder-schedule cyclic --skyladder-start-window 8 --skyladder-final-window 1024 "
        "--skyladder-alpha 1/8 --skyladder-round-to 16 --skyladder-cycles 3 "
        "--skyladder-begin-samples 1280 --skyladder-intra-document --skyladder-mask sliding "
        "--skyladder-attention-backend sdpa --skyladder-no-probe",
        train_iters=100_000,
    )
    assert config == SkyLadderConfig(
        schedule=WindowSchedule(
            "cyclic",
            8,
            1024,
            alpha=Fraction(1, 8),
            total_steps=99_990,
            round_to=16,
            num_cycles=3,
        ),
        seq_length=2048,
        step_samples=ROWS,
        begin_samples=1280,
        intra_document=True,
        mask="sliding",
        attention_backend="sdpa",
        probe=False,
    )


def test_samples_and_iterations_mean_the_same_run() -> None:
    by_iterations = configure("--skyladder-schedule linear", train_iters=1000)
    by_samples = configure(
        "--skyladder-schedule linear", train_iters=None, train_samples=1000 * ROWS
    )
    assert by_iterations == by_samples


@pytest.mark.parametrize(
    ("consumed", "window"),
    [(0, 32), (127, 32), (128, 33), (255, 33), (256, 34), (10**9, 2048)],
)
def test_a_step_is_one_global_batch(consumed: int, window: int) -> None:
    config = configure("--skyladder-alpha 1", train_iters=2016)
    assert config.window_at_samples(consumed) == window


@pytest.mark.parametrize(
    ("consumed", "window"), [(0, 32), (1279, 32), (1407, 32), (1408, 33), (1536, 34)]
)
def test_a_schedule_may_begin_later(consumed: int, window: int) -> None:
    config = configure("--skyladder-alpha 1 --skyladder-begin-samples 1280", train_iters=2016 + 10)
    assert config.window_at_samples(consumed) == window


@given(st.integers(0, 3000), st.integers(1, 512))
def test_windows_do_not_depend_on_who_asks_when(step: int, rows: int) -> None:
    """The clock is consumed samples: any sample of a global batch gives its step's window."""
    config = configure("--skyladder-start-window 8", global_batch_size=rows)
    window = config.schedule.window_at(step)
    assert config.window_at_samples(step * rows) == window
    assert config.window_at_samples(step * rows + rows - 1) == window


def test_stages_may_name_the_final_window() -> None:
    config = configure("--skyladder-schedule staged --skyladder-stages 128:0.5 256:1/4 final:0.25")
    schedule = config.schedule
    assert [schedule.window_at(step) for step in (0, 499, 500, 749, 750)] == [
        *(128, 128, 256, 256, 2048)
    ]


def test_constant_needs_no_rate() -> None:
    assert configure("--skyladder-schedule constant").schedule.window_at(0) == 2048
    shorter = configure("--skyladder-schedule constant --skyladder-final-window 512")
    assert shorter.schedule.window_at(0) == 512


def test_an_evaluation_has_no_schedule_to_finish() -> None:
    config = configure("--skyladder-alpha 1/8", train_iters=None)
    assert config.schedule.window_at(0) == 32


def test_an_unfinished_schedule_can_be_asked_for() -> None:
    config = configure("--skyladder-alpha 1 --skyladder-allow-unfinished", train_iters=100)
    assert config.schedule.window_at(99) == 131


# --- what is left in Megatron's arguments, and so in checkpoints --------------------------------

SAMPLES = {  # of flags that take neither a number nor nothing
    "preset": "1b-8k",
    "schedule": "linear",
    "alpha": "1/8",
    "expand_fraction": "0.64",
    "round_to": "auto",
    "stages": "128:0.5 final:1/2",
    "points": "0:32 0.5:final",
    "mask": "sliding",
    "attention_backend": "sdpa",
    "eval_lengths": "512,1024",
    "init": "reference",
}


def with_every_flag() -> argparse.Namespace:
    """Return parsed arguments in which each of our flags has been given."""
    actions = [a for a in add_arguments(argparse.ArgumentParser())._actions if a.dest != "help"]
    words = []
    for action in actions:
        sample = SAMPLES.get(action.dest.removeprefix("skyladder_"))
        words += [action.option_strings[0], *([] if action.nargs == 0 else [sample or "16"])]
    args = parse(" ".join(words))
    assert all(getattr(args, action.dest) is not None for action in actions)
    return args


def test_every_flag_survives_megatrons_strictest_loader() -> None:
    """A resume loads the arguments with weights_only; a safe YAML loader reads run_config.yaml."""
    torch = pytest.importorskip("torch")
    args = with_every_flag()
    file = io.BytesIO()
    torch.save({"args": args}, file)
    file.seek(0)
    with torch.serialization.safe_globals([argparse.Namespace]):
        assert torch.load(file, weights_only=True)["args"] == args
    for name, value in vars(args).items():
        plain = value if isinstance(value, list) else [value]
        assert all(type(part) in (str, int, bool, type(None)) for part in plain), (name, value)


def test_a_checkpoints_arguments_give_the_same_configuration_again() -> None:
    args = parse("--skyladder-schedule staged --skyladder-stages 128:0.5 final:0.5")
    assert args.skyladder_stages == ["128:0.5", "final:0.5"]
    assert config_from_args(args) == config_from_args(args)  # reading changes nothing in them
    assert args.skyladder_stages == ["128:0.5", "final:0.5"]


# --- presets ------------------------------------------------------------------------------------


def test_flags_override_the_preset() -> None:
    config = configure(
        "--skyladder-preset 1b-8k --skyladder-start-window 8 --skyladder-final-window 2048",
        train_iters=100_000,
    )
    assert config.schedule == WindowSchedule(
        "linear", 8, 2048, alpha=Fraction(1, 8), total_steps=100_000
    )


@pytest.mark.parametrize("rate", ["--skyladder-alpha 4", "--skyladder-expand-fraction 0.5"])
def test_one_rate_replaces_the_presets(rate: str) -> None:
    for preset in ("1b-8k", "recommended"):
        config = configure(f"--skyladder-preset {preset} {rate}", seq_length=8192, train_iters=4000)
        given_alpha = "alpha" in rate
        assert config.schedule.alpha == (4 if given_alpha else None)
        assert config.schedule.expand_fraction == (None if given_alpha else Fraction(1, 2))


@pytest.mark.parametrize("name", ["linear", "constant", "reversed"])
def test_another_schedule_drops_the_presets_stages(name: str) -> None:
    config = configure(f"--skyladder-preset shortformer --skyladder-schedule {name}")
    assert config.schedule.schedule == name
    assert "stages" not in vars(config.schedule)


def test_a_preset_in_flags_of_its_own_gives_the_same_schedule() -> None:
    preset = configure("--skyladder-preset shortformer")
    flags = configure("--skyladder-schedule staged --skyladder-stages 128:0.5 final:0.5")
    assert preset.schedule == flags.schedule


@pytest.mark.parametrize(("cp_size", "multiple"), [(None, 128), (1, 128), (4, 128), (32, 32)])
def test_round_to_auto_fits_the_layout_and_says_so(
    cp_size: int | None, multiple: int, caplog: pytest.LogCaptureFixture
) -> None:
    layout = {} if cp_size is None else {"context_parallel_size": cp_size}  # chunks of 2048 / 2 cp
    with caplog.at_level(logging.INFO):
        config = configure("--skyladder-round-to auto", **layout)
    assert config.schedule.round_to == multiple
    assert f"rounded to {multiple}" in config.fingerprint
    assert f"auto is {multiple}, the largest number that divides" in caplog.text


def test_round_to_auto_leaves_given_windows_alone(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        config = configure("--skyladder-preset shortformer --skyladder-round-to auto")
    assert config.schedule.round_to is None
    assert "has no effect" in caplog.text
    assert "auto is" not in caplog.text


def test_round_to_takes_a_number_or_auto(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--skyladder-round-to always")
    assert "'always' is neither a number, nor auto or pow2" in capsys.readouterr().err


# --- the fingerprint ----------------------------------------------------------------------------


def test_fingerprint_names_what_decides_the_mask() -> None:
    assert configure("--skyladder-schedule linear").fingerprint == (
        "linear 32 -> 2048, fraction 0.64 of 1000 steps; step of 128 samples; local mask; "
        "documents not masked"
    )
    assert configure(
        "--skyladder-alpha 1/2 --skyladder-intra-document --skyladder-mask sliding "
        "--skyladder-begin-samples 1280",
        train_iters=100_000,
    ).fingerprint == (
        "linear 32 -> 2048, alpha 1/2; step of 128 samples; from sample 1280; sliding mask; "
        "documents masked"
    )


@pytest.mark.parametrize(
    "change",
    [
        "--skyladder-schedule sinusoidal",
        "--skyladder-start-window 8",
        "--skyladder-round-to 64",
        "--skyladder-final-window 1024",
        "--skyladder-expand-fraction 0.6400001",
        "--skyladder-alpha 4",
        "--skyladder-intra-document",
        "--skyladder-mask sliding",
        "--skyladder-begin-samples 128",
    ],
)
def test_whatever_changes_the_mask_changes_the_fingerprint(change: str) -> None:
    plain = configure("--skyladder-schedule linear")
    assert configure(change).fingerprint != plain.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        "--skyladder-attention-backend sdpa",
        "--skyladder-no-probe",
        "--skyladder-allow-unfinished",
        "--skyladder-allow-schedule-change",
    ],
)
def test_what_does_not_change_the_mask_keeps_the_fingerprint(change: str) -> None:
    plain = configure("--skyladder-schedule linear")
    assert configure(change).fingerprint == plain.fingerprint


# --- what is refused, and what is said ----------------------------------------------------------

REFUSED = [
    ("--skyladder-schedule cosine", "--skyladder-schedule=cosine is unknown. Choose one of: con"),
    ("--skyladder-preset 7b", "--skyladder-preset=7b is unknown. Choose one of: 120m-8k"),
    ("--skyladder-mask dense", "--skyladder-mask=dense is unknown. Choose one of: local, sliding."),
    (
        "--skyladder-attention-backend triton",
        "--skyladder-attention-backend=triton is unknown. Choose one of: auto, te, ",
    ),
    (
        "--skyladder-final-window 4096",
        "--skyladder-final-window=4096 is above --seq-length=2048. A window cannot be longer",
    ),
    (
        "--skyladder-preset 1b-8k",
        "--skyladder-final-window=8192 (set by --skyladder-preset=1b-8k) is above --seq-length",
    ),
    (
        "--skyladder-start-window 4096",
        "--skyladder-start-window=4096 is above the final window of 2048",
    ),
    ("--skyladder-start-window 0", "--skyladder-start-window=0 is not a window"),
    ("--skyladder-final-window 0", "--skyladder-final-window=0 is not a window"),
    ("--skyladder-alpha 0", "--skyladder-alpha=0.0 never reaches the final window of 2048 tokens."),
    ("--skyladder-alpha=-1", "--skyladder-alpha=-1.0 never reaches the final window of 2048"),
    (
        "--skyladder-alpha 1 --skyladder-expand-fraction 0.5",
        "--skyladder-alpha=1 and --skyladder-expand-fraction=0.5 both set the rate",
    ),
    (
        "--skyladder-require-documents",
        "--skyladder-require-documents is about documents that are to be masked. Add "
        "--skyladder-intra-document",
    ),
    ("--skyladder-expand-fraction 1.2", "--skyladder-expand-fraction=1.2 is not a share"),
    ("--skyladder-round-to 0", "--skyladder-round-to=0 is not a multiple"),
    ("--skyladder-schedule cyclic --skyladder-cycles 0", "--skyladder-cycles=0: give at least 1"),
    ("--skyladder-schedule staged", "--skyladder-schedule=staged needs --skyladder-stages"),
    (
        "--skyladder-stages 128:0.5 final:0.5",
        "--skyladder-stages is for --skyladder-schedule=staged, but the schedule is linear",
    ),
    (
        "--skyladder-schedule staged --skyladder-stages 128:0.5 final:0.4",
        "the shares of --skyladder-stages add up to 0.9",
    ),
    (
        "--skyladder-begin-samples=-1",
        "--skyladder-begin-samples=-1: give 0 or more consumed samples",
    ),
    (
        "--skyladder-begin-samples 128000",
        "--skyladder-begin-samples=128000 is not before the end of the run, which has 128000",
    ),
    (
        "--skyladder-alpha 1",  # 2,016 steps of growth in a run of 1,000
        "the schedule (linear 32 -> 2048, alpha 1) takes 2,016 steps, but the run has 1,000: it "
        "would end at a window of 1031. Give a higher --skyladder-alpha",
    ),
]


@pytest.mark.parametrize(("flags", "message"), REFUSED)
def test_refused(flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        config_from_args(parse(flags))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--skyladder-alpha fast", "'fast' is not a number such as 0.125 or 1/8"),
        ("--skyladder-alpha 1/0", "'1/0' is not a number such as 0.125 or 1/8"),
        ("--skyladder-expand-fraction nan", "'nan' is not a number such as 0.125 or 1/8"),
        ("--skyladder-stages 128", "'128' is not WINDOW:SHARE, such as 128:0.5"),
        ("--skyladder-stages half:0.5", "'half:0.5' is not WINDOW:SHARE, such as 128:0.5"),
        ("--skyladder-stages 128:1/0", "'128:1/0' is not WINDOW:SHARE, such as 128:0.5"),
        ("--skyladder-stages=-1:0.5", "'-1:0.5' is not WINDOW:SHARE, such as 128:0.5"),
        ("--skyladder-start-window 1.5", "'1.5' is not a whole number"),
    ],
)
def test_refused_by_the_parser(
    flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(flags)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("unfinished", ["", " --skyladder-allow-unfinished"])
def test_the_last_step_of_a_run_may_be_the_first_at_full_length(unfinished: str) -> None:
    """2,016 steps of growth fit a run of 2,016: there is no step after them, but they are done."""
    assert configure(f"--skyladder-alpha 1{unfinished}", train_iters=2016)


@pytest.mark.parametrize(
    ("flags", "unused"),
    [
        ("--skyladder-schedule constant --skyladder-alpha 1", ["alpha"]),
        (
            "--skyladder-schedule constant --skyladder-start-window 8 --skyladder-round-to 8 "
            "--skyladder-stages 8:1 --skyladder-expand-fraction 0.5",
            ["expand-fraction", "round-to", "stages", "start-window"],
        ),
        ("--skyladder-preset shortformer --skyladder-alpha 1", ["alpha"]),
        ("--skyladder-cycles 3", ["cycles"]),
        ("--skyladder-schedule cyclic --skyladder-cycles 3", []),
        ("--skyladder-preset recommended --skyladder-schedule constant", []),  # not given by hand
    ],
)
def test_flags_without_effect_are_named(
    flags: str, unused: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        configure(flags)
    assert [record.getMessage().split()[0] for record in caplog.records] == [
        f"--skyladder-{name}" for name in unused
    ]
    assert all("has no effect with --skyladder-schedule=" in r.message for r in caplog.records)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--skyladder-eval-lengths 512", "--skyladder-eval-lengths alone"),
        (
            "--skyladder-eval-lengths 512 --skyladder-attention-stats-interval 10",
            "--skyladder-attention-stats-interval and --skyladder-eval-lengths alone",
        ),
        ("--skyladder-eval-lengths 512 --skyladder-schedule constant", ""),
        ("--skyladder-eval-lengths 512 --skyladder-start-window 8", ""),
        ("--skyladder-intra-document", ""),
    ],
)
def test_figures_alone_warn_of_the_ladder(
    flags: str, named: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        configure(flags)
    said = [record.getMessage() for record in caplog.records if "default" in record.getMessage()]
    assert [text.partition(":")[0] for text in said] == ([named] if named else [])
    assert all("add --skyladder-schedule=constant" in text for text in said)


def test_help_names_the_choices() -> None:
    text = " ".join(add_arguments(argparse.ArgumentParser()).format_help().split())
    for name in (*MASKS, *BACKENDS, "linear", "staged", "cyclic-jump", "recommended", "1b-32k"):
        assert name in text
