"""Megatron's training through everything a cluster does to it: the same losses at every step.

Two nodes with two ranks each; TP2 and DP2, documents masked, a window that grows.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cluster import Cluster, wait_until
from conftest import HERE, Jobs, iterations, outcomes

from megatron_skyladder.slurm.attempts import RunFolder
from megatron_skyladder.testing import requires_megatron

pytestmark = requires_megatron

STEPS, SAVE_INTERVAL, HELD_AT = 10, 4, 6
FLAGS = (
    f"--train-iters {STEPS} --save-interval {SAVE_INTERVAL} --tensor-model-parallel-size 2 "
    "--sequence-parallel --eval-iters 0 --eval-interval 100"
)
EXAMPLE = "example = 360m-8k\nvariant = skyladder-intra-document\nshrink = yes"
START_SECONDS = 400  # on a busy machine
Losses = dict[tuple[int, int, int], tuple[float, int]]


def submit(jobs: Jobs, name: str, *, held: bool = True) -> tuple[RunFolder, str]:
    variables = {"SKYLADDER_TEST_HOLD": f"1:{HELD_AT}"} if held else {}
    run, (job,) = jobs.submit(
        name, entry=str(HERE / "train.py"), flags=FLAGS, example=EXAMPLE, variables=variables
    )
    if held:
        wait_until(
            lambda: len(list(run.path.glob("held.*"))) == 4, "step 6 on all ranks", START_SECONDS
        )
    return run, job


def losses(run: RunFolder) -> Losses:
    """(rank, step, micro-batch) -> (loss, window); a step that was done twice came out the same."""
    found: Losses = {}
    for rank in range(4):
        for line in (run.path / f"losses.{rank}.jsonl").read_text().splitlines():
            entry = json.loads(line)
            key = rank, entry["step"], entry["micro_batch"]
            value = entry["loss"], entry["window"]
            assert found.setdefault(key, value) == value, f"{key} differs when done again"
    return found


@pytest.fixture(scope="module")
def straight(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Losses:
    """The losses of a run that nothing happens to."""
    run, job = submit(Jobs(cluster, tmp_path_factory.mktemp("straight")), "straight", held=False)
    cluster.wait_for(job, "COMPLETED")
    assert outcomes(run) == ["finished"]
    assert iterations(run.attempts()) == [(0, STEPS)]
    _check_run_folder(run)
    return losses(run)


def _check_run_folder(run: RunFolder) -> None:
    """What a person wants to find afterwards."""
    attempt = run.path / "attempts" / "001"
    logs = {path.name for path in attempt.glob("*.log")}
    assert logs == {f"rank.{rank:04}.log" for rank in range(4)} | {"node.0.log", "node.1.log"}
    assert f"iteration {STEPS:8d}/" in (attempt / "rank.0003.log").read_text()
    versions = json.loads((attempt / "versions.json").read_text())
    assert versions["torch"] and versions["megatron-core"]
    settings = json.loads((run.path / "settings.json").read_text())
    assert "--skyladder-intra-document" in settings["flags"]
    assert "#SBATCH --requeue" in (run.path / "job.sbatch").read_text()
    assert (run.path / "tensorboard").is_dir()


def test_a_run_nothing_happens_to(straight: Losses) -> None:
    # 4 rows a step on two data-parallel replicas: 2 micro-batches on each of 4 ranks
    assert straight.keys() == {(r, s, m) for r in range(4) for s in range(STEPS) for m in range(2)}
    windows = [straight[0, step, 0][1] for step in range(STEPS)]
    assert windows == sorted(windows) and windows[0] == 2 and windows[-1] == 128
    assert len({loss for loss, _ in straight.values()}) == 4 * STEPS  # TP ranks agree


def test_the_signal_before_the_time_limit(cluster: Cluster, jobs: Jobs, straight: Losses) -> None:
    run, job = submit(jobs, "signal")
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.wait_for(job, "COMPLETED")
    assert outcomes(run) == ["time limit", "finished"]
    saved = HELD_AT + 1  # the step is finished, then saved: nothing is lost
    assert iterations(run.attempts()) == [(0, saved), (saved, STEPS)]
    assert cluster.show(job)["Restarts"] == "1"
    assert losses(run) == straight
    assert _steps_done(run) == STEPS


def _steps_done(run: RunFolder) -> int:
    lines = (run.path / "losses.0.jsonl").read_text().splitlines()
    return len({(json.loads(line)["attempt"], json.loads(line)["step"]) for line in lines})


def test_preemption(cluster: Cluster, jobs: Jobs, straight: Losses, tmp_path: Path) -> None:
    run, job = submit(jobs, "preempted")
    script = tmp_path / "urgent.sh"
    script.write_text("#!/bin/sh\nsleep 1\n")
    urgent = cluster.sbatch(
        *("--partition=urgent", "--nodes=2", "--exclusive", f"--output={tmp_path}/urgent.out"),
        str(script),
    )
    cluster.wait_for(urgent, "COMPLETED")
    cluster.wait_for(job, "COMPLETED")
    assert outcomes(run) == ["terminated", "finished"]
    (_, saved), (resumed, _) = iterations(run.attempts())
    # whether KillWait was enough to save is the machine's business; what was saved is used
    assert saved == resumed and saved in (SAVE_INTERVAL, HELD_AT + 1)
    assert losses(run) == straight


def test_a_node_that_goes_down_while_saving(cluster: Cluster, jobs: Jobs, straight: Losses) -> None:
    run, job = submit(jobs, "down")
    # the node takes half of a checkpoint with it, and Megatron's note that it is complete
    half = run.checkpoints / "iter_0000006"
    complete = run.checkpoints / f"iter_{SAVE_INTERVAL:07}"
    half.mkdir()
    for path in complete.iterdir():
        content = path.read_bytes()
        (half / path.name).write_bytes(content[:-100] if path.suffix == ".distcp" else content)
    (run.checkpoints / "latest_checkpointed_iteration.txt").write_text("6")
    cluster.run("scontrol", "update", "nodename=node1", "state=down", "reason=test")
    wait_until(lambda: cluster.state(job) != "RUNNING", "the job to be requeued", 60)
    cluster.resume("node1")
    cluster.wait_for(job, "COMPLETED")
    assert outcomes(run)[1:] == ["finished"]
    assert outcomes(run)[0] in ("vanished", "terminated")
    assert [attempt.start_iteration for attempt in run.attempts()] == [0, SAVE_INTERVAL]
    (skipped,) = run.attempts()[1].skipped
    assert skipped.startswith("iter_0000006: __") and "bytes" in skipped
    log = (run.path / f"slurm-{job}.out").read_text()
    assert "skipped an incomplete checkpoint, iter_0000006" in log
    assert (run.checkpoints / "incomplete_iter_0000006.1").is_dir()
    assert losses(run) == straight
