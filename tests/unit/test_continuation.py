"""Which flags keep the windows of a checkpoint, and when nothing has to be changed."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder.continuation import Checkpoint, flags_that_keep, goes_on
from megatron_skyladder.ladder.flags import FINGERPRINT, add_arguments, config_from_args

RUN = {
    "seq_length": 64,
    "global_batch_size": 4,
    "train_iters": 6,
    "train_samples": None,
    "context_parallel_size": 1,
}


def run(flags: str, **megatron: Any) -> argparse.Namespace:
    """Return Megatron's arguments of a run of six steps of four samples."""
    args = add_arguments(argparse.ArgumentParser()).parse_args(flags.split())
    vars(args).update(RUN | megatron)
    return args


def checkpoint(flags: str, consumed: int, **megatron: Any) -> Checkpoint:
    args = run(flags, consumed_train_samples=consumed, **megatron)
    config = config_from_args(args)
    assert config is not None
    setattr(args, FINGERPRINT, config.fingerprint)
    return Checkpoint.of(args)


def kept(saved: Checkpoint, options: argparse.Namespace) -> dict[str, Any] | None:
    """Return what has to be given; what has to be left out is left out."""
    flags = flags_that_keep(saved, options)
    return None if flags is None else {k: v for k, v in flags.items() if v is not None}


START = "--skyladder-start-window 8"
STAGED = "--skyladder-schedule staged --skyladder-stages 8:0.5 final:0.5"
POINTS = "--skyladder-schedule points --skyladder-points 0:8 0.5:16 1:final"
SHARE = f"{START} --skyladder-expand-fraction 0.64"
CONSTANT = "--skyladder-schedule constant"
FROM_8 = "--skyladder-begin-samples 8"


@pytest.mark.parametrize(
    ("flags", "other", "consumed", "megatron", "expected"),
    [
        # 56 tokens in 0.64 x 6 steps; by hand: 56 / 3.84 = 175 / 12
        (START, START, 24, {"train_iters": 12}, {"alpha": "175/12"}),
        (SHARE, SHARE, 24, {"train_iters": 12}, {"alpha": "175/12"}),
        # the same samples in batches twice as large: twice the rate
        (f"{START} --skyladder-alpha 20", None, 8, {"train_iters": 3, "global_batch_size": 8},
         {"alpha": "40"}),
        (START, START, 8, {"train_iters": 3, "global_batch_size": 8}, {"alpha": "175/6"}),
        # a cycle has two legs, so 2 x 2 x 56 tokens in 3.84 steps
        (f"{START} --skyladder-schedule cyclic", None, 8, {"train_iters": 12}, {"alpha": "175/3"}),
        ("--skyladder-schedule sinusoidal", None, 4, {"train_iters": 9}, {"alpha": "25/3"}),
        ("--skyladder-preset recommended", None, 8, {"train_iters": 12}, {"alpha": "175/12"}),
        # half of 6 steps is a quarter of 12
        ("--skyladder-schedule staged --skyladder-stages 8:0.5 final:0.5", None, 8,
         {"train_iters": 12}, {"stages": ["8:0.25", "64:0.75"]}),
        ("--skyladder-preset shortformer", None, 8, {"train_iters": 12, "seq_length": 256},
         {"stages": ["128:0.25", "256:0.75"]}),
        ("--skyladder-schedule points --skyladder-points 0:8 0.5:16 1:final", None, 8,
         {"train_iters": 12}, {"points": ["0:8", "1/4:16", "1/2:64"]}),
        # shorter: what does not come to its end has to be allowed
        (f"{START} --skyladder-expand-fraction 1", None, 8, {"train_iters": 3},
         {"alpha": "28/3", "allow_unfinished": True}),
        # other flags altogether: those of the checkpoint
        (START, "--skyladder-preset recommended --skyladder-schedule sinusoidal", 8,
         {"train_iters": 12}, {"start_window": 8, "alpha": "175/12"}),
        (f"{START} --skyladder-mask sliding --skyladder-intra-document", START, 8, {},
         {"start_window": 8, "mask": "sliding", "intra_document": True, "alpha": "175/12"}),
        # a ladder that begins at sample 8: half of four steps is a quarter of eight
        (f"{STAGED} {FROM_8}", None, 8, {"train_iters": 10}, {"stages": ["8:0.25", "64:0.75"]}),
        (f"{START} --skyladder-expand-fraction 1 {FROM_8}", None, 8, {"train_iters": 10},
         {"alpha": "14"}),
    ],
)  # fmt: skip
def test_the_flags_that_keep_the_windows(
    flags: str, other: str | None, consumed: int, megatron: dict[str, Any], expected: dict[str, Any]
) -> None:
    before = {key: value for key, value in megatron.items() if key == "seq_length"}
    saved = checkpoint(flags, consumed, **before)
    options = run(other or flags, **megatron)
    assert kept(saved, options) == expected
    changed = flags_that_keep(saved, options)
    assert changed is not None
    vars(options).update({f"skyladder_{name}": value for name, value in changed.items()})
    config, was = config_from_args(options), saved.config()
    assert config is not None and was is not None
    end = options.train_iters * options.global_batch_size
    for at in range(consumed, end, options.global_batch_size):  # the slow way
        assert config.window_at_samples(at) == was.window_at_samples(at)


def test_which_rank_holds_which_token_may_change() -> None:
    zigzag = f"{START} --skyladder-context-parallel-layout zigzag"
    for saved, other in ((START, zigzag), (zigzag, START)):
        options = run(f"{other} --skyladder-schedule sinusoidal", train_iters=12)
        changed = flags_that_keep(checkpoint(saved, 8), options)
        assert changed is not None and "context_parallel_layout" not in changed


@given(
    st.sampled_from(["linear", "sinusoidal", "exponential", "stepwise", "cyclic", "reversed"]),
    st.fractions(min_value=0, max_value=1, max_denominator=1000).filter(bool),
    st.integers(10, 60),
    st.integers(10, 120),
    st.sampled_from([2, 4, 8, 12]),
)
def test_any_ramp_can_be_kept(
    schedule: str, share: Any, steps: int, longer: int, batch: int
) -> None:
    flags = f"{START} --skyladder-schedule {schedule} --skyladder-expand-fraction {share}"
    saved = checkpoint(flags, 24, train_iters=steps)
    options = run(flags, train_iters=longer, global_batch_size=batch)
    assert flags_that_keep(saved, options) is not None


def test_nothing_is_offered_that_does_not_keep_them() -> None:
    saved = checkpoint(START, 8)
    assert kept(saved, run(START, seq_length=128)) is None  # other rows
    early = checkpoint("--skyladder-schedule staged --skyladder-stages 8:0.5 final:0.5", 4)
    assert kept(early, run(START, train_iters=2)) is None  # the run ends before the last stage
    assert kept(checkpoint("--skyladder-schedule constant --skyladder-final-window 32", 8),
                run("--skyladder-schedule constant")) == {
        "schedule": "constant", "final_window": 32,
    }  # fmt: skip


def test_nothing_is_offered_where_the_checkpoints_schedule_is_not_sure() -> None:
    """Its flags mean something else today, or cannot be read any more."""
    saved = checkpoint(START, 8)
    setattr(saved.arguments, FINGERPRINT, "of another version")
    other = Checkpoint.of(saved.arguments)
    assert other.config() is None and kept(other, run(START, train_iters=12)) is None
    saved.arguments.skyladder_schedule = "forgotten"
    assert Checkpoint.of(saved.arguments).config() is None


@pytest.mark.parametrize(
    ("flags", "other", "consumed", "megatron", "same"),
    [
        (START, START, 24, {"train_iters": 12}, False),
        (START, f"{START} --skyladder-alpha 175/12", 0, {"train_iters": 12}, True),
        (START, START, 8, {"train_iters": 3, "global_batch_size": 8}, True),  # at its own batches
        (START, START, 8, {"train_iters": 12, "global_batch_size": 2}, True),  # and between
        (START, START, 8, {"train_iters": 11, "global_batch_size": 2}, False),
        (STAGED, STAGED, 4, {"train_iters": 3, "global_batch_size": 8}, True),
        (STAGED, STAGED, 4, {"train_iters": 12}, False),
        (POINTS, POINTS, 4, {"train_iters": 3, "global_batch_size": 8}, True),
        (POINTS, POINTS, 4, {"train_iters": 12}, False),
        (START, "--skyladder-schedule constant", 16, {}, True),  # the ladder has ended
        (START, "--skyladder-schedule constant", 12, {}, False),
        (START, f"{START} --skyladder-mask sliding", 20, {}, False),
        (START, f"{START} --skyladder-intra-document", 20, {}, False),
        (START, START, 20, {"seq_length": 128}, False),
        # batches that grow: 4 samples, 8 from sample 8 on; a step is the final batch
        (START, START, 8, {"step_batch_size_schedule": "0:4 512:8", "train_iters": 4}, True),
        (START, START, 8, {"step_batch_size_schedule": "0:4 512:8", "train_iters": 5}, False),
        # a ladder that begins later: the same ramp elsewhere, and 56 tokens in the four steps left
        (f"{START} --skyladder-alpha 14", f"{START} --skyladder-alpha 14 {FROM_8}", 12, {}, False),
        (f"{START} --skyladder-alpha 14 {FROM_8}",
         f"{START} --skyladder-expand-fraction 1 {FROM_8}", 0, {}, True),
        # its two steps end at sample 24, not at 8: until 16 it stands at 8 as well
        (f"{START} --skyladder-alpha 28 --skyladder-begin-samples 16",
         f"{CONSTANT} --skyladder-final-window 8", 4, {}, False),
        # other layers' states begin anew elsewhere
        (f"{CONSTANT} --skyladder-recurrent-state free",
         f"{CONSTANT} --skyladder-recurrent-state fragments", 4, {}, False),
    ],
)  # fmt: skip
def test_windows_are_compared_and_not_texts(
    flags: str, other: str, consumed: int, megatron: dict[str, Any], same: bool
) -> None:
    saved, options = checkpoint(flags, consumed), run(other, **megatron)
    was, config = saved.config(), config_from_args(options)
    assert was is not None and config is not None
    assert goes_on(was, config, options, consumed) == same


def test_a_rate_that_is_next_to_the_same_is_another_one() -> None:
    saved = checkpoint(START, 8, train_iters=6000).config()
    options = run(f"{START} --skyladder-expand-fraction 0.6400001", train_iters=6000)
    config = config_from_args(options)
    assert saved is not None and config is not None
    assert not goes_on(saved, config, options, 8)


def test_asking_what_would_fit_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    saved = checkpoint(f"{START} --skyladder-round-to auto", 8)
    caplog.clear()
    flags_that_keep(saved, run("--skyladder-schedule constant --skyladder-alpha 1"))
    assert not caplog.records


def test_a_flag_that_ends_the_ladder_switches_nothing_on() -> None:
    assert config_from_args(run("--skyladder-end-ladder")) is None
    with pytest.raises(UsageError, match="cannot stand beside --skyladder-mask"):
        config_from_args(run("--skyladder-end-ladder --skyladder-mask sliding"))
