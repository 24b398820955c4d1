"""Every flag sets a field of the configuration, and every field changes a real run.

A flag or a field that is new has no entry in the tables below, and fails until it has one: until
somebody has seen, through the entry point, that it does what it says.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from runs import SEQ_LENGTH, Run, Trainer

from megatron_skyladder.ladder.config import SkyLadderConfig
from megatron_skyladder.ladder.flags import add_arguments, config_from_args
from megatron_skyladder.report.runlog import parse
from megatron_skyladder.testing import read_checkpoint, requires_megatron

# --- a field for every flag -----------------------------------------------------------------------

FIELD_OF_FLAG = {
    "--skyladder-preset recommended": "schedule",
    "--skyladder-schedule exponential": "schedule",
    "--skyladder-start-window 8": "schedule",
    "--skyladder-final-window 1024": "schedule",
    "--skyladder-alpha 10": "schedule",
    "--skyladder-expand-fraction 0.5": "schedule",
    "--skyladder-round-to 64": "schedule",
    "--skyladder-preset shortformer --skyladder-stages 256:0.5 final:0.5": "schedule",
    "--skyladder-schedule staged --skyladder-stages 8..512:0.5,lr=0.5,rope=9 final:0.5": "schedule",
    "--skyladder-schedule staged --skyladder-stages final:0.5,yarn=2 final:0.5,yarn=4": "schedule",
    "--skyladder-schedule cyclic --skyladder-cycles 3": "schedule",
    "--skyladder-schedule points --skyladder-points 0:8 0.5:final": "schedule",
    "--skyladder-begin-samples 128": "begin_samples",
    "--skyladder-local-start-window 8": "local_schedule",
    "--skyladder-local-start-window 8 --skyladder-local-expand-fraction 0.5": "local_schedule",
    "--skyladder-intra-document": "intra_document",
    "--skyladder-intra-document --skyladder-require-documents": "require_documents",
    "--skyladder-mask sliding": "mask",
    "--skyladder-attention-backend sdpa": "attention_backend",
    "--skyladder-eval-lengths 512": "eval_lengths",
    "--skyladder-init reference": "init",
    "--skyladder-context-parallel-layout zigzag": "context_parallel_layout",
    "--skyladder-recurrent-state free": "recurrent_state",
    "--skyladder-attention-stats-interval 10": "attention_stats_interval",
    "--skyladder-no-probe": "probe",
    "--skyladder-allow-unfinished": "allow_unfinished",
}
INSTEAD = {  # of the flags without the last one, where those are refused
    "--skyladder-stages": "--skyladder-preset shortformer",
    "--skyladder-points": "--skyladder-schedule points --skyladder-points 0:32 0.5:final",
}
TESTED_ELSEWHERE = {
    "--skyladder-allow-schedule-change": "distributed/test_clock_runs.py",
    "--skyladder-end-ladder": "distributed/test_resume.py",
}


def configured(flags: str) -> dict[str, Any]:
    args = add_arguments(argparse.ArgumentParser()).parse_args(flags.split())
    args.seq_length, args.global_batch_size = 2048, 128
    args.train_iters, args.train_samples, args.log_interval = 1000, None, 1
    args.num_layers, args.window_size, args.window_attn_skip_freq = 6, (127, 0), 6
    config = config_from_args(args)
    assert config is not None
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


@pytest.mark.parametrize("flags", FIELD_OF_FLAG)
def test_a_flag_sets_its_field(flags: str) -> None:
    flag = [word for word in flags.split() if word.startswith("--")][-1]
    without = INSTEAD.get(flag) or flags[: flags.index(flag)] or "--skyladder-schedule linear"
    before, after = configured(without), configured(flags)
    changed = {name for name, value in after.items() if before[name] != value}
    assert FIELD_OF_FLAG[flags] in changed
    assert changed <= {FIELD_OF_FLAG[flags], "schedule"}  # its length may depend on others


def test_no_flag_is_forgotten() -> None:
    flags = {
        option
        for action in add_arguments(argparse.ArgumentParser(add_help=False))._actions
        for option in action.option_strings
    }
    named = {flag for words in FIELD_OF_FLAG for flag in words.split() if flag.startswith("--")}
    assert flags == named | TESTED_ELSEWHERE.keys(), (
        "name the field that the flag sets in FIELD_OF_FLAG, or the file that tests what it does "
        "in TESTED_ELSEWHERE"
    )
    for flag, file in TESTED_ELSEWHERE.items():
        assert flag in (Path(__file__).parents[1] / file).read_text()


# --- a real run for every field -------------------------------------------------------------------

RUN = "--train-samples 16 --micro-batch-size 4 --skyladder-start-window 8 --skyladder-alpha 11"
UNFINISHED = "--skyladder-allow-unfinished"  # in all runs but one
WITH_EVALUATION = "--split 50,50,0 --eval-iters 2"


@dataclass(frozen=True)
class Effect:
    """What a field does to a run.

    Args:
        flags: that set the field.
        seen: what is looked at in the run.
        before: that, without the flags; None: anything but what is there with them.
        after: that, with the flags; None: anything but what is there without.
        common: flags of both runs.
        exit_codes: of the run without the flags, and with them.
    """

    flags: str
    seen: Callable[[Run], Any]
    before: Any = None
    after: Any = None
    common: str = ""
    exit_codes: tuple[int, int] = (0, 0)


def windows(run: Run) -> dict[int, int]:
    return run.windows


def losses(run: Run) -> dict[int, float]:
    return run.losses


def first_fraction(run: Run) -> float | None:
    return parse(run.log()).iterations[0].attention_fraction


def says(pattern: str) -> Callable[[Run], bool]:
    return lambda run: bool(re.search(pattern, run.log()))


def logged_local_windows(run: Run) -> list[float | None]:
    return [entry.values.get("skyladder/local_window") for entry in parse(run.log()).iterations]


def lengths_reported(run: Run) -> list[int]:
    (validation,) = parse(run.log()).validations
    return list(validation.by_length)


def spread_of_embedding(run: Run) -> float:
    weights = read_checkpoint(run.saved / "iter_0000002")  # type: ignore[attr-defined]
    return round(weights["embedding.word_embeddings.weight"].std().item(), 2)


EFFECTS = {
    "schedule": Effect("--skyladder-alpha 20", windows, {0: 8, 8: 19}, {0: 8, 8: 28}),
    "seq_length": Effect("--seq-length 32", first_fraction, 0.1384615, 0.2727273),
    "step_samples": Effect(
        "--global-batch-size 4", windows, {0: 8, 8: 19}, {0: 8, 4: 19, 8: 30, 12: 41}
    ),
    "begin_samples": Effect("--skyladder-begin-samples 8", windows, {0: 8, 8: 19}, {0: 8, 8: 8}),
    # the smaller of the ladder's 8 and 19, and of 2 + 10 * step // 2
    "local_schedule": Effect(
        "--skyladder-local-start-window 2 --skyladder-local-expand-fraction 1",
        logged_local_windows,
        [None, None],
        [2, 7],
        "--window-size 11,0",
    ),
    "intra_document": Effect("--skyladder-intra-document", losses),
    "require_documents": Effect(
        "--skyladder-require-documents",
        says("refuses such a run"),
        True,
        False,
        "--skyladder-intra-document --vocab-size 128",  # no document ends in 127
        exit_codes=(0, 1),
    ),
    "mask": Effect("--skyladder-mask sliding", losses),
    "attention_backend": Effect(
        "--skyladder-attention-backend sdpa",
        says(r"sdpa \(as --skyladder-attention-backend says\)"),
        False,
        True,
    ),
    "probe": Effect("--skyladder-no-probe", says("mask probe passed"), True, False),
    "eval_lengths": Effect(
        "--skyladder-eval-lengths 16", lengths_reported, [], [16, SEQ_LENGTH], WITH_EVALUATION
    ),
    "attention_stats_interval": Effect(
        "--skyladder-attention-stats-interval 1", says("skyladder/attention_entropy"), False, True
    ),
    "allow_unfinished": Effect(
        UNFINISHED, says(r"takes \d steps, but the run has 2"), True, False, exit_codes=(1, 0)
    ),
    "context_parallel_layout": Effect(
        "--skyladder-context-parallel-layout zigzag",
        says("shares out tokens by the window"),
        True,
        False,
        "--context-parallel-size 2",
    ),
    # sqrt(2 / (5 * 32)) after a step that is too small to be seen
    "init": Effect(
        "--skyladder-init reference",
        spread_of_embedding,
        0.02,
        0.11,
        "--init-method-std 0.02 --lr 1e-9 --min-lr 0 --save-interval 2",
    ),
}


# what needs another model
FIELDS_TESTED_ELSEWHERE = {  # the flag that sets a field, and the file with runs of it
    "recurrent_state": ("--skyladder-recurrent-state", "distributed/test_recurrent_runs.py"),
    "local_layers": ("--window-size", "distributed/test_parity.py"),
}


def test_no_field_is_forgotten() -> None:
    fields = {field.name for field in dataclasses.fields(SkyLadderConfig)}
    assert fields == EFFECTS.keys() | FIELDS_TESTED_ELSEWHERE.keys(), (
        "add to EFFECTS what the field changes in a run, or name the file that tests it"
    )
    for flag, file in FIELDS_TESTED_ELSEWHERE.values():
        assert flag in (Path(__file__).parents[1] / file).read_text()


@pytest.fixture(scope="module")
def train(trainer: Trainer) -> Callable[..., Run]:
    @cache
    def run(flags: str, exit_code: int = 0) -> Run:
        if "--save-interval" not in flags:
            ranks = 2 if "--context-parallel-size 2" in flags else 1
            return trainer.train(f"{RUN} {flags}", num_processes=ranks, exit_codes=(exit_code,))
        folder = trainer.new_folder("saved")  # it begins with new weights, and saves them
        run = trainer.train(f"{RUN} {flags} --save {folder}", load=False)
        run.saved = folder  # type: ignore[attr-defined]
        return run

    return run


@requires_megatron
@pytest.mark.parametrize("field", EFFECTS)
def test_a_field_changes_the_run(train: Callable[..., Run], field: str) -> None:
    effect = EFFECTS[field]
    common = effect.common if field == "allow_unfinished" else f"{UNFINISHED} {effect.common}"
    before = effect.seen(train(common, effect.exit_codes[0]))
    after = effect.seen(train(f"{common} {effect.flags}", effect.exit_codes[1]))
    assert before != after
    assert effect.before is None or before == effect.before
    assert effect.after is None or after == effect.after
