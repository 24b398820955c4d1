"""What Bridge's users write, without Bridge: settings, overrides, names in messages, releases."""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder.continuation import Checkpoint
from megatron_skyladder.ladder.flags import add_arguments, batch_schedule, config_from_args
from megatron_skyladder.megatron_bridge import (
    command_line,
    overrides,
    refusals,
    releases,
    settings,
    spelling,
)
from megatron_skyladder.megatron_lm.releases import ALLOW_VARIABLE, MegatronMismatchError

RUN = SimpleNamespace(
    model=SimpleNamespace(
        seq_length=8192,
        context_parallel_size=1,
        num_layers=6,
        window_size=(127, 0),
        window_attn_skip_freq=6,
    ),
    train=SimpleNamespace(
        global_batch_size=512, micro_batch_size=1, train_samples=None, train_iters=1000
    ),
    logger=SimpleNamespace(log_interval=10),
)


def options(**given: Any) -> argparse.Namespace:
    return settings.options_of(RUN, settings.read(given))


@pytest.mark.parametrize(
    ("given", "flags"),
    [
        ({"start_window": 32}, "--skyladder-start-window 32"),
        ({"expand_fraction": 0.64}, "--skyladder-expand-fraction 0.64"),
        ({"alpha": "1/8", "allow_unfinished": True}, "--skyladder-alpha 1/8 "
         "--skyladder-allow-unfinished"),
        ({"preset": "1b-8k", "expand_fraction": 0.5}, "--skyladder-preset 1b-8k "
         "--skyladder-expand-fraction 0.5"),
        ({"schedule": "staged", "stages": ["512:0.5", "final:0.5"]},
         "--skyladder-schedule staged --skyladder-stages 512:0.5 final:0.5"),
        ({"schedule": "staged", "stages": "512:0.5 final:0.5"},
         "--skyladder-schedule staged --skyladder-stages 512:0.5 final:0.5"),
        ({"eval_lengths": [512, 4096], "start_window": 8}, "--skyladder-eval-lengths 512,4096 "
         "--skyladder-start-window 8"),
        ({"local_start_window": 8, "local_expand_fraction": 0.5},
         "--skyladder-local-start-window 8 --skyladder-local-expand-fraction 0.5"),
        ({"no_probe": True, "mask": "sliding"}, "--skyladder-no-probe --skyladder-mask sliding"),
    ],
)  # fmt: skip
def test_settings_mean_what_the_flags_mean(given: dict[str, Any], flags: str) -> None:
    parsed = add_arguments(argparse.ArgumentParser()).parse_args(flags.split())
    expected = config_from_args(settings.options_of(RUN, parsed))
    assert settings.config_of(options(**given)) == expected


def test_no_setting_is_the_papers_ladder() -> None:
    config = settings.config_of(options())
    assert [config.window_at_samples(512 * step) for step in (0, 640)] == [32, 8192]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"start_windw": 32}, r"skyladder.start_windw is no setting. Did you mean "
         r"skyladder.start_window\?"),
        ({"start-window": 32}, r"Did you mean skyladder.start_window\?"),
        ({"skyladder_mask": "local"}, r"Did you mean skyladder.mask\?"),
        ({"start_window": "many"}, "skyladder.start_window"),
        ({"start_window": 0}, r"skyladder.start_window=0"),
        ({"start_window": True}, "skyladder.start_window=True: it takes a value"),
        ({"intra_document": "yes"}, "skyladder.intra_document='yes': give true"),
        ({"final_window": 16384}, "skyladder.final_window=16384 is above model.seq_length=8192"),
        ({"attention_stats_interval": 15}, "multiple of logger.log_interval=10"),
        ({"alpha": 0.001}, "skyladder.expand_fraction=0.64"),
        ({"end_ladder": True}, "leave SkyLadder out"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused_in_bridges_words(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        settings.config_of(options(**given))
    assert "--" not in str(refused.value)


@pytest.mark.parametrize(
    ("layout", "ranks", "refused"),
    [("balanced", 2, True), ("balanced", 1, False), ("zigzag", 2, False), (None, 2, False)],
)
def test_a_layout_that_bridge_does_not_have_is_refused(
    layout: str | None, ranks: int, refused: bool
) -> None:
    asked = options(context_parallel_layout=layout)
    asked.context_parallel_size = ranks
    if not refused:
        return refusals.check_layout(asked)
    with pytest.raises(
        UsageError, match=r"skyladder.context_parallel_layout=balanced is not supported"
    ):
        refusals.check_layout(asked)


def test_what_a_checkpoint_keeps_is_plain_and_comes_back() -> None:
    given = options(start_window=32, stages=None, alpha="1/8", allow_unfinished=True)
    config = settings.config_of(given)
    kept = Checkpoint(config.fingerprint, 0, given).variables()
    assert all(isinstance(value, str) for value in kept.values())
    restored = Checkpoint.of_variables(kept, 512)
    assert restored.consumed_samples == 512
    assert restored.config() == config
    assert restored.flags() == {"start_window": 32, "alpha": "1/8"}


def test_a_checkpoint_without_our_variables_was_trained_without_us() -> None:
    assert Checkpoint.of_variables({"OTHER": 1}, 8).fingerprint is None


def test_a_fingerprint_tells_where_the_settings_cannot_be_read() -> None:
    kept = {"SKYLADDER_FINGERPRINT": "linear", "SKYLADDER_SETTINGS": "{"}
    checkpoint = Checkpoint.of_variables(kept, 8)
    assert (checkpoint.fingerprint, checkpoint.config()) == ("linear", None)


def test_overrides_are_taken_out() -> None:
    words = [
        "train.train_iters=1000",
        "skyladder.start_window=32",
        "+model.something=1",
        "skyladder.intra_document=true",
        "skyladder.stages=[512:0.5, 'final:0.5']",
        "skyladder.alpha='1/8'",
        "skyladder.preset=null",
    ]
    given, others = overrides.split(words)
    assert others == ["train.train_iters=1000", "+model.something=1"]
    assert given == {
        "start_window": "32",
        "intra_document": True,
        "stages": ["512:0.5", "final:0.5"],
        "alpha": "1/8",
        "preset": None,
    }


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("+skyladder.start_window=32", r"write skyladder.start_window=32, without \+"),
        ("++skyladder.start_window=32", r"write skyladder.start_window=32, without \+\+"),
        ("~skyladder.start_window", "without ~"),
        ("skyladder.start_windw=32", r"Did you mean skyladder.start_window\?"),
        ("skyladder=linear", "one setting at a time"),
        ("skyladder.start_window", "has no value"),
        ("+skyladder={start_window:32}", "without"),
        ("+skylader.start_window=32", r"did you mean skyladder.start_window=32\?"),
        ("+sky_ladder.start_window=32", r"did you mean skyladder.start_window=32\?"),
        ("+SkyLadder.start_window=32", r"did you mean skyladder.start_window=32\?"),
        ("+skyladder_start_window=32", r"did you mean skyladder.start_window=32\?"),
        ("--skyladder-start-window=32", "Write skyladder.start_window=32"),
        ("--skyladder-intra-document", "Write skyladder.intra_document=true"),
        ("+env_vars.SKYLADDER_START_WINDOW=8", "Write skyladder.start_window=8"),
    ],
)
def test_no_override_of_ours_is_lost(word: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        overrides.split(["train.train_iters=1", word])


def test_a_command_line_is_read() -> None:
    line = command_line.read(["--recipe", "mine:recipe", "skyladder.alpha=1", "train.seed=3"])
    assert (line.recipe, line.config_file) == ("mine:recipe", None)
    assert (line.settings, line.overrides) == ({"alpha": "1"}, ["train.seed=3"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["skyladder.alpha=1"], "--recipe"),
        (["--recipe", "r", "--lr", "1"], "--lr is unknown"),
        (["--recipe", "r", "--skyladder-alpha", "1"], "Write skyladder.alpha"),
        (["--recipe", "r", "skyladder.alpha=fast"], "skyladder.alpha"),
    ],
)
def test_a_command_line_that_cannot_be_read(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        command_line.read(words)


def test_a_setting_stands_once() -> None:
    with pytest.raises(UsageError, match="given twice"):
        overrides.split(["skyladder.alpha=1", "skyladder.alpha=2"])


def test_variables_are_refused() -> None:
    overrides.check_environment({"SKYLADDER_DEVICE": "cpu", "SKYLADDER_FINGERPRINT": "x"})
    with pytest.raises(UsageError, match=r"Write skyladder.start_window=8, and unset"):
        overrides.check_environment({"SKYLADDER_START_WINDOW": "8"})


@pytest.mark.parametrize(
    ("text", "translated"),
    [
        ("give --skyladder-alpha 175/12 instead", "give skyladder.alpha=175/12 instead"),
        ("--skyladder-allow-schedule-change.", "skyladder.allow_schedule_change=true."),
        ("--seq-length=128 is", "model.seq_length=128 is"),
        ("--attention-dropout 0", "model.attention_dropout=0"),
        (
            "--skyladder-intra-document. To look: skyladder inspect X --eod-id 3 --seq-length 8",
            "skyladder.intra_document=true. To look: skyladder inspect X --eod-id 3 --seq-length 8",
        ),
        ("no flag at all -- really", "no flag at all -- really"),
    ],
)
def test_messages_name_fields(text: str, translated: str) -> None:
    assert spelling.in_bridges_words(text) == translated


def test_every_flag_without_a_value_is_known_as_such() -> None:
    actions = add_arguments(argparse.ArgumentParser())._actions
    flags = [each.option_strings[0][2:] for each in actions if each.nargs == 0]
    ours = [flag for flag in flags if flag.startswith("skyladder-")]
    assert ours
    assert all(spelling.field_of(flag).endswith("=true") for flag in ours)


def test_releases(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv(ALLOW_VARIABLE, raising=False)
    releases.check("0.6.0")
    releases.check("0.6.2")
    with pytest.raises(MegatronMismatchError, match="not installed"):
        releases.check(None)
    with pytest.raises(MegatronMismatchError, match=f"0.7.0 is not among.*{ALLOW_VARIABLE}=1"):
        releases.check("0.7.0")
    monkeypatch.setenv(ALLOW_VARIABLE, "1")
    releases.check("0.7.0")
    assert "0.7.0 is untested" in caplog.text


def test_stages_that_set_more_than_windows_are_refused() -> None:
    from megatron_skyladder.megatron_bridge.refusals import check_stages

    def config(stages: str) -> Any:
        given = options(schedule="staged", stages=stages)
        given.train_samples, given.train_iters = 1600, None
        given.step_batch_size_schedule = batch_schedule(given)
        return settings.config_of(given)

    check_stages(config("8..64:0.5 final:rest"))
    with pytest.raises(UsageError) as refused:
        check_stages(config("8:0.5,batch=x1,lr=1,rope=9,yarn=4 final:rest"))
    reasons = str(refused.value).splitlines()
    assert [line.split(",")[0] for line in reasons[:4]] == [
        f"skyladder.stages sets {name}" for name in ("batch", "lr", "rope", "yarn")
    ]
    assert "let the stages set windows alone" in reasons[4]
