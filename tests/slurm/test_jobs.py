"""Jobs that stop and come back, on a real Slurm; the training is a toy."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cluster import Cluster, wait_until
from conftest import HERE, REPOSITORY, Jobs, headline, iterations, outcomes

from megatron_skyladder.slurm.attempts import RunFolder

TOY = str(HERE / "toy.py")
START_SECONDS = 300  # on a busy machine
ENDLESS = "--train-iters 1000000"
Run = tuple[RunFolder, list[str]]


@pytest.fixture(scope="module", autouse=True)
def limited_chain(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Three jobs with a time limit; Slurm takes its time for it, so they run beside the rest."""
    return Jobs(cluster, tmp_path_factory.mktemp("limited")).submit(
        "chain",
        entry=TOY,
        flags="--train-iters 30 --hold-at 10",
        slurm="time = 2",
        survival="signal-seconds = 50",  # a minute for a busy machine to start the first attempt
        options=("--chain", "3"),
    )


def has_saved(run: RunFolder, iteration: int) -> None:
    """Wait until the run has a checkpoint."""
    path = run.checkpoints / f"iter_{iteration:07}"
    wait_until(path.exists, f"{run.path.name} to reach {iteration}", START_SECONDS)


def log_of(run: RunFolder, job: str) -> str:
    return (run.path / f"slurm-{job}.out").read_text()


def test_an_array_goes_on_task_by_task_until_a_stop_file(cluster: Cluster, jobs: Jobs) -> None:
    run, (job,) = jobs.submit("array", entry=TOY, flags=ENDLESS, options=("--array", "3"))
    has_saved(run, 10)
    task = run.attempts()[0].job  # as Slurm numbers it
    cluster.warn(task)
    wait_until(lambda: len(run.attempts()) == 2, "the second task", START_SECONDS)
    begun = run.attempts()[1].start_iteration
    has_saved(run, 10 * (begun // 10 + 1))
    (run.path / "stop").touch()
    for task in (1, 2, 3):
        wait_until(
            lambda task=task: (
                "JobState=COMPLETED" in cluster.run("scontrol", "show", "job", f"{job}_{task}")
            ),
            f"task {task}",
            START_SECONDS,
        )
    assert outcomes(run) == ["time limit", "stopped"]  # the third task did not even begin
    first, second = iterations(run.attempts())
    assert first[0] == 0 and first[1] == second[0] == begun
    assert second[1] is not None and second[1] > begun  # it saved where it was
    assert headline(run).startswith("stopped by")
    assert "the next job of the chain goes on" in log_of(run, f"{job}_1")
    assert "remove it and submit again" in log_of(run, f"{job}_3")
    assert len(list(run.path.glob("slurm-*.out"))) == 3


def test_two_jobs_are_never_at_work_in_one_folder(cluster: Cluster, jobs: Jobs) -> None:
    """Not an array beside a job; not a job of another name; nor beside one that is cancelled.

    On a node each: Slurm starts nothing on a node from which a job is only leaving.
    """
    flags = f"{ENDLESS} --hold-at 11 --save-seconds 5"
    run, (first,) = jobs.submit("beside", entry=TOY, flags=flags, options=("--nodes", "1"))
    has_saved(run, 10)
    words = ("--submit", "--nodes", "1", "--array", "2")
    array = jobs.command(str(jobs.folder / "beside.ini"), *words).stdout.split()[1]
    stranger = cluster.sbatch("--job-name=stranger", str(run.path / "job.sbatch"))
    for task in (f"{stranger}_1", f"{stranger}_2"):
        cluster.wait_for(task, "FAILED")
        said = log_of(run, task)
        assert f"job {first} RUNNING is at work in {run.path}, so nothing is done here" in said
    assert outcomes(run) == ["running"]
    assert cluster.show(array)["Reason"] == "Dependency"

    cluster.run("scancel", first)
    wait_until(lambda: len(run.attempts()) == 2, "the array's first task", START_SECONDS)
    (run.path / "stop").touch()
    assert f"waiting until job {first} COMPLETING has left" in log_of(run, f"{array}_1")
    assert outcomes(run)[0] == "terminated"
    # what it saved in the end counts: nobody renamed it meanwhile
    assert iterations(run.attempts())[0] == (0, 12)
    assert run.attempts()[1].start_iteration == 12


def test_a_crash_loop_ends_with_the_reason_on_top(cluster: Cluster, jobs: Jobs) -> None:
    folder = jobs.folder / "crash"
    folder.mkdir()
    (folder / "crash").touch()
    run, (job,) = jobs.submit(
        "crash",
        entry=TOY,
        flags=ENDLESS,
        slurm="time = 20\nexport = NONE",
        variables={"A_TOKEN": "secret-of-the-toy"},
    )
    cluster.wait_for(job, "FAILED")
    assert outcomes(run) == ["crashed", "crashed"]  # max-tries of the example file
    # the secret came to the ranks, through no file and past sbatch's --export, and stays there
    assert "RuntimeError: Disk quota exceeded ***" in headline(run)
    assert all("secret" not in path.read_text() for path in run.path.glob("*.*"))
    assert "2 attempts in a row failed" in headline(run)
    assert cluster.show(job)["Restarts"] == "1"
    assert "Disk quota exceeded" in log_of(run, job)

    # repaired and submitted again, it has all its tries again
    (folder / "crash").unlink()
    (job,) = jobs.command(str(jobs.folder / "crash.ini"), "--submit").stdout.split()[1:2]
    has_saved(run, 10)
    assert outcomes(run) == ["crashed", "crashed", "running"]

    # a job that the user cancels saves, and does not come back
    cluster.run("scancel", job)
    cluster.wait_for(job, "CANCELLED")
    assert (run.attempt_folder(3) / "signal").read_text() == "terminated\n"
    assert (run.attempt_folder(3) / "leaving").exists()


def test_a_job_is_what_the_file_says_wherever_it_is_submitted(
    cluster: Cluster, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From within another job, by a user with variables for sbatch, with values to be quoted."""
    for name, value in {
        **{"SLURM_JOB_ID": "1", "SLURM_MEM_PER_NODE": "400", "SLURM_CPUS_PER_TASK": "1"},
        **{"SBATCH_PARTITION": "urgent", "SBATCH_TIMELIMIT": "3", "SBATCH_NO_REQUEUE": "1"},
        **{"SBATCH_MEM_PER_CPU": "50", "SBATCH_ARRAY_INX": "1-2", "SBATCH_JOB_NAME": "other"},
    }.items():
        monkeypatch.setenv(name, value)
    folder = jobs.folder / "try#2"
    folder.mkdir()
    (folder / "stop").touch()  # it ends before it trains
    shell = jobs.folder / "in_each_shell.sh"  # of a step, too
    shell.write_text(f'echo "memory $SLURM_MEM_PER_NODE" >> "{folder}/memory"\n')
    quoted = """comment = it's the "first" try, ticket#42\nexclude =\n    node1"""
    run, (job,) = jobs.submit(
        "try#2",
        entry=TOY,
        slurm=f"partition = batch\ntime = 20\nmem = 0\n{quoted}",
        options=("--nodes", "1"),
        variables={"BASH_ENV": str(shell)},
    )
    cluster.wait_for(job, "COMPLETED")
    found = cluster.show(job)
    assert {name: found[name] for name in ("JobName", "Partition", "TimeLimit", "Requeue")} == {
        **{"JobName": "try#2", "Partition": "batch", "TimeLimit": "00:20:00", "Requeue": "1"},
    }
    assert found["StdOut"] == f"{folder}/slurm-{job}.out" and "stopped by" in headline(run)
    assert found["ExcNodeList"] == "node1"
    assert """Comment=it's the "first" try, ticket#42""" in cluster.run(
        "scontrol", "show", "job", job
    )
    assert "400" not in (folder / "memory").read_text()


def test_the_examples_pass_sbatch_and_shellcheck(jobs: Jobs, tmp_path: Path) -> None:
    """On this cluster's two nodes with two fake GPUs each."""
    subprocess.run(["shellcheck", str(REPOSITORY / "slurm" / "job.sbatch")], check=True)
    examples = sorted((REPOSITORY / "examples" / "slurm").rglob("*.ini"))
    several = [(), ("--chain", "4"), ("--array", "4"), ("--chain", "4"), ()]
    setups = [path.read_text() for path in examples]
    for kind in ("apptainer", "pyxis", "conda activate", "module load", ".venv/bin/activate"):
        assert any(kind in setup for setup in setups), kind
    for path, options in zip(examples, several, strict=True):
        words = ("--nodes", "2", "--gpus-per-node", "2", "--run-dir", str(tmp_path / path.stem))
        words += options
        done = jobs.command(str(path), *words, "--", "--context-parallel-size", "1")
        assert done.returncode == 0, done.stderr
        assert "to start at" in done.stderr
        subprocess.run(["shellcheck", "-"], input=done.stdout, text=True, check=True)
    refused = jobs.command(str(path), *words, "--partition", "gone")
    assert refused.returncode == 1
    assert "invalid partition specified: gone" in refused.stderr


def test_a_chain_goes_on_after_the_time_limit_until_it_is_finished(
    cluster: Cluster, limited_chain: Run
) -> None:
    run, ids = limited_chain
    for job in ids:
        cluster.wait_for(job, "COMPLETED")
    assert outcomes(run) == ["time limit", "finished"]
    (begun, stopped), second = iterations(run.attempts())
    assert begun == 0 and stopped is not None
    assert 1 <= stopped <= 11  # 11 where the attempt came as far as --hold-at before the limit
    assert second == (stopped, 30)
    assert "the next job of the chain goes on" in log_of(run, ids[0])
    assert headline(run).startswith("finished")
    assert "finished" in log_of(run, ids[2])  # and ended at once
    assert not run.attempt_folder(3).exists()
