"""The published settings, against the paper's own tables."""

from __future__ import annotations

import argparse
import logging
import re
from pathlib import Path

import pytest

from megatron_skyladder.ladder.flags import add_arguments, config_from_args
from megatron_skyladder.ladder.presets import MODELS, PAPER_RUNS, SCHEDULE_PRESETS

# arXiv:2503.15450, Table 12: layers, hidden, FFN, heads, query groups, vocabulary
SHAPES = {
    "120m": (12, 768, 2048, 12, 1, 32_000),
    "360m": (18, 1024, 4096, 16, 16, 32_000),
    "1b": (22, 2048, 5632, 32, 4, 32_000),
    "3b": (28, 3072, 8192, 24, 8, 32_000),
}
# row length, rows in a batch, base of the rotary embedding, steps per token of window
RUNS = {
    "120m-8k": (8192, 128, 10_000, 8),
    "360m-8k": (8192, 128, 10_000, 8),
    "1b-8k": (8192, 128, 10_000, 8),
    "1b-32k": (32_768, 32, 1_000_000, 2),
    "3b-8k": (8192, 128, 100_000, 8),
}


def test_models_are_the_papers() -> None:
    shapes = {
        name: (
            model.num_layers,
            model.hidden_size,
            model.ffn_hidden_size,
            model.num_attention_heads,
            model.num_query_groups,
            model.vocab_size,
        )
        for name, model in MODELS.items()
    }
    assert shapes == SHAPES


def test_runs_are_the_papers() -> None:
    runs = {
        name: (run.seq_length, run.global_batch_size, run.rotary_base, 1 / run.alpha)
        for name, run in PAPER_RUNS.items()
    }
    assert runs == RUNS
    assert all(run.model == MODELS[name.split("-")[0]] for name, run in PAPER_RUNS.items())
    assert {run.train_steps for run in PAPER_RUNS.values()} == {100_000}
    assert {run.global_batch_size * run.seq_length for run in PAPER_RUNS.values()} == {2**20}


# preset -> (step of 1,000, window) at the first step, at each edge and at the end, for L = 8192
STAGES = {
    "shortformer": "0:128 499:128 500:8192 999:8192",
    "growlength": "0:128 166:128 167:256 333:256 334:512 500:1024 666:1024 667:2048 834:4096",
    "llama-2-long-20": "0:4096 199:4096 200:8192 999:8192",
    "llama-2-long-40": "0:4096 399:4096 400:8192 999:8192",
    "late-switch-baseline": "0:4096 969:4096 970:8192 999:8192",
    # 4096 + 4096 * step / 400, rounded down to multiples of 128
    "extend-context": "0:4096 12:4096 13:4224 399:8064 400:8192 999:8192",
    "recommended": "0:8 639:8179 640:8192",  # 8 + floor(8184 * 639 / 640)
}


def parsed(name: str, *, seq_length: int, steps: int) -> argparse.Namespace:
    args = add_arguments(argparse.ArgumentParser()).parse_args([f"--skyladder-preset={name}"])
    args.seq_length, args.global_batch_size = seq_length, 2**20 // seq_length
    args.train_samples, args.train_iters = steps * args.global_batch_size, None
    return args


@pytest.mark.parametrize("name", STAGES)
def test_windows_of_the_published_schedules(name: str) -> None:
    config = config_from_args(parsed(name, seq_length=8192, steps=1000))
    assert config
    for point in STAGES[name].split():
        step, window = point.split(":")
        assert config.schedule.window_at(int(step)) == int(window), point


@pytest.mark.parametrize("name", PAPER_RUNS)
def test_windows_of_the_papers_runs(name: str) -> None:
    run = PAPER_RUNS[name]
    config = config_from_args(parsed(name, seq_length=run.seq_length, steps=run.train_steps))
    assert config
    schedule = config.schedule
    assert schedule.window_at(0) == 32
    assert schedule.window_at(64_000) == 32 + 64_000 * run.alpha
    assert schedule.window_at(run.train_steps - 1) == run.seq_length
    assert schedule.ramp_steps == (run.seq_length - 32) / run.alpha
    assert config.step_samples == run.global_batch_size


def test_every_preset_has_a_test() -> None:
    others = (Path(__file__).parent / "test_stages.py").read_text()
    rest = SCHEDULE_PRESETS.keys() - STAGES.keys() - PAPER_RUNS.keys()
    assert all(f'preset("{name}"' in others for name in rest)


def test_every_preset_says_where_it_comes_from() -> None:
    for preset in SCHEDULE_PRESETS.values():
        assert re.search("arXiv:|github.com/", preset.source) and preset.summary


def test_extending_a_context_starts_from_the_models_own(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A model of 4K is assumed, and said; given, it is neither assumed nor said."""
    said = (
        "--skyladder-preset=extend-context takes --skyladder-start-window=4096 for the context "
        "length that the model was trained with. Give it where that is another number."
    )
    args = parsed("extend-context", seq_length=32_768, steps=1000)
    config = config_from_args(args)
    assert config and config.schedule.window_at(0) == 4096
    warnings = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert [each.getMessage() for each in warnings] == [said]
    caplog.clear()
    args.skyladder_start_window = 8192
    config = config_from_args(args)
    assert config and config.schedule.window_at(0) == 8192
    assert config.schedule.describe() == (
        "linear 8192 -> 32768, fraction 0.4 of 1000 steps, rounded to 128"
    )
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]


def test_a_renamed_preset_is_refused_by_its_new_name() -> None:
    with pytest.raises(ValueError, match="is called late-switch-baseline now"):
        config_from_args(parsed("continual", seq_length=8192, steps=1000))
