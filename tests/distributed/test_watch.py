"""What is reported while a run goes on is true, in every layout, and leaves the run as it was."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from recorded_training import STOPPED_SECONDS
from runs import GLOBAL_BATCH_SIZE, SEQ_LENGTH, Run, Trainer

from megatron_skyladder.report.runlog import RunLog, Validation, parse
from megatron_skyladder.testing import ProcessPool, requires_megatron

pytestmark = requires_megatron

LAYOUTS = {
    "one": (1, ""),
    "tp2-sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "pp2-vpp2": (2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
    "cp2": (2, "--context-parallel-size 2"),
    "dp2": (2, ""),
}
DATA = "--split 50,50,0 --micro-batch-size 2"
HAS_WANDB = importlib.util.find_spec("wandb") is not None
TOLERANCE = 2e-6  # relative; the log has seven digits


class _WatchedPool:
    """Runs watch_bodies.train where a trainer asks for recorded_training.train."""

    def __init__(self, pool: ProcessPool) -> None:
        self._pool = pool

    def run(self, body: str, **arguments: Any) -> list[int]:
        """See `ProcessPool.run`."""
        return self._pool.run(
            body.replace("recorded_training:train", "watch_bodies:train"), **arguments
        )


@pytest.fixture(scope="module")
def watched(pool: ProcessPool, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """Starts recorded runs that are watched too."""
    return Trainer(_WatchedPool(pool), tmp_path_factory.mktemp("watched"))  # type: ignore[arg-type]


def log_of(run: Run) -> RunLog:
    """Return what the last rank printed."""
    return parse(run.log(len(run.exit_codes) - 1))


def seen(run: Run, rank: int = 0) -> list[dict[str, Any]]:
    """Return what watch_bodies wrote."""
    return [json.loads(line) for line in (run.folder / f"watch.{rank}.jsonl").open()]


# --- losses by length ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def true_losses(watched: Trainer) -> dict[int, float]:
    """Stock Megatron's validation losses, its attention handed dense masks of blocked windows."""

    @cache
    def loss(window: int) -> float:
        run = watched.train(f"--train-samples 8 {DATA} --eval-iters 3", evaluation_window=window)
        (record,) = log_of(run).validations
        assert record.loss is not None
        return record.loss

    return {window: loss(window) for window in (16, SEQ_LENGTH)}


def by_length(watched: Trainer, layout: str, flags: str) -> Validation:
    processes, layout_flags = LAYOUTS[layout]
    run = watched.train(
        f"--train-samples 8 {DATA} --eval-iters 4 --skyladder-schedule constant "
        f"--skyladder-eval-lengths 16 {layout_flags} {flags}",
        num_processes=processes,
    )
    (record,) = log_of(run).validations
    return record


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_by_length_are_those_of_dense_masks(
    watched: Trainer, true_losses: dict[int, float], layout: str
) -> None:
    record = by_length(watched, layout, "")
    assert record.by_length == {
        length: pytest.approx(loss, rel=TOLERANCE) for length, loss in true_losses.items()
    }
    early, late = record.by_positions[0, 15], record.by_positions[16, 63]
    assert (16 * early + 48 * late) / 64 == pytest.approx(true_losses[64], rel=TOLERANCE)
    assert early != pytest.approx(late, rel=1e-3)


def test_windows_are_blocked_under_a_sliding_mask_too(
    watched: Trainer, true_losses: dict[int, float]
) -> None:
    record = by_length(watched, "one", "--skyladder-mask sliding --skyladder-intra-document")
    assert record.by_length[16] == pytest.approx(true_losses[16], rel=TOLERANCE)


def test_validation_may_have_micro_batches_of_its_own(
    watched: Trainer, true_losses: dict[int, float]
) -> None:
    """Of which tensor-parallel ranks that read nothing have to know the size."""
    record = by_length(watched, "tp2-sp", "--eval-micro-batch-size 4")
    assert record.by_length == {
        length: pytest.approx(loss, rel=TOLERANCE) for length, loss in true_losses.items()
    }


@pytest.mark.parametrize("layout", ["one", "dp2", "tp2-sp"])
def test_full_validation_of_several_sets(watched: Trainer, layout: str) -> None:
    """Its micro-batches have one sequence, whatever the flag says, and ranks may have fewer."""
    processes, layout_flags = LAYOUTS[layout]
    sets = [watched.build(f"{layout}-{n}", [SEQ_LENGTH + 1] * n) for n in (7, processes)]
    run = watched.train(
        "--train-samples 8 --micro-batch-size 2 --eval-interval 1 --skyladder-schedule constant "
        "--skyladder-eval-lengths 16,32 --full-validation --multiple-validation-sets "
        f"{layout_flags}",
        num_processes=processes,
        data=f"--train-data-path {watched.documents} --valid-data-path {sets[0]} {sets[1]}",
    )
    first, second = log_of(run).validations
    for record in (first, second):
        assert list(record.by_length) == [16, 32, SEQ_LENGTH]
        assert all(1 < loss < 20 for loss in record.by_length.values())
    if processes == 1:  # the second set is a single sequence, seen over and over
        assert second.by_length[SEQ_LENGTH] == pytest.approx(second.loss, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("layout", "more"),
    [
        ("one", ""),
        # three sequences under two windows: one micro-batch more than a group
        (
            "pp2-vpp2",
            "--micro-batch-size 1 --eval-iters 1 "
            "--microbatch-group-size-per-virtual-pipeline-stage 5",
        ),
    ],
    ids=["one", "pp2-vpp2"],
)
def test_nothing_but_the_report_changes(watched: Trainer, layout: str, more: str) -> None:
    processes, layout_flags = LAYOUTS[layout]
    flags = (
        f"--train-samples 32 {DATA} --eval-iters 4 --eval-interval 2 {layout_flags} "
        f"--skyladder-start-window 8 --skyladder-expand-fraction 0.8 {more}"
    )
    plain = watched.train(flags, num_processes=processes)
    watching = watched.train(f"{flags} --skyladder-eval-lengths 8,32", num_processes=processes)
    assert watching.losses == plain.losses
    assert watching.tokens == plain.tokens
    assert watching.windows == plain.windows
    records = [(log.validations[0], log.validations[1]) for log in map(log_of, (plain, watching))]
    assert [x.loss for x in records[0]] == [x.loss for x in records[1]]
    assert not records[0][0].by_length
    assert list(records[1][0].by_length) == [8, 32, SEQ_LENGTH]
    for rank in range(processes):
        before, after = seen(plain, rank), seen(watching, rank)
        for one, other in zip(before, after, strict=True):
            rows = one.pop("rows_forward"), other.pop("rows_forward")
            assert one == other
            assert rows[1] < 2 * rows[0] or rows == (0, 0)
            assert (rows[0] > 0) == (rank == processes - 1)  # where labels are: the last stage


# --- what is counted ----------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["local", "sliding"])
@pytest.mark.parametrize("layout", ["one", "dp2", "pp2", "tp2-sp"])
def test_attention_work_is_counted_under_document_masks(
    watched: Trainer, layout: str, mask: str
) -> None:
    processes, layout_flags = LAYOUTS[layout]
    run = watched.train(
        f"--train-samples 32 --micro-batch-size 2 {layout_flags} --skyladder-intra-document "
        "--skyladder-start-window 8 --skyladder-alpha 14 --skyladder-allow-unfinished "
        f"--skyladder-mask {mask} --log-throughput",
        num_processes=processes,
        count_dense=True,
        stop_time=True,
    )
    causal = SEQ_LENGTH * (SEQ_LENGTH + 1) // 2
    data_ranks = range(2) if layout == "dp2" else range(1)
    entries = [entry for rank in data_ranks for entry in seen(run, rank)]
    for record in log_of(run).iterations:
        begun = record.consumed_samples - GLOBAL_BATCH_SIZE
        step = [entry for entry in entries if entry["samples"] == begun]
        rows = sum(entry["rows"] for entry in step)
        pairs = sum(entry["pairs"] for entry in step)
        assert rows == GLOBAL_BATCH_SIZE
        assert record.attention_fraction == pytest.approx(pairs / rows / causal, rel=TOLERANCE)
        values = record.values
        assert values["skyladder/visible_context"] == pytest.approx(
            pairs / rows / SEQ_LENGTH, rel=TOLERANCE
        )
        fragments = sum(entry["fragments"] for entry in step) / rows
        assert values["skyladder/fragments_per_row"] == pytest.approx(fragments, rel=TOLERANCE)
        # Megatron's second line is a mean with the first
        num_steps = 2 if record.iteration == 2 else 1
        first = begun - (num_steps - 1) * GLOBAL_BATCH_SIZE
        flops = sum(entry["flops"] for entry in entries if first <= entry["samples"] <= begun)
        tflops = flops / (STOPPED_SECONDS * 1e12 * processes)
        assert values["skyladder/tflops_per_gpu"] == pytest.approx(tflops, rel=TOLERANCE)
        assert values["throughput per GPU (TFLOP/s/GPU)"] == pytest.approx(tflops, abs=0.051)


def test_the_log_has_windows_rates_and_the_time_left(watched: Trainer) -> None:
    run = watched.train(
        "--train-samples 48 --micro-batch-size 2 --log-interval 2 --log-throughput "
        "--skyladder-start-window 8 --skyladder-alpha 11 --skyladder-allow-unfinished"
    )
    records = log_of(run).iterations
    assert [record.iteration for record in records] == [1, 2, 4, 6]
    assert [record.window for record in records] == [8, 19, 41, 63]  # the latest, not the mean
    assert all(record.values["skyladder/tflops_per_gpu"] > 0 for record in records)
    hours = [record.values["skyladder/hours_left"] for record in records]
    assert hours[-1] == 0
    assert all(value > 0 for value in hours[:-1])


# --- attention ----------------------------------------------------------------------------------

STATISTICS = (
    "--train-samples 32 --skyladder-start-window 20 --skyladder-alpha 22 "
    "--skyladder-allow-unfinished --skyladder-attention-stats-interval 2"
)
ATTENTION = ("max_attention_logit", "attention_entropy", "attention_sink")


def attention_of(log: RunLog) -> list[tuple[float, ...]]:
    """Return the three measures of each iteration, NaN where there is none."""
    return [
        tuple(record.values.get(f"skyladder/{name}", math.nan) for name in ATTENTION)
        for record in log.iterations
    ]


@pytest.fixture(scope="module")
def measured_by_one(watched: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of one process that measures its attention, with TensorBoard and W&B, offline."""
    folder = tmp_path_factory.mktemp("tensorboard")
    wandb = f"--wandb-project p --wandb-exp-name n --wandb-save-dir {folder}" if HAS_WANDB else ""
    run = watched.train(
        f"{STATISTICS} --micro-batch-size 4 --tensorboard-dir {folder} "
        f"{DATA.split(' --')[0]} --eval-iters 2 --eval-interval 2 --skyladder-eval-lengths 16 "
        f"{wandb}",
        environment={"WANDB_MODE": "offline"},
    )
    run.tensorboard = folder  # type: ignore[attr-defined]
    return run


def test_attention_is_measured_where_asked_and_changes_nothing(
    watched: Trainer, measured_by_one: Run
) -> None:
    without = watched.train(
        f"{STATISTICS.replace('--skyladder-attention-stats-interval 2', '')} --micro-batch-size 4 "
        f"{DATA.split(' --')[0]} --eval-iters 2 --eval-interval 2"
    )
    assert measured_by_one.losses == without.losses
    one, two, three, four = attention_of(log_of(measured_by_one))
    assert all(map(math.isnan, one + three))
    assert math.isnan(two[2])  # windows of 42: no fragment has 64 tokens
    assert 0 <= four[2] <= 1  # the window is the row of 64
    assert four[0] > 0
    # a query at place i, from 0, has at most ln(i + 1) nats
    assert 0 < two[1] < four[1] < 3.3


@pytest.mark.parametrize(
    ("layout", "flags"),
    [
        (
            "one",
            "--micro-batch-size 4 --recompute-granularity full --recompute-method uniform "
            "--recompute-num-layers 1",
        ),
        ("tp2-sp", "--micro-batch-size 4"),
        ("pp2-vpp2", "--micro-batch-size 4"),
        ("dp2", "--micro-batch-size 2"),  # two rows on each rank are the same four
        ("cp2", "--micro-batch-size 4"),
    ],
    ids=["recompute", "tp2-sp", "pp2-vpp2", "dp2", "cp2"],
)
def test_attention_is_the_same_in_every_layout(
    watched: Trainer, measured_by_one: Run, layout: str, flags: str
) -> None:
    processes, layout_flags = LAYOUTS[layout]
    run = watched.train(
        f"{STATISTICS} {flags} {layout_flags} {DATA.split(' --')[0]} --eval-iters 0",
        num_processes=processes,
    )
    wanted = attention_of(log_of(measured_by_one))
    for found, true in zip(attention_of(log_of(run)), wanted, strict=True):
        measures = slice(0, 2) if layout == "cp2" else slice(0, 3)  # 64 tokens lie on both ranks
        assert found[measures] == pytest.approx(true[measures], rel=1e-4, nan_ok=True)


def test_tensorboard_has_every_layer_and_length(measured_by_one: Run) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulators.EventAccumulator(str(measured_by_one.tensorboard))  # type: ignore[attr-defined]
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {
        f"skyladder/{name}/layer_{layer}" for name in ATTENTION for layer in range(1, 5)
    } <= tags
    assert {"skyladder/window", "skyladder/attention_fraction", "skyladder/hours_left"} <= tags
    assert "skyladder/loss_at_16 validation" in tags
    windows = [(event.step, event.value) for event in events.Scalars("skyladder/window")]
    assert windows == [(1, 20.0), (2, 42.0), (3, 64.0), (4, 64.0)]


@pytest.mark.skipif(not HAS_WANDB, reason="needs wandb")
def test_wandb_has_every_layer_and_length(measured_by_one: Run) -> None:
    folder: Path = measured_by_one.tensorboard  # type: ignore[attr-defined]
    (recorded,) = folder.rglob("run-*.wandb")  # W&B's own process wrote it
    names = set(
        re.findall(rb"skyladder/[a-z_]+(?:/layer_\d|\d+ validation)?", recorded.read_bytes())
    )
    layers = {f"skyladder/{name}/layer_{layer}" for name in ATTENTION for layer in range(1, 5)}
    values = {"skyladder/window", "skyladder/tflops_per_gpu", "skyladder/loss_at_16 validation"}
    assert {name.encode() for name in layers | values} <= names
