"""A run that was killed goes on as if it had not been.

"The same" is to the bit here: every row's loss, learning rate, window, gradient norm, and all
tensors of the last checkpoint (weights and optimizer).
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest
import torch
from runs import Run, Trainer

from megatron_skyladder.testing import read_checkpoint, requires_megatron

pytestmark = requires_megatron

STEPS = 8
BASE = f"--train-samples {8 * STEPS} --split 80,20,0 --eval-iters 1 --eval-interval 3"
LADDER = "--skyladder-start-window 8 --skyladder-alpha 9"
WINDOWS = dict(zip(range(0, 64, 8), (8, 17, 26, 35, 44, 53, 62, 64), strict=True))
LAYOUTS = {
    "one": (1, "--micro-batch-size 2"),
    "dp2-distopt": (
        2,
        "--micro-batch-size 2 --use-distributed-optimizer --overlap-grad-reduce "
        "--overlap-param-gather --skyladder-intra-document",
    ),
    "pp2-recompute": (
        2,
        "--micro-batch-size 4 --pipeline-model-parallel-size 2 --recompute-granularity full "
        "--recompute-method uniform --recompute-num-layers 1 --skyladder-intra-document",
    ),
    "tp2-sp": (
        2,
        "--micro-batch-size 4 --tensor-model-parallel-size 2 --sequence-parallel "
        "--skyladder-mask sliding",
    ),
}
# Optimizer state by parameter. Otherwise the distributed optimizer saves its buckets as they lie in
# memory: no other TP or PP can load them, and between the parameters stands whatever was there.
RESHARDABLE = "--ckpt-fully-parallel-save --dist-ckpt-optim-fully-reshardable"
NUM_SEEDS = int(os.environ.get("SKYLADDER_KILL_SEEDS", "1"))  # per layout
KILLED = (0, -9)


class History:
    """Attempts of one run, one after the other, in one checkpoint folder."""

    def __init__(self, trainer: Trainer, flags: str, num_processes: int = 1) -> None:
        self.trainer = trainer
        self.folder = trainer.new_folder("checkpoints")
        self.flags = f"{BASE} {flags} --save {self.folder} --load {self.folder} "
        self.flags += "--save-interval 3"
        self.num_processes = num_processes
        self.attempts: list[Run] = []

    def go_on(self, flags: str = "", **options: object) -> Run:
        """Start, or resume from the latest checkpoint."""
        options.setdefault("num_processes", self.num_processes)
        run = self.trainer.train(f"{self.flags} {flags}", load=False, **options)
        self.attempts.append(run)
        return run

    def merged(self, name: str) -> dict[int, object]:
        """What all attempts recorded; what was done twice has to be the same twice."""
        return merge(record(run, name) for run in self.attempts)

    def last_checkpoint(self) -> Path:
        """The folder of the checkpoint that a resume would take."""
        iteration = int((self.folder / "latest_checkpointed_iteration.txt").read_text())
        return self.folder / f"iter_{iteration:07d}"


def record(run: Run, name: str) -> dict[int, object]:
    """Return a record by the samples before it."""
    if name in ("learning_rate", "grad_norm"):
        return run.steps(name)
    return getattr(run, name)


def merge(records: Iterable[dict[int, object]]) -> dict[int, object]:
    merged: dict[int, object] = {}
    for entries in records:
        for key, value in entries.items():
            assert merged.setdefault(key, value) == value, key
    return dict(sorted(merged.items()))


def assert_same_history(history: History, whole: History) -> None:
    for name in ("tokens", "labels", "windows", "learning_rate", "losses", "grad_norm"):
        assert history.merged(name) == whole.merged(name), name
    assert_same_checkpoints(history.last_checkpoint(), whole.last_checkpoint())


def assert_same_checkpoints(folder: Path, other: Path) -> None:
    assert folder.name == other.name
    tensors, others = read_checkpoint(folder), read_checkpoint(other)
    assert tensors.keys() == others.keys()
    assert any("exp_avg" in name for name in tensors)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name


@pytest.fixture(scope="session")
def uninterrupted(trainer: Trainer):
    """Whole runs, one per set of flags."""

    @cache
    def run(flags: str, num_processes: int = 1) -> History:
        history = History(trainer, flags, num_processes)
        history.go_on(f"--save-interval 100 {RESHARDABLE}")
        return history

    return run


@pytest.mark.parametrize("seed", range(NUM_SEEDS))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_twice(trainer: Trainer, uninterrupted, layout: str, seed: int) -> None:
    """SIGKILL at random moments of random steps; a rank dies, then the others are killed."""
    num_processes, flags = LAYOUTS[layout]
    flags = f"{LADDER} {flags}"
    chance = random.Random(f"{layout}{seed}")
    history = History(trainer, flags, num_processes)
    begin = 0
    for _ in range(2):
        kill = _random_kill(chance, begin)
        history.go_on(kill=kill, exit_codes=KILLED)
        assert -9 in history.attempts[-1].exit_codes, kill
        begin = kill["samples"]
    history.go_on(RESHARDABLE)
    whole = uninterrupted(flags, num_processes)
    assert whole.merged("windows") == WINDOWS
    assert_same_history(history, whole)


def _random_kill(chance: random.Random, begin: int) -> dict[str, object]:
    """Pick a moment at or after ``begin`` that every attempt comes to."""
    if begin < 24 and chance.random() < 0.4:  # around the checkpoint after three steps
        when = chance.choice(["saving", "saved"])
        delay = chance.uniform(0.001, 0.1) if when == "saving" else 0
        return {"samples": 24, "when": when, "delay_seconds": delay}
    when = chance.choice(["forward", "step", "stepped"])
    samples = chance.randrange(begin // 8, STEPS) * 8
    micro_batch = chance.randrange(2) if when == "forward" else 0
    return {"samples": samples, "when": when, "micro_batch": micro_batch}


FROM = f"--micro-batch-size 2 --use-distributed-optimizer {RESHARDABLE}"
RESUMED_AS = {
    "one process, micro-batch 1": (1, "--micro-batch-size 1 --use-distributed-optimizer"),
    "one process, micro-batch 8": (1, "--micro-batch-size 8 --use-distributed-optimizer"),
    "tp2": (2, "--micro-batch-size 4 --tensor-model-parallel-size 2 --use-distributed-optimizer"),
    "tp2-pp2": (
        4,
        "--micro-batch-size 1 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 "
        "--use-distributed-optimizer",
    ),
}


@pytest.mark.parametrize("layout", RESUMED_AS)
def test_resumed_in_another_layout(trainer: Trainer, uninterrupted, layout: str) -> None:
    """From DP2; the ladder and the samples go on exactly, the losses to rounding."""
    flags = f"{LADDER} --skyladder-intra-document"
    whole = uninterrupted(f"{flags} {FROM}", 2)
    history = History(trainer, flags)
    history.go_on(f"{FROM} --exit-interval 3", num_processes=2)
    num_processes, other = RESUMED_AS[layout]
    history.go_on(f"{other} {RESHARDABLE}", num_processes=num_processes)
    assert set(history.attempts[0].losses) == set(range(24))
    assert set(history.attempts[1].losses) == set(range(24, 64))
    for name in ("tokens", "labels", "windows", "learning_rate"):
        assert history.merged(name) == whole.merged(name), name
    assert history.merged("losses") == pytest.approx(whole.merged("losses"), rel=1e-6)
    assert history.merged("grad_norm") == pytest.approx(whole.merged("grad_norm"), rel=1e-5)


def test_evaluation_leaves_training_alone(trainer: Trainer, uninterrupted) -> None:
    """Evaluation in mid-run sees whole rows; training goes on as without it."""
    flags = f"{LADDER} --micro-batch-size 2 --skyladder-intra-document"
    whole = uninterrupted(flags)
    evaluated = whole.attempts[0].of("batch", training=False)
    assert {entry["samples"] for entry in evaluated} == {24, 48, 64}
    assert {entry["window"] for entry in evaluated} == {64}
    assert not any(entry["documents_masked"] for entry in evaluated)
    quiet = History(trainer, flags)
    quiet.go_on("--eval-interval 100 --save-interval 100")
    assert {e["samples"] for e in quiet.attempts[0].of("batch", training=False)} == {64}
    assert_same_history(quiet, whole)


def test_exit_interval(trainer: Trainer, uninterrupted) -> None:
    flags = f"{LADDER} --micro-batch-size 2"
    history = History(trainer, flags)
    for end in (24, 48, 64):
        run = history.go_on("--exit-interval 3")
        assert max(run.windows) == end - 8
    assert_same_history(history, uninterrupted(flags))


def test_exit_signal(trainer: Trainer, uninterrupted) -> None:
    """SIGTERM in mid-step: Megatron ends the step, saves and leaves."""
    flags = f"{LADDER} --micro-batch-size 2"
    history = History(trainer, flags)
    kill = {"samples": 32, "when": "forward", "micro_batch": 1, "name": "SIGTERM"}
    run = history.go_on("--exit-signal-handler", kill=kill)
    assert max(run.windows) == 32
    assert history.last_checkpoint().name == "iter_0000005"
    history.go_on()
    assert_same_history(history, uninterrupted(flags))


def test_skip_train(trainer: Trainer, uninterrupted) -> None:
    """An evaluation of a checkpoint of mid-run sees whole rows and changes nothing."""
    flags = f"{LADDER} --micro-batch-size 2"
    history = History(trainer, flags)
    history.go_on("--exit-interval 3")
    before = read_checkpoint(history.last_checkpoint())
    evaluation = history.go_on("--skip-train")
    history.attempts.pop()
    assert evaluation.of("batch", training=True) == []
    assert {entry["window"] for entry in evaluation.of("batch", training=False)} == {64}
    after = read_checkpoint(history.last_checkpoint())
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    history.go_on()
    assert_same_history(history, uninterrupted(flags))
    stock_flags = f"{history.flags.replace(LADDER, '')} --skip-train --ckpt-step 3"
    stock = trainer.train(stock_flags, load=False)
    assert _validation_losses(evaluation) == _validation_losses(stock) != []


def _validation_losses(run: Run) -> list[str]:
    return [line for line in run.log().splitlines() if "validation loss" in line]
