"""One table that moves window, batch, learning rate and RoPE: the trainer follows it exactly.

The rate is read from the optimizer's parameter groups, the base from the rotary module and from the
angles that it hands to the layers; what is expected is worked out by hand.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from histories import RESHARDABLE, History, assert_same_history
from runs import SEQ_LENGTH, Run, Trainer

from megatron_skyladder.hugging_face.architecture import from_megatron, hugging_face_config
from megatron_skyladder.hugging_face.checkpoints import open_checkpoint
from megatron_skyladder.testing import requires_megatron

pytestmark = requires_megatron

# 64 samples: 32 in batches of 4, then 16 and 16 in batches of 8. A step is the last batch, 8.
STAGES = "8..32:0.5,batch=4,lr=1,rope=10000 ..64:0.25,batch=8,lr=sqrt,rope=20000 "
STAGES += "final:rest,lr=0.5,rope=500000"
BATCHES = f"--step-batch-size-schedule 0:4,{32 * SEQ_LENGTH}:8"
TABLE = f"--skyladder-schedule staged --skyladder-stages {STAGES} {BATCHES}"
STARTS = [*range(0, 32, 4), 32, 40, 48, 56]
WINDOWS = dict(zip(STARTS, (8, 8, 14, 14, 20, 20, 26, 26, 32, 48, 64, 64), strict=True))
FACTORS = {at: 1.0 if at < 32 else math.sqrt(2) if at < 48 else 0.5 for at in STARTS}
BASES = {at: 10_000 if at < 32 else 20_000 if at < 48 else 500_000 for at in STARTS}
HEAD_DIM = 8
KILLED = (0, -9)

LAYOUTS = {
    "one": (1, "--micro-batch-size 2"),
    "tp2-pp2": (
        4,
        "--micro-batch-size 2 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 "
        "--sequence-parallel",
    ),
    "pp2-recompute-documents": (
        2,
        "--micro-batch-size 2 --pipeline-model-parallel-size 2 --recompute-granularity full "
        "--recompute-method uniform --recompute-num-layers 1 --skyladder-intra-document",
    ),
    "cp2": (2, "--micro-batch-size 4 --context-parallel-size 2"),
}
KILLED_TWICE = ("one", "pp2-recompute-documents", "cp2")


def rate_of(samples: int, factor: float) -> float:
    """Return Megatron's warm-up over 8 samples and cosine over 400, times a factor."""
    if samples <= 8:
        return 1e-3 * samples / 8 * factor
    cosine = 0.5 * (math.cos(math.pi * (samples - 8) / 392) + 1)
    return (1e-5 + cosine * (1e-3 - 1e-5)) * factor


def angles_of(base: int) -> float:
    """Return the sum of all angles of a sequence, each twice as in the embedding."""
    frequencies = sum(base ** (-2 * place / HEAD_DIM) for place in range(HEAD_DIM // 2))
    return 2 * frequencies * SEQ_LENGTH * (SEQ_LENGTH - 1) / 2


def frequency_of(base: int) -> float:
    """Return the second frequency, in the precision in which Megatron computes it."""
    places = torch.arange(0, HEAD_DIM, 2, dtype=torch.float32) / HEAD_DIM
    return (1.0 / base**places)[1].item()


@pytest.fixture(scope="module")
def whole(trainer: Trainer):
    """Uninterrupted runs, one per layout."""
    runs: dict[str, History] = {}

    def run(layout: str) -> History:
        if layout not in runs:
            num_processes, flags = LAYOUTS[layout]
            history = History(trainer, f"{TABLE} {flags}", num_processes)
            history.go_on(f"--save-interval 100 {RESHARDABLE}", global_batch_size=None)
            runs[layout] = history
        return runs[layout]

    return run


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_trainer_follows_the_table(whole, layout: str) -> None:
    run = whole(layout).attempts[0]
    assert run.windows == WINDOWS
    rates = {at: rate_of(at, FACTORS[at]) for at in STARTS}
    assert run.steps("learning_rate") == pytest.approx(rates, rel=1e-12)
    ranks = LAYOUTS[layout][0]
    assert _frequencies(run, training=True) == {
        (rank, at): {frequency_of(BASES[at])} for rank in range(ranks) for at in STARTS
    }
    for at, angles in angles_by_step(run).items():
        assert angles == pytest.approx(angles_of(BASES[at]), rel=1e-6), at


def _frequencies(run: Run, *, training: bool) -> dict[tuple[int, int], set[float]]:
    found: dict[tuple[int, int], set[float]] = {}
    for entry in run.of("rotary", training=training):
        found.setdefault((entry["rank"], entry["samples"]), set()).add(entry["frequency"])
    return found


def angles_by_step(run: Run) -> dict[int, float]:
    """Return what the layers of the first micro-batches got, over the context-parallel ranks."""
    parts: dict[int, dict[int, float]] = {}
    for entry in run.of("rotary", training=True):
        parts.setdefault(entry["samples"], {})[entry["context_rank"]] = entry["angles"]
    return {at: sum(angles.values()) for at, angles in parts.items()}


@pytest.mark.parametrize("layout", KILLED_TWICE)
def test_killed_twice(trainer: Trainer, whole, layout: str) -> None:
    """Once while the batch is small, once where all four have just changed."""
    num_processes, flags = LAYOUTS[layout]
    history = History(trainer, f"{TABLE} {flags}", num_processes)
    for kill in (
        {"samples": 28, "when": "forward", "micro_batch": 0},
        {"samples": 48, "when": "stepped"},
    ):
        history.go_on(kill=kill, exit_codes=KILLED, global_batch_size=None)
        assert -9 in history.attempts[-1].exit_codes, kill
    history.go_on(RESHARDABLE, global_batch_size=None)
    assert [min(attempt.windows) for attempt in history.attempts] == [0, 24, 40]
    assert_same_history(history, whole(layout))
    for iteration, base in {3: 10_000, 6: 10_000, 9: 20_000, 12: 500_000}.items():
        assert _exported_base(history.folder, iteration) == base


def _exported_base(folder: Path, iteration: int) -> float:
    """Return what goes into config.json of a checkpoint: the base of its own stage."""
    model = from_megatron(open_checkpoint(folder, iteration=iteration).args, 127)
    config = hugging_face_config(model, "float32")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    return config["rope_theta"]


def test_evaluation_has_the_base_of_the_latest_batch(whole) -> None:
    """After 12, 24, 40 and 64 samples, and the last is in no stage."""
    found = _frequencies(whole("one").attempts[0], training=False)
    bases = {12: 10_000, 24: 10_000, 40: 20_000, 64: 500_000}
    assert found == {(0, at): {frequency_of(base)} for at, base in bases.items()}


def test_the_log_says_what_is_true(whole) -> None:
    """Megatron logs the rate of the next step; the stage is that of the step."""
    log = whole("one").attempts[0].log()
    lines = [line for line in log.splitlines() if re.search(r"iteration +\d+/", line)]
    assert len(lines) == len(STARTS)
    for line, at, after in zip(lines, STARTS, [*STARTS[1:], 64], strict=True):
        rate = rate_of(after, FACTORS.get(after, 0.5))
        assert _logged(line, "learning rate") == pytest.approx(rate, rel=1e-5)
        assert _logged(line, "skyladder/window") == WINDOWS[at]
        assert _logged(line, "skyladder/rate_factor") == pytest.approx(FACTORS[at], rel=1e-5)
        assert _logged(line, "skyladder/rotary_base") == BASES[at]
        assert _logged(line, "skyladder/batch") == _logged(line, "global batch size")
        assert _logged(line, "global batch size") == (4 if at < 32 else 8)


def _logged(line: str, name: str) -> float:
    found = re.search(rf"{name}: +([\d.E+-]+) \|", line)
    assert found, (name, line)
    return float(found[1])


def test_another_table_is_refused(trainer: Trainer, tmp_path: Path) -> None:
    """Whatever it changes; a table in a file is in the checkpoint, not its name."""
    table = tmp_path / "stages.ini"
    sections = [
        "[a]\nwindow = 8..32\nshare = 0.5\nbatch = 4\nlr = 1\nrope = 10000",
        "[b]\nwindow = ..64\nshare = 0.25\nbatch = 8\nlr = sqrt\nrope = 20000",
        "[c]\nwindow = final\nshare = rest\nlr = 0.5\nrope = 500000",
    ]
    table.write_text("\n".join(sections))
    ladder = f"--skyladder-schedule staged --skyladder-stages {table}"
    history = History(trainer, f"--micro-batch-size 4 {BATCHES}")
    history.go_on(f"{ladder} --exit-interval 3", global_batch_size=None)
    for old, new in (("lr = 0.5", "lr = 0.25"), ("rope = 20000", "rope = 30000")):
        table.write_text("\n".join(sections).replace(old, new))
        refused = history.go_on(ladder, exit_codes=(1,), global_batch_size=None)
        assert "checkpoint: staged 8..32:0.5,batch=4,lr=1,rope=10000 32..64:" in refused.log()
        assert not refused.windows
    table.unlink()
    refused = history.go_on(exit_codes=(1,), global_batch_size=None)
    stages = "8..32:0.5,batch=4,lr=1,rope=10000 32..64:0.25,batch=8,lr=2^0.5,rope=20000 "
    stages += "64:0.25,batch=8,lr=0.5,rope=500000"
    assert f"--skyladder-stages {stages}" in refused.log()
    ladder = f"--skyladder-schedule staged --skyladder-stages {stages}"
    history.go_on(f"{ladder} --exit-interval 4", global_batch_size=None)


def test_batches_that_megatron_was_not_given(trainer: Trainer) -> None:
    ladder = f"--skyladder-schedule staged --skyladder-stages {STAGES} --micro-batch-size 2"
    run = trainer.train(f"--train-samples 64 {ladder}", exit_codes=(1,))
    assert "Give --step-batch-size-schedule '0:4 2048:8', without --global-batch" in run.log()


def test_a_batch_that_megatron_would_not_take_is_refused_at_the_start(trainer: Trainer) -> None:
    stages = "8:0.5,batch=4 final:0.5,batch=6 --step-batch-size-schedule 0:4,2304:6"
    run = trainer.train(
        f"--train-samples 72 --micro-batch-size 4 --skyladder-schedule staged "
        f"--skyladder-stages {stages}",
        load=False,
        global_batch_size=None,
        exit_codes=(1,),
    )
    assert (
        "--skyladder-stages: the batch of 6 samples from sample 36 on is no multiple" in run.log()
    )
    assert "micro-batch size x data-parallel size = 4" in run.log()
    assert not run.of("step")


def test_a_table_of_one_row_is_no_table(trainer: Trainer, uninterrupted) -> None:
    """Bit-identical, weights and optimizer as well."""
    flags = "--micro-batch-size 2"
    table = "--skyladder-schedule staged --skyladder-stages final:1,batch=8,lr=1,rope=10000"
    plain = uninterrupted(f"{flags} --skyladder-schedule constant")
    assert_same_history(uninterrupted(f"{flags} {table}"), plain)
