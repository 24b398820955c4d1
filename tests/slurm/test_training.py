"""Megatron's training through everything a cluster does to it: the same losses at every step.

Two nodes with two ranks each; TP2 and DP2, documents masked, a window that grows.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cluster import Cluster, wait_until
from conftest import HERE, Jobs, headline, iterations, outcomes

from megatron_skyladder.report.runlog import read_run
from megatron_skyladder.slurm.attempts import RunFolder
from megatron_skyladder.testing import requires_megatron

pytestmark = requires_megatron

STEPS, SAVE_INTERVAL = 12, 4
# in front of these steps the attempts wait for what happens to them
TIME_LIMIT, PREEMPTION, NODE_DOWN, REQUEUE = HELD_AT = (2, 5, 8, 10)
FLAGS = (
    f"--train-iters {STEPS} --save-interval {SAVE_INTERVAL} --tensor-model-parallel-size 2 "
    "--sequence-parallel --eval-iters 0 --eval-interval 100"
)
EXAMPLE = "example = 360m-8k\nvariant = skyladder-intra-document\nshrink = yes"
START_SECONDS = 400  # on a busy machine
Losses = dict[tuple[int, int, int], tuple[float, int]]


def submit(jobs: Jobs, name: str, held_at: tuple[int, ...] = ()) -> tuple[RunFolder, str]:
    variables = {"SKYLADDER_TEST_HOLD": " ".join(map(str, held_at))}
    run, (job,) = jobs.submit(
        name, entry=str(HERE / "train.py"), flags=FLAGS, example=EXAMPLE, variables=variables
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
def straight(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run that nothing happens to."""
    run, job = submit(Jobs(cluster, tmp_path_factory.mktemp("straight")), "straight")
    cluster.wait_for(job, "COMPLETED")
    return run


def test_a_run_nothing_happens_to(straight: RunFolder) -> None:
    assert outcomes(straight) == ["finished"]
    assert iterations(straight.attempts()) == [(0, STEPS)]
    found = losses(straight)
    # 4 rows a step on two data-parallel replicas: 2 micro-batches on each of 4 ranks
    assert found.keys() == {(r, s, m) for r in range(4) for s in range(STEPS) for m in range(2)}
    windows = [found[0, step, 0][1] for step in range(STEPS)]
    assert windows == sorted(windows) and windows[0] == 2 and windows[-1] == 128
    assert len({loss for loss, _ in found.values()}) == 4 * STEPS  # TP ranks agree


def test_what_a_run_leaves_behind(straight: RunFolder) -> None:
    attempt = straight.attempt_folder(1)
    logs = {path.name for path in attempt.glob("*.log")}
    assert logs == {f"rank.{rank:04}.log" for rank in range(4)} | {"node.0.log", "node.1.log"}
    assert f"iteration {STEPS:8d}/" in (attempt / "rank.0003.log").read_text()
    log = read_run(straight.path)  # as `skyladder report` and `plan --calibrate` read it
    assert [record.iteration for record in log.iterations] == list(range(1, STEPS + 1))
    assert (log.num_gpus, log.seq_length, log.num_attempts) == (4, 128, 1)
    assert log.schedule is not None and log.iterations[-1].window == 128
    versions = json.loads((attempt / "versions.json").read_text())
    assert versions["torch"] and versions["megatron-core"]
    settings = json.loads((straight.path / "settings.json").read_text())
    assert "--skyladder-intra-document" in settings["flags"]
    assert "#SBATCH --requeue" in (straight.path / "job.sbatch").read_text()
    assert (straight.path / "tensorboard").is_dir()


def test_a_run_that_everything_happens_to(
    cluster: Cluster, jobs: Jobs, straight: RunFolder, tmp_path: Path
) -> None:
    """One job; each attempt ends in another way, and the next one goes on."""
    run, job = submit(jobs, "eventful", HELD_AT)

    wait_until_held(run, 1)
    cluster.warn(job)  # ahead of the time limit
    wait_until_held(run, 2)
    preempt(cluster, tmp_path)
    wait_until_held(run, 3)
    leave_half_a_checkpoint(run, NODE_DOWN, NODE_DOWN + 1)
    cluster.fail("node1")
    wait_until(lambda: cluster.state(job) != "RUNNING", "the job to be requeued", 60)
    cluster.repair("node1")
    wait_until_held(run, 4)
    cluster.run("scontrol", "requeue", job)
    cluster.wait_for(job, "COMPLETED")

    limited, preempted, down, requeued, last = run.attempts()
    assert cluster.show(job)["Restarts"] == "4"
    assert limited.outcome == "time limit"
    # the step is finished, then saved: nothing is lost
    assert limited.end_iteration == TIME_LIMIT + 1 == preempted.start_iteration
    assert preempted.outcome == requeued.outcome == "terminated"
    # whether KillWait was enough to save is the machine's business; what was saved is used
    assert preempted.end_iteration == down.start_iteration
    assert down.start_iteration in (SAVE_INTERVAL, PREEMPTION + 1)
    # whether the job script or the other node's ranks saw it first is the machine's business too
    assert down.outcome in ("vanished", "terminated", "crashed")
    assert requeued.start_iteration == NODE_DOWN  # not the incomplete one after it
    assert requeued.end_iteration == last.start_iteration in (NODE_DOWN, REQUEUE + 1)
    assert (last.outcome, last.end_iteration) == ("finished", STEPS)
    assert losses(run) == losses(straight)

    (skipped,) = requeued.skipped
    assert skipped.startswith(f"iter_{NODE_DOWN + 1:07}: __") and "bytes" in skipped
    log = (run.path / f"slurm-{job}.out").read_text()
    assert f"skipped an incomplete checkpoint, iter_{NODE_DOWN + 1:07}" in log
    assert (run.checkpoints / f"incomplete_iter_{NODE_DOWN + 1:07}.1").is_dir()


def test_a_checkpoint_that_cannot_be_read_is_no_finished_run(jobs: Jobs, tmp_path: Path) -> None:
    """Megatron leaves with exit code 0 there, which Slurm would take for the end of training."""
    elsewhere = tmp_path / "elsewhere"
    for rank in range(2):
        folder = elsewhere / f"iter_0000004/mp_rank_{rank:02}"
        folder.mkdir(parents=True)
        (folder / "model_optim_rng.pt").write_bytes(b"not a checkpoint")
    (elsewhere / "latest_checkpointed_iteration.txt").write_text("4")
    run, (job,) = jobs.submit(
        "unreadable",
        entry="megatron_skyladder.pretrain_gpt",
        flags=f"{FLAGS} --ckpt-format torch --load {elsewhere}",
        example=EXAMPLE,
        survival="max-tries = 1",
    )
    jobs.cluster.wait_for(job, "FAILED")
    assert outcomes(run) == ["crashed"] and not run.is_finished
    assert "Megatron could not read the checkpoint (it says why above)" in headline(run)
    assert headline(run).startswith("gave up: rank ")


def wait_until_held(run: RunFolder, attempt: int) -> None:
    folder = run.attempt_folder(attempt)
    wait_until(
        lambda: len(list(folder.glob("held.*"))) == 4,
        f"attempt {attempt} to come to step {HELD_AT[attempt - 1]} on all ranks",
        START_SECONDS,
    )


def preempt(cluster: Cluster, folder: Path) -> None:
    """Run a job that needs both nodes, in the partition that may evict others."""
    script = folder / "urgent.sh"
    script.write_text("#!/bin/sh\nsleep 1\n")
    urgent = cluster.sbatch(
        *("--partition=urgent", "--nodes=2", "--exclusive", f"--output={folder}/urgent.out"),
        str(script),
    )
    cluster.wait_for(urgent, "COMPLETED")


def leave_half_a_checkpoint(run: RunFolder, complete: int, half: int) -> None:
    """Leave what a node takes with it while saving, and Megatron's note that it is complete."""
    folder = run.checkpoints / f"iter_{half:07}"
    folder.mkdir()
    for path in (run.checkpoints / f"iter_{complete:07}").iterdir():
        content = path.read_bytes()
        (folder / path.name).write_bytes(content[:-100] if path.suffix == ".distcp" else content)
    (run.checkpoints / "latest_checkpointed_iteration.txt").write_text(str(half))
