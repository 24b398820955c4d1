"""Jobs that stop and come back, on a real Slurm; the training is a toy."""

from __future__ import annotations

from pathlib import Path

from cluster import Cluster, wait_until
from conftest import HERE, Jobs, headline, iterations, outcomes

from megatron_skyladder.slurm.attempts import RunFolder

TOY = str(HERE / "toy.py")
START_SECONDS = 300  # on a busy machine


def has_started(run: RunFolder, attempt: int, iteration: int) -> None:
    """Wait until an attempt has written a checkpoint."""
    path = run.checkpoints / f"iter_{iteration:07}"
    wait_until(path.exists, f"attempt {attempt} to reach {iteration}", START_SECONDS)


def log_of(run: RunFolder, job: str) -> str:
    return (run.path / f"slurm-{job}.out").read_text()


def test_a_stop_file_ends_a_run_and_a_chain(cluster: Cluster, jobs: Jobs) -> None:
    flags = "--train-iters 10000"
    run, ids = jobs.submit("stop", entry=TOY, flags=flags, options=("--chain", "2"))
    has_started(run, 1, 10)
    (run.path / "stop").touch()
    for job in ids:
        cluster.wait_for(job, "COMPLETED")
    assert outcomes(run) == ["stopped"]  # the second job did not even begin
    newest = run.attempts()[0].end_iteration
    assert newest is not None and newest > 10  # it saved where it was
    assert headline(run).startswith("stopped by")
    assert "remove it and submit again" in log_of(run, ids[1])


def test_a_chain_goes_on_where_the_job_before_it_ended(cluster: Cluster, jobs: Jobs) -> None:
    run, ids = jobs.submit("chain", entry=TOY, flags="--train-iters 30", options=("--chain", "3"))
    for ended, job in enumerate(ids[:1], start=1):
        has_started(run, ended, 10)
        cluster.run("scancel", "--batch", "--signal=USR1", job)  # as Slurm before the limit
    for job in ids:
        cluster.wait_for(job, "COMPLETED")
    assert outcomes(run) == ["time limit", "finished"]
    first, second = iterations(run.attempts())
    assert first[0] == 0 and first[1] == second[0]
    assert headline(run).startswith("finished")
    assert "the next job of the chain goes on" in log_of(run, ids[0])
    assert "finished" in log_of(run, ids[2])  # and ended at once
    assert not (run.path / "attempts" / "003").exists()


def test_an_array_is_a_chain_in_one_job(cluster: Cluster, jobs: Jobs) -> None:
    run, ids = jobs.submit("array", entry=TOY, flags="--train-iters 30", options=("--array", "2"))
    has_started(run, 1, 10)
    cluster.run("scancel", "--batch", "--signal=USR1", f"{ids[0]}_1")
    for task in (1, 2):
        wait_until(
            lambda task=task: (
                "JobState=COMPLETED" in cluster.run("scontrol", "show", "job", f"{ids[0]}_{task}")
            ),
            f"task {task}",
            START_SECONDS,
        )
    assert outcomes(run) == ["time limit", "finished"]
    assert {path.name for path in run.path.glob("slurm-*.out")} == {
        f"slurm-{ids[0]}_{task}.out" for task in (1, 2)
    }


def test_a_crash_loop_ends_with_the_reason_on_top(cluster: Cluster, jobs: Jobs) -> None:
    run, (job,) = _submit_crashing(jobs)
    cluster.wait_for(job, "FAILED")
    assert outcomes(run) == ["crashed", "crashed"]  # max-tries of the example file
    assert "RuntimeError: Disk quota exceeded" in headline(run)
    assert "2 attempts in a row failed" in headline(run)
    assert cluster.show(job)["Restarts"] == "1"
    assert "Disk quota exceeded" in log_of(run, job)
    # mended and submitted again, it has all its tries again
    (run.path / "crash").unlink()
    (job,) = jobs.command(str(jobs.folder / "crash.ini"), "--submit").stdout.split()[1:2]
    cluster.wait_for(job, "COMPLETED")
    assert outcomes(run) == ["crashed", "crashed", "finished"]


def _submit_crashing(jobs: Jobs) -> tuple[RunFolder, list[str]]:
    folder = jobs.folder / "crash"
    folder.mkdir()
    (folder / "crash").touch()
    return jobs.submit("crash", entry=TOY, flags="--train-iters 10")


def test_scontrol_requeue_brings_a_run_back_and_scancel_does_not(
    cluster: Cluster, jobs: Jobs
) -> None:
    run, (job,) = jobs.submit("requeue", entry=TOY, flags="--train-iters 10000")
    has_started(run, 1, 10)
    cluster.run("scontrol", "requeue", job)
    wait_until(lambda: len(run.attempts()) == 2, "the job to come back", START_SECONDS)
    first, second = run.attempts()
    assert first.outcome == "terminated"
    assert second.start_iteration == first.end_iteration and second.start_iteration >= 10
    assert (second.job, second.restarts) == (job, 1)
    has_started(run, 2, 10 * (second.start_iteration // 10 + 1))
    cluster.run("scancel", job)
    cluster.wait_for(job, "CANCELLED")
    (attempt,) = run.path.glob("attempts/002")
    assert (attempt / "signal").read_text() == "terminated\n"


def test_templates_pass_sbatch(cluster: Cluster, jobs: Jobs, tmp_path: Path) -> None:
    """The shipped examples, on this cluster's two nodes with two fake GPUs each."""
    for path in sorted((HERE.parents[1] / "examples" / "slurm").glob("*.ini")):
        words = ("--nodes", "2", "--gpus-per-node", "2", "--run-dir", str(tmp_path / path.stem))
        for several in ((), ("--chain", "4"), ("--array", "4")):
            done = jobs.command(str(path), *words, *several, "--", "--context-parallel-size", "1")
            assert done.returncode == 0, done.stderr
            assert "to start at" in done.stderr
    refused = jobs.command(str(path), *words, "--partition", "gone")
    assert refused.returncode == 1
    assert "invalid partition specified: gone" in refused.stderr
