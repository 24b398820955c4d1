"""Stages: windows, batches, rates and bases worked out by hand; how they are read and refused."""

from __future__ import annotations

import argparse
import math
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder.batch_sizes import BatchSizes
from megatron_skyladder.ladder.clock import Clock
from megatron_skyladder.ladder.config import SkyLadderConfig
from megatron_skyladder.ladder.continuation import Checkpoint, goes_on, rotary_reached
from megatron_skyladder.ladder.flags import (
    add_arguments,
    batch_schedule,
    config_from_args,
    keep_stages,
)
from megatron_skyladder.ladder.presets import SCHEDULE_PRESETS
from megatron_skyladder.ladder.schedules import Rotary, Stage, Staged, StageValues
from megatron_skyladder.planning import stage_plan

SEQ_LENGTH = 64


def launch(stages: str, **megatron: Any) -> argparse.Namespace:
    """Return the arguments of a run of 64 sequences of 64 tokens in batches of 8."""
    flags = f"--skyladder-schedule staged --skyladder-stages {stages}"
    args = add_arguments(argparse.ArgumentParser()).parse_args(flags.split())
    given = {
        "seq_length": SEQ_LENGTH,
        "global_batch_size": 8,
        "train_samples": 64,
        "train_iters": None,
        "step_batch_size_schedule": None,
        "log_interval": 1,
        "consumed_train_samples": 0,
    }
    vars(args).update(given | megatron)
    return args


def configured(stages: str, **megatron: Any) -> SkyLadderConfig:
    """Return the configuration, with the batches that it asks for."""
    args = launch(stages, **megatron)
    args.step_batch_size_schedule = args.step_batch_size_schedule or batch_schedule(args)
    config = config_from_args(args)
    assert config is not None
    return config


def refusal(stages: str, **megatron: Any) -> str:
    with pytest.raises(UsageError) as error:
        config_from_args(launch(stages, **megatron))
    return str(error.value)


# --- by hand --------------------------------------------------------------------------------------

ALL_FOUR = (
    "8..32:0.5,batch=4,lr=1,rope=10000 ..64:0.25,batch=8,lr=sqrt final:rest,lr=0.5,rope=500000"
)


def test_a_table_that_moves_all_four() -> None:
    """A step is the last batch, 8 samples; the first 32 samples are in batches of 4."""
    config = configured(ALL_FOUR)
    assert config.step_samples == 8
    assert config.batches == BatchSizes(((0, 4), (32, 8)))
    # 8 + 24 s/4 over four steps, 32 + 32 s/2 over two
    windows = {0: 8, 4: 8, 8: 14, 16: 20, 28: 26, 32: 32, 40: 48, 48: 64, 56: 64, 640: 64}
    assert {at: config.window_at_samples(at) for at in windows} == windows
    first = StageValues(4, 1.0, 10_000)
    middle = StageValues(8, math.sqrt(2), 10_000)
    last = StageValues(8, 0.5, 500_000)
    values = {0: first, 31: first, 32: middle, 47: middle, 48: last, 640: last}
    assert {at: config.values_at_samples(at) for at in values} == values
    assert config.schedule.moves() == {"batch", "rate_factor", "rope"}
    assert config.fingerprint.startswith(
        "staged 8..32:0.5,batch=4,lr=1,rope=10000 32..64:0.25,batch=8,lr=2^0.5,rope=10000 "
        "64:0.25,batch=8,lr=0.5,rope=500000 of 8 steps; step of 8 samples"
    )


@pytest.mark.parametrize(
    ("stages", "windows"),
    [
        ("8:0.5 final:0.5", "8 8 8 8 64 64 64 64"),
        ("8:1024tokens final:rest", "8 8 64 64 64 64 64 64"),  # a step has 512 tokens
        ("8:1.024K 16:0.25 final:rest", "8 8 16 16 64 64 64 64"),
        ("64..8:0.5 final:rest", "64 50 36 22 64 64 64 64"),
        ("8..final:1", "8 15 22 29 36 43 50 57"),
        ("8:rest ..final:0.5", "8 8 8 8 8 22 36 50"),
        ("8:1/3 final:2/3", "8 8 8 64 64 64 64 64"),  # 2 2/3 steps
        ("4..34:0.4 34:0.2 ..64:0.4", "4 13 22 32 34 35 45 54"),  # 3.2 and 1.6 steps
    ],
)
def test_windows(stages: str, windows: str) -> None:
    schedule = configured(stages).schedule
    expected = list(map(int, windows.split()))
    assert [schedule.window_at(step) for step in range(8)] == expected
    assert schedule.windows(0, 10).tolist() == [*expected, 64, 64]
    assert schedule.moves() == set() and schedule.values_at(3) == StageValues()


@pytest.mark.parametrize(
    ("stages", "steps"),
    [
        ("8:0.5 final:0.5", 4),
        ("8..final:1", 8),
        ("8:rest ..final:0.5", 8),
        ("8:1/3 final:2/3", 8 / 3),
    ],
)
def test_windows_move_until_the_last_stage_or_to_the_end_of_it(stages: str, steps: float) -> None:
    assert float(configured(stages).schedule.ramp_steps) == steps


def test_only_windows_that_grow_are_rounded() -> None:
    args = launch("24:0.25 ..56:0.5 final:rest")
    args.skyladder_round_to = "pow2"
    config = config_from_args(args)
    assert config
    assert [config.schedule.window_at(step) for step in range(8)] == [
        24,
        24,
        24,
        32,
        32,
        32,
        64,
        64,
    ]
    assert config.schedule.windows(0, 8).tolist() == [24, 24, 24, 32, 32, 32, 64, 64]
    assert config.fingerprint.split(";")[0].endswith("of 8 steps, rounded to powers of two")


YARN = "8:0.5 16:0.25,rope=20000,yarn=4 final:rest,yarn=2.5"


def test_a_table_that_moves_yarn() -> None:
    config = configured(YARN, position_embedding_type="yarn")
    first, middle = StageValues(), StageValues(None, None, 20_000, 4.0)
    last = StageValues(None, None, 20_000, 2.5)
    values = {0: first, 31: first, 32: middle, 47: middle, 48: last, 640: last}
    assert {at: config.values_at_samples(at) for at in values} == values
    assert config.schedule.moves() == {"rope", "yarn"}
    assert config.fingerprint.startswith(
        "staged 8:0.5 16:0.25,rope=20000,yarn=4 64:0.25,rope=20000,yarn=2.5 of 8 steps"
    )
    args = launch(YARN, position_embedding_type="yarn", skyladder_fingerprint=config.fingerprint)
    for consumed, reached in ((32, Rotary()), (40, Rotary(20_000, 4.0)), (64, Rotary(20_000, 2.5))):
        args.consumed_train_samples = consumed
        assert rotary_reached(args) == reached
    other = configured(YARN.replace("2.5", "3"), position_embedding_type="yarn")
    assert goes_on(config, other, args, 64) and not goes_on(config, other, args, 40)


def test_yarn_needs_a_model_that_has_it() -> None:
    said = refusal(YARN, position_embedding_type="rope")
    assert "sets yarn, but --position-embedding-type=rope has no factor. Give --position" in said
    assert "which Megatron has from 0.19 on" in said
    said = refusal(YARN, position_embedding_type="rope", multi_latent_attention=True)
    assert "in --multi-latent-attention the softmax's scale is made of YaRN's factor" in said


def test_batches_that_follow_the_runs_first() -> None:
    config = configured("final:0.5 final:0.25,batch=x2 final:0.25,batch=x1.5", global_batch_size=4)
    assert config.batches == BatchSizes(((0, 4), (36, 8), (48, 12)))  # 64 // 12 = 5 steps of 12
    # so at steps of 2.5 and 3.75: the third and the fourth
    assert config.step_samples == 12


def test_the_rates_root_follows_the_batch() -> None:
    """Twice the batch twice is a rate of 2, not of the rounded square of a rounded root."""
    stages = "final:0.5,batch=1,lr=1 final:0.25,batch=x2,lr=sqrt final:rest,batch=x2,lr=sqrt"
    schedule = configured(stages).schedule
    factors = [schedule.values_at(step).rate_factor for step in (0, 8, 12)]
    assert factors == [1.0, math.sqrt(2), 2.0]
    assert "lr=2^0.5" in schedule.describe() and "lr=2 " in schedule.describe()


def test_a_schedule_that_begins_later() -> None:
    args = launch("8:0.5,batch=4,rope=10000 final:0.5,batch=8,rope=20000", train_samples=80)
    args.skyladder_begin_samples = 16
    args.step_batch_size_schedule = batch_schedule(args)
    assert args.step_batch_size_schedule == "0:4 3072:8"  # from sample 16 + 32 on
    config = config_from_args(args)
    assert config
    assert (
        config.values_at_samples(0) == config.values_at_samples(47) == StageValues(4, None, 10_000)
    )
    assert config.values_at_samples(48) == StageValues(8, None, 20_000)


# --- reading --------------------------------------------------------------------------------------

FILE = """
[short]
window = 8..32
share = 0.5
batch = 4
lr = 1
rope = 10000

[longer]
window = ..64
tokens = 1024
batch = 8
lr = sqrt

[full]
window = final
share = rest
lr = 0.5
rope = 500000
"""
YARN_FILE = """
[short]
window = 8
share = 0.5

[longer]
window = 16
share = 0.25
rope = 20000
yarn = 4

[full]
window = final
share = rest
yarn = 5/2
"""


def test_a_file_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / "stages.ini"
    path.write_text("\ufeff" + FILE, encoding="utf-8")  # as some editors save it
    assert configured(str(path)) == configured(ALL_FOUR)
    path.write_text(FILE)
    assert configured(str(path)) == configured(ALL_FOUR)
    args = launch(str(path), step_batch_size_schedule="0:4 2048:8")
    config = config_from_args(args)
    assert config
    keep_stages(args, config)
    path.unlink()
    assert config_from_args(args) == config  # what a checkpoint carries needs no file
    assert args.skyladder_stages[1] == "32..64:0.25,batch=8,lr=2^0.5,rope=10000"
    path.write_text(YARN_FILE)
    given = {"position_embedding_type": "yarn"}
    assert configured(str(path), **given) == configured(YARN, **given)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "window = ..64",
            "",
            r"\[longer\]: give a window, and either a share of the run or tokens",
        ),
        ("tokens = 1024", "tokens = 1024\nshare = 1", "either a share of the run or tokens"),
        ("batch = 8", "size = 8", "size is no setting. There are: window, share, tokens, batch"),
        ("rope = 10000", "rope = big", r"\[short\]: .*rope=big is not a base of the rotary"),
        ("[full]", "[short]", "cannot be read: .*already exists"),
        (FILE, "", "has no stages"),
    ],
)
def test_a_file_that_is_wrong(tmp_path: Path, old: str, new: str, said: str) -> None:
    path = tmp_path / "stages.ini"
    path.write_text(FILE.replace(old, new))
    with pytest.raises(ValueError, match=said):
        Staged.settings()["stages"].value([str(path)])
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        Staged.settings()["stages"].value([str(tmp_path / "none.ini")])


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("128", "'128' is not WINDOW:SHARE, such as 128:0.5, 128..2048:0.5"),
        ("128:0.5B5", "is not WINDOW:SHARE"),
        ("128:0.3tokens", "is not WINDOW:SHARE"),
        ("..:0.3", "is not WINDOW:SHARE"),
        ("8:1,", "sets nothing: behind WINDOW:SHARE there may be batch=SAMPLES, lr=FACTOR"),
        ("8:1,rate=1", "sets rate: behind WINDOW:SHARE"),
        ("8:1,lr=1,lr=2", "sets lr twice"),
        ("8:1,lr=0", "lr=0 is not a factor on the learning rate"),
        ("8:1,lr=2^0.3", "lr=2.0.3 is not a factor"),
        ("8:1,batch=0", "batch=0 is not a number of samples"),
        ("8:1,batch=x0", "batch=x0 is not a number of samples"),
        ("8:1,rope=1", "rope=1 is not a base"),
        ("8:1,yarn=0.5", "yarn=0.5 is not a scaling factor of YaRN, 1 or more, such as 4"),
        ("8:1,yarn=4x", "yarn=4x is not a scaling factor"),
        ("8:1,yarn=2,yarn=4", "sets yarn twice"),
    ],
)
def test_a_word_that_is_wrong(word: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Staged.settings()["stages"].value([word])


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ("..8:0.5 final:0.5", "begins with ..8:0.5, and there is no window before it"),
        ("8:rest final:rest", "has 2 stages of the rest. One stage can take it"),
        (
            "8:1 final:rest",
            "leaves nothing to the stage of the rest: the others take 1 times the run",
        ),
        ("8:1M final:rest", "the others take 244.1 times the run, which has 4,096 tokens"),
        ("8:0.5 final:0.4", "add up to 0.9"),
        ("8:0.5,lr=sqrt final:0.5", "lr=sqrt follows the batch, and no stage sets one"),
        ("8:0.5,batch=x2 final:0.5", "begins with x2 of the batch before, and there is none"),
        ("8:0.5 final:0.5,batch=x1.3", "x1.3 of a batch of 8 is no whole number of samples"),
        (
            "8:0.5,batch=8 final:0.5,batch=4",
            "--skyladder-stages goes from a batch of 8 samples to one of 4, and Megatron stops "
            "where batches shrink. Give the later stage batch=8 or more, or the one before it "
            "batch=4 or less.",
        ),
        ("8:0.4 16:0.3,batch=x2 final:rest,batch=x0.5", "from a batch of 16 samples to one of 8"),
        ("8..100:0.5 final:0.5", "Windows lie between 1 and the final window of 64"),
        ("0..8:0.5 final:0.5", "is not WINDOW:SHARE"),
    ],
)
def test_a_table_that_is_wrong(stages: str, said: str) -> None:
    try:
        assert said in refusal(stages)
    except SystemExit:  # the parser has said it
        assert said == "is not WINDOW:SHARE"


def test_what_needs_a_run_says_so() -> None:
    with pytest.raises(UsageError, match="stages in tokens need to know a step's"):
        Staged(final_window=64, stages="8:1K final:rest", total_steps=8)
    with pytest.raises(
        UsageError, match="relative to the run's first one, which is not known here"
    ):
        Staged(final_window=64, stages="8:0.5,batch=x1 final:rest", total_steps=8)
    with pytest.raises(UsageError, match="give up to 1000"):
        Staged(final_window=64, stages=(Stage(64, Fraction(1, 2000)),) * 2000, total_steps=8)


# --- Megatron's batches -------------------------------------------------------------------------


def test_megatron_has_to_make_the_batches() -> None:
    said = refusal(ALL_FOUR)
    assert "--skyladder-stages sets batches, and the flag is not there" in said
    assert "Give --step-batch-size-schedule '0:4 2048:8', without --global-batch-size" in said
    said = refusal(ALL_FOUR, step_batch_size_schedule="0:4 1024:8")
    assert "the flag says '0:4 1024:8'" in said
    config = config_from_args(launch(ALL_FOUR, step_batch_size_schedule="2.048K:8,0:4"))
    assert config and config.batches == BatchSizes(((0, 4), (32, 8)))


def test_a_release_without_the_flag_is_named() -> None:
    args = launch(ALL_FOUR)
    del args.step_batch_size_schedule
    with pytest.raises(UsageError, match=r"Megatron 0\.17\.1 has no such flag: .* from 0\.18 on"):
        config_from_args(args, "Megatron 0.17.1")


def test_the_length_has_to_be_in_samples() -> None:
    said = refusal(ALL_FOUR, train_samples=None, train_iters=12)
    assert "with --train-iters Megatron decays the learning rate over iterations times" in said


def test_one_batch_for_all_is_the_global_batch() -> None:
    config = config_from_args(launch("8:0.5,batch=8 final:rest", global_batch_size=8))
    assert config and config.batches == BatchSizes(((0, 8),))


def test_a_stage_without_a_step_has_no_batch_that_shrinks() -> None:
    config = configured("8:0.51,batch=8 32:0.01,batch=2 final:rest,batch=8")
    assert config.batches == BatchSizes(((0, 8),))


@pytest.mark.parametrize(
    ("consumed", "ahead"),
    [
        (0, ((0, 4), (32, 6), (50, 8))),
        (31, ((0, 4), (32, 6), (50, 8))),
        (32, ((32, 6), (50, 8))),
        (49, ((32, 6), (50, 8))),
        (50, ((50, 8),)),
        (10**6, ((50, 8),)),
    ],
)
def test_batches_ahead(consumed: int, ahead: tuple[tuple[int, int], ...]) -> None:
    assert BatchSizes(((0, 4), (32, 6), (50, 8))).ahead(consumed) == ahead


@given(st.data())
def test_batch_sizes_are_those_of_a_run(data: st.DataObject) -> None:
    """Against a run that is counted batch by batch, also where a stage begins in mid-batch."""
    stages = [(0, data.draw(st.integers(1, 9)))]
    for _ in range(data.draw(st.integers(0, 3))):
        start = stages[-1][0] + data.draw(st.integers(1, 40))
        stages.append((start, data.draw(st.integers(1, 9))))
    sizes = BatchSizes(tuple(stages))
    consumed = 0
    for number in range(40):
        assert sizes.samples_in(number) == consumed
        assert sizes.batches_in(consumed) == number
        after = consumed + [size for start, size in stages if consumed >= start][-1]
        assert sizes.latest_start(after) == consumed
        consumed = after
    assert sizes.latest_start(0) == 0


# --- properties -----------------------------------------------------------------------------------


@st.composite
def tables(draw: st.DrawFn) -> str:
    """Any table, as words."""
    num_stages = draw(st.integers(1, 4))
    words = []
    for index in range(num_stages):
        window = str(draw(st.integers(1, 64)))
        if draw(st.booleans()):
            window = f"{draw(st.integers(1, 64))}..{window}"
        if index == num_stages - 1:
            window = draw(st.sampled_from(["final", "..final" if index else "1..final"]))
        extent = (
            "rest"
            if index == num_stages - 1
            else draw(st.sampled_from(["0.1", "1/7", "512tokens", "700tokens"]))
        )
        word = f"{window}:{extent}"
        if draw(st.booleans()):
            word += f",batch={draw(st.sampled_from(['2', '4', '8', 'x1', 'x2']))},lr=sqrt"
        elif draw(st.booleans()):
            word += f",lr={draw(st.sampled_from(['0.3', '2^0.5', '1/3']))}"
        if draw(st.booleans()):
            word += f",rope={draw(st.integers(2, 10**9))}"
        words.append(word)
    return " ".join(words)


@given(tables(), st.integers(0, 600))
def test_everything_changes_with_the_same_batch(stages: str, samples: int) -> None:
    """At the first step of a stage, and nowhere else; text and value say the same."""
    try:
        config = configured(stages, train_samples=512)
    except UsageError as error:
        assert re.search(
            "lr=sqrt follows the batch|begins with x2 of the batch before|where batches shrink",
            str(error),
        )
        return
    schedule = config.schedule
    assert isinstance(schedule, Staged)
    step = config.step_at_samples(samples)
    (at,) = [index for index, first in enumerate(schedule.first_steps)
             if first <= step and step < min([*schedule.first_steps[index + 1:], 10**9])
             ] or [len(schedule.stages) - 1]  # fmt: skip
    values = config.values_at_samples(samples)
    assert values == schedule.stages[at].values
    if config.batches is not None:
        assert (
            values.batch == [size for start, size in config.batches.stages if start <= samples][-1]
        )
    first_batch = config.batches.stages[0][1] if config.batches else 8
    words = " ".join(map(str, schedule.stages))
    again = configured(words, train_samples=512, global_batch_size=first_batch)
    assert again.fingerprint == config.fingerprint
    assert schedule.windows(0, 70).tolist() == [schedule.window_at(each) for each in range(70)]


# --- evaluation, export, going on -----------------------------------------------------------------


def test_evaluation_has_the_base_of_the_latest_batch() -> None:
    now = [0]
    clock = Clock(configured(ALL_FOUR), lambda: now[0])
    for now[0], training, evaluating in (
        (0, 10_000, 10_000),
        (48, 500_000, 10_000),  # the next batch is of another stage
        (56, 500_000, 500_000),
    ):
        assert clock.rotary(training=True) == Rotary(training)
        assert clock.rotary(training=False) == Rotary(evaluating)


def test_a_batch_that_goes_past_the_end_of_its_stage_is_of_that_stage() -> None:
    """Batches of 6 begin at 0, 6, 12; the next stage begins at 16, so at the batch of 18."""
    config = configured("8:0.25,batch=6,rope=10000 final:rest,batch=8,rope=20000")
    assert config.batches == BatchSizes(((0, 6), (16, 8)))
    assert config.values_at_samples(12).rope == 10_000
    assert (
        config.values_of_latest(18).rope == 10_000 and config.values_at_samples(18).rope == 20_000
    )
    assert config.values_of_latest(26).rope == 20_000


def test_batches_that_begin_between_two_steps() -> None:
    """Steps begin at 2, 10, ..., the second stage at 34; batches at 0, 8, ..., 32."""
    stages = "8:0.5,rope=10000 final:rest,rope=20000"
    args = launch(stages, train_samples=66, skyladder_begin_samples=2)
    config = config_from_args(args)
    assert config
    bases = [config.values_at_samples(at).rope for at in (32, 33, 34, 40)]
    assert bases == [10_000, 10_000, 20_000, 20_000]
    assert config.values_of_latest(40).rope == 10_000  # trained from 32 on
    assert config.values_of_latest(48).rope == 20_000
    args.skyladder_fingerprint = config.fingerprint
    for args.consumed_train_samples, base in ((40, 10_000), (48, 20_000)):
        assert rotary_reached(args) == Rotary(base)


def test_batches_that_are_not_the_stages_own() -> None:
    """Batches of 4, of 8 from 48 on; a step is 8. The batch from 32 has the new base first."""
    stages = "8:0.5,rope=10000 final:rest,rope=20000"
    args = launch(stages, step_batch_size_schedule="0:4 3072:8", global_batch_size=4)
    config = config_from_args(args)
    assert config and config.batches is None and config.step_samples == 8
    args.skyladder_fingerprint = config.fingerprint
    for args.consumed_train_samples, base in ((32, 10_000), (36, 20_000), (40, 20_000)):
        assert rotary_reached(args) == Rotary(base)
    now = [32]
    clock = Clock(config, lambda: now[0])
    assert clock.window(training=True) == 64
    now[0] = 36  # the batch from 32 has been trained
    assert clock.rotary(training=False) == Rotary(20_000)


def test_the_latest_batch_of_a_run_resumed_with_another_batch() -> None:
    sizes = BatchSizes(((0, 4), (32, 8)))
    assert [sizes.latest_start(at) for at in (32, 40, 44, 52)] == [28, 32, 36, 44]
    assert BatchSizes(((0, 8),)).latest_start(12) == 4


def test_an_export_has_the_base_of_its_own_stage(tmp_path: Path) -> None:
    args = launch(ALL_FOUR, step_batch_size_schedule="0:4 2048:8")
    config = config_from_args(args)
    assert config
    for consumed, base in ((0, 10_000), (48, 10_000), (56, 500_000), (64, 500_000)):
        args.consumed_train_samples = consumed
        args.skyladder_fingerprint = config.fingerprint
        assert rotary_reached(args) == Rotary(base)
    args.skyladder_stages = ["gone.ini"]
    with pytest.raises(UsageError, match="what this checkpoint has reached is not known"):
        rotary_reached(args)
    assert rotary_reached(argparse.Namespace(rotary_base=7)) == Rotary()


@pytest.mark.parametrize(
    ("other", "goes"),
    [
        (ALL_FOUR, True),
        (ALL_FOUR.replace("lr=0.5", "lr=0.25"), False),
        (ALL_FOUR.replace("rope=500000", "rope=600000"), False),
        (ALL_FOUR.replace("..64:0.25", "..48:0.25"), False),
        (
            ALL_FOUR.replace("rope=10000", "rope=20000").replace("lr=sqrt", "lr=sqrt,rope=10000"),
            True,
        ),
    ],
)
def test_going_on_under_another_table(other: str, goes: bool) -> None:
    """From sample 32 on: what lies behind may be another."""
    options = launch(other, step_batch_size_schedule="0:4 2048:8")
    assert goes_on(configured(ALL_FOUR), configured(other), options, 32) is goes


def test_a_longer_run_under_a_table_in_tokens() -> None:
    """The same tokens are other shares, and the same table."""
    stages = "8:1024tokens,rope=10000 final:rest,rope=20000"
    options = launch(stages, train_samples=128)
    assert goes_on(configured(stages), configured(stages, train_samples=128), options, 8)


def test_the_flags_that_keep_a_table() -> None:
    from megatron_skyladder.ladder.continuation import flags_that_keep

    args = launch("8:0.5,lr=1,rope=10000 final:0.5,lr=2^0.5,rope=20000")
    config = config_from_args(args)
    assert config
    args.skyladder_fingerprint, args.consumed_train_samples = config.fingerprint, 8
    longer = launch("8:0.5,lr=1,rope=10000 final:0.5,lr=2^0.5,rope=20000", train_samples=128)
    kept = flags_that_keep(Checkpoint.of(args), longer)
    assert kept and kept["stages"] == ["8:0.25,lr=1,rope=10000", "64:0.75,lr=2^0.5,rope=20000"]


# --- presets --------------------------------------------------------------------------------------


def preset(name: str, batch: int, train_samples: int, seq_length: int = 8192) -> SkyLadderConfig:
    args = add_arguments(argparse.ArgumentParser()).parse_args([f"--skyladder-preset={name}"])
    args.seq_length, args.global_batch_size, args.train_iters = seq_length, batch, None
    args.train_samples, args.step_batch_size_schedule = train_samples, None
    args.step_batch_size_schedule = batch_schedule(args)
    config = config_from_args(args)
    assert config is not None
    return config


def test_critical_batch() -> None:
    """Doubled at 168B and 503B tokens (arXiv:2505.23971)."""
    config = preset("critical-batch", 1024, 75_000_000)
    assert config.batches is not None
    tokens = [start * 8192 for start, _ in config.batches.stages]
    assert tokens == pytest.approx([0, 168e9, 503e9], abs=4096 * 8192)
    assert [size for _, size in config.batches.stages] == [1024, 2048, 4096]
    rates = [config.values_at_samples(start).rate_factor for start, _ in config.batches.stages]
    assert rates == [1.0, math.sqrt(2), 2.0]


def test_seesaw() -> None:
    """Where cos(pi t / 2) has halved; rate x root of batch follows it (arXiv:2510.14717)."""
    config = preset("seesaw", 128, 1_280_000)
    assert config.batches is not None
    for halvings, (start, size) in enumerate(config.batches.stages):
        share = 2 / math.pi * math.acos(0.5**halvings)
        assert start / 1_280_000 == pytest.approx(share, abs=2e-3)
        factor = config.values_at_samples(start).rate_factor
        assert size == 128 * 2**halvings
        assert factor == pytest.approx(0.5 ** (halvings / 2)) and factor is not None
        assert factor / math.sqrt(size / 128) == pytest.approx(0.5**halvings)


def test_modded_nanogpt() -> None:
    config = preset("modded-nanogpt", 8, 24_000)
    found = [
        (config.window_at_samples(at), *list(vars(config.values_at_samples(at)).values())[:3])
        for at in (0, 8_016, 16_008)
    ]
    assert found == [(384, 8, 1.0, None), (896, 16, 1.52, None), (1408, 24, 1.73, None)]


def test_extend_context_stages() -> None:
    config = preset("extend-context-stages", 8, 8_000, 131_072)
    found = [(config.window_at_samples(at), config.values_at_samples(at).rope)
             for at in (0, 3_992, 4_000, 6_400)]  # fmt: skip
    assert found == [
        (4096, 10_000), (4096, 10_000), (32_768, 1_000_000), (131_072, 10_000_000),
    ]  # fmt: skip


def test_the_papers_own_rounding() -> None:
    """max(32, 1024 floor((32 + step / 2) / 1024))."""
    schedule = preset("1b-32k-stepwise", 32, 3_200_000, 32_768).schedule
    found = [schedule.window_at(step) for step in (0, 1983, 1984, 4031, 4032, 65_472)]
    assert found == [32, 32, 1024, 1024, 2048, 32_768]


def test_a_preset_that_needs_to_be_known_says_so(caplog: pytest.LogCaptureFixture) -> None:
    preset("seesaw", 128, 1_280_000)
    assert "--skyladder-preset=seesaw: it stands in the place of a decay" in caplog.text
    for name, each in SCHEDULE_PRESETS.items():
        moves_all = "rope=" in each.settings.get("stages", "")
        assert not moves_all or "not been measured" in each.note, name


def test_a_stage_that_would_begin_after_the_run_is_left_out() -> None:
    """Sample 2 lies between batches of 4: of six batches the last begins at 20, the stage at 22."""
    schedule = Staged(stages="8:0.5 64:0.5", final_window=64, total_steps=10)
    config = SkyLadderConfig(schedule, seq_length=64, step_samples=4, begin_samples=2)
    assert [config.window_at_samples(at) for at in (16, 20, 24)] == [8, 8, 64]
    assert [row.samples for row in stage_plan.rows(config, 6)] == [2]
    assert [row.samples for row in stage_plan.rows(config, 7)] == [2, 22]
