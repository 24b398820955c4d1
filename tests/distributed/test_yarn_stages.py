"""Stages that move YaRN's factor and the base: the trainer follows them exactly, in every layer.

Frequencies are read from Megatron's own module, the concentration where layers turn queries and
keys; what is expected is worked out by hand, after arXiv:2309.00071.
"""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from histories import RESHARDABLE, History, assert_same_history
from runs import SEQ_LENGTH, Run, Trainer
from test_stage_runs import angles_by_step

from megatron_skyladder.hugging_face.architecture import from_megatron
from megatron_skyladder.hugging_face.checkpoints import open_checkpoint
from megatron_skyladder.testing import requires_megatron

pytestmark = requires_megatron

ORIGINAL, HEAD_DIM = 4096, 8
MODEL = (
    f"--position-embedding-type yarn --rotary-scaling-factor 2 --rotary-base 10000 "
    f"--yarn-original-max-position-embeddings {ORIGINAL}"
)
STAGES = "8..32:0.5 ..64:0.25,yarn=4,rope=20000 final:rest,yarn=16.5,rope=500000"
TABLE = f"{MODEL} --skyladder-schedule staged --skyladder-stages {STAGES}"
STARTS = range(0, 64, 8)
VALUES = {  # the first stage sets none: it has the flags'
    at: (10_000, 2) if at < 32 else (20_000, 4) if at < 48 else (500_000, 16.5) for at in STARTS
}
KILLED = (0, -9)
CP2 = "--micro-batch-size 4 --context-parallel-size 2"
LAYOUTS = {
    "one": (1, "--micro-batch-size 2"),
    "pp2-recompute-documents": (
        2,
        "--micro-batch-size 2 --pipeline-model-parallel-size 2 --recompute-granularity full "
        "--recompute-method uniform --recompute-num-layers 1 --skyladder-intra-document",
    ),
    "pp2-interleaved": (
        2,
        "--micro-batch-size 2 --pipeline-model-parallel-size 2 "
        "--num-layers-per-virtual-pipeline-stage 1",
    ),
    "hybrid": (1, "--micro-batch-size 2 --hybrid-layer-pattern *-*-"),
    "cp2": (2, CP2),
    "cp2-zigzag": (2, f"{CP2} --skyladder-context-parallel-layout zigzag"),
}


def frequencies_of(base: float, factor: float) -> list[float]:
    """Return YaRN's angles per position: those of few rotations in the original length divided."""

    def place(rotations: float) -> float:
        """The dimension that rotates so often within the original length."""
        wavelength = ORIGINAL / (2 * math.pi * rotations)
        return HEAD_DIM * math.log(wavelength) / (2 * math.log(base))

    low, high = max(math.floor(place(32)), 0), min(math.ceil(place(1)), HEAD_DIM - 1)
    found = []
    for index in range(HEAD_DIM // 2):
        divided = min(max((index - low) / (high - low), 0), 1)
        found.append(base ** (-2 * index / HEAD_DIM) * (1 - divided + divided / factor))
    return found


def concentration_of(factor: float) -> float:
    return 0.1 * math.log(factor) + 1


@pytest.fixture(scope="module")
def whole(trainer: Trainer):
    """Uninterrupted runs, one per layout."""
    runs: dict[str, History] = {}

    def run(layout: str) -> History:
        if layout not in runs:
            num_processes, flags = LAYOUTS[layout]
            history = History(trainer, f"{TABLE} {flags}", num_processes)
            history.go_on(f"--save-interval 100 {RESHARDABLE}")
            runs[layout] = history
        return runs[layout]

    return run


def by_place(run: Run, event: str, name: str, **values: Any) -> dict[tuple[int, int], Any]:
    """Return what each rank recorded in each step; all of a step have to be the same."""
    found: dict[tuple[int, int], Any] = {}
    for entry in run.of(event, **values):
        known = found.setdefault((entry["rank"], entry["samples"]), entry[name])
        assert known == entry[name], (name, entry)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_trainer_follows_the_table(whole, layout: str) -> None:
    run = whole(layout).attempts[0]
    num_ranks, flags = LAYOUTS[layout]
    places = [(rank, at) for rank in range(num_ranks) for at in STARTS]
    found = by_place(run, "rotary", "frequencies", training=True)
    assert sorted(found) == places
    for (rank, at), frequencies in found.items():
        expected = frequencies_of(*VALUES[at])
        assert frequencies == pytest.approx([*expected, *expected], rel=1e-6), (rank, at)
    for at, angles in angles_by_step(run).items():
        expected = 2 * sum(frequencies_of(*VALUES[at])) * SEQ_LENGTH * (SEQ_LENGTH - 1) / 2
        assert angles == pytest.approx(expected, rel=1e-6), at
    concentrations = {(rank, at): concentration_of(VALUES[at][1]) for rank, at in places}
    passes = (False, True) if "recompute" in flags else (True,)
    for with_gradients in passes:  # under recompute the first pass keeps none
        turned = by_place(
            run, "turned", "concentration", training=True, with_gradients=with_gradients
        )
        assert turned == concentrations


@pytest.mark.parametrize("layout", ["cp2", "cp2-zigzag"])
def test_context_parallel_ranks_train_as_one_process(whole, layout: str) -> None:
    run = whole(layout).attempts[0]
    assert run.losses == pytest.approx(whole("one").attempts[0].losses, rel=1e-4)


@pytest.mark.parametrize("layout", ["one", "pp2-recompute-documents", "cp2"])
def test_killed_twice(trainer: Trainer, whole, layout: str) -> None:
    """Once in mid-stage, once where a stage has just begun."""
    num_processes, flags = LAYOUTS[layout]
    history = History(trainer, f"{TABLE} {flags}", num_processes)
    for kill in (
        {"samples": 40, "when": "forward", "micro_batch": 0},
        {"samples": 48, "when": "stepped"},
    ):
        history.go_on("--save-interval 1", kill=kill, exit_codes=KILLED)
        assert -9 in history.attempts[-1].exit_codes, kill
    history.go_on(RESHARDABLE)
    assert [min(attempt.windows) for attempt in history.attempts] == [0, 40, 48]
    assert_same_history(history, whole(layout))
    for iteration, at in {4: 24, 5: 32, 6: 40, 8: 56}.items():  # the last batch
        rope = from_megatron(open_checkpoint(history.folder, iteration=iteration).args, 127).rope
        assert (rope.base, rope.factor) == VALUES[at]
        assert rope.parameters["attention_factor"] == concentration_of(rope.factor)


def test_evaluation_has_the_factor_of_the_latest_batch(whole) -> None:
    """After 24, 48 and 64 samples, and the last is in no stage."""
    run = whole("one").attempts[0]
    found = by_place(run, "turned", "concentration", training=False)
    assert found == {(0, at): concentration_of(f) for at, f in {24: 2, 48: 4, 64: 16.5}.items()}
    angles = by_place(run, "rotary", "frequencies", training=False)
    assert angles[0, 48][: HEAD_DIM // 2] == pytest.approx(frequencies_of(20_000, 4), rel=1e-6)


def test_the_log_says_the_factor(whole) -> None:
    log = whole("one").attempts[0].log()
    lines = [line for line in log.splitlines() if re.search(r"iteration +\d+/", line)]
    assert len(lines) == len(STARTS)
    for line, at in zip(lines, STARTS, strict=True):
        found = re.search(r"skyladder/yarn_factor: +([\d.E+-]+) \|", line)
        assert (float(found[1]) if found else 2) == VALUES[at][1]


def test_another_factor_is_refused(trainer: Trainer) -> None:
    history = History(trainer, f"{MODEL} --micro-batch-size 4 --skyladder-schedule staged")
    history.go_on(f"--skyladder-stages {STAGES} --exit-interval 3")
    other = STAGES.replace("yarn=4", "yarn=8")
    refused = history.go_on(f"--skyladder-stages {other}", exit_codes=(1,))
    assert "checkpoint: staged 8..32:0.5 32..64:0.25,rope=20000,yarn=4 64:0.25," in refused.log()
    assert not refused.windows
