"""A run that was killed goes on as if it had not been.

"The same" means bit-identical here: every row's loss, learning rate, window, gradient norm, and all
tensors of the last checkpoint (weights and optimizer).
"""

from __future__ import annotations

import os
import random

import pytest
import torch
from histories import LADDER, RESHARDABLE, STEPS, WINDOWS, History, assert_same_history
from runs import Run, Trainer

from megatron_skyladder.slurm.checkpoints import Found, find
from megatron_skyladder.testing import read_checkpoint, requires_megatron

pytestmark = requires_megatron

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
NUM_SEEDS = int(os.environ.get("SKYLADDER_KILL_SEEDS", "1"))  # per layout
KILLED = (0, -9)


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
    # the SLURM gate knows what Megatron wrote by itself, and by what it is complete
    assert find(history.folder) == Found(STEPS, (), str(STEPS))
    for mark in history.folder.glob("iter_*/metadata.json"):
        mark.unlink()
    assert all("no metadata.json" in entry.reason for entry in find(history.folder).incomplete)
    assert find(history.folder).newest == 0


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
