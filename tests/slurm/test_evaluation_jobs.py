"""A run with [evaluate], on a real Slurm: the array waits for it, and real lm-eval answers."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from cluster import Cluster
from conftest import HERE, REPOSITORY, Jobs

pytest.importorskip("lm_eval", reason="make test-evaluate installs it; .ci/run does that first")
for name in ("hugging_face", "unit"):
    sys.path.append(str(REPOSITORY / "tests" / name))

TOY = str(HERE / "toy.py")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten made-up questions in the place of two benchmarks."""
    from prepare_inputs import make_texts

    from megatron_skyladder.evaluation.data import DataFolder, Question
    from megatron_skyladder.evaluation.tasks import FORMULATIONS

    folder = tmp_path_factory.mktemp("data")
    texts = make_texts(40, seed=3)
    questions = [
        Question(str(n), (f"Question: {texts[n][:60]}\nAnswer:",), (" a", " bc"), n % 2)
        for n in range(10)
    ]
    written = DataFolder(folder)
    for task in ("arc_challenge", "openbookqa"):
        for formulation in FORMULATIONS:
            written.write(f"standard/{task}.{formulation}.jsonl", task, questions, "made up")
    return folder


def make_model(folder: Path) -> None:
    from prepare_inputs import make_hf_folder
    from random_models import LLAMA, write_model

    write_model(folder, replace(LLAMA, vocab_size=300, max_positions=2048))
    make_hf_folder(folder)


def section(data: Path) -> str:
    return f"\n[evaluate]\ndata = {data}\ntasks = arc_challenge openbookqa\ngpus = 0\ntime = 20\n"


def test_the_array_runs_behind_a_finished_run(cluster: Cluster, jobs: Jobs, data: Path) -> None:
    """The toy trains; what is evaluated in its checkpoints' place is a random Llama."""
    (jobs.folder / "trained").mkdir()
    make_model(jobs.folder / "trained" / "checkpoints")
    run, ids = jobs.submit(
        "trained",
        entry=TOY,
        flags="--train-iters 30",
        more=section(data),
        variables={"A_TOKEN": "x"},
    )
    array = jobs.printed[1].removeprefix("evaluation after it: ").partition(",")[0]
    for job in (*ids, f"{array}_0", f"{array}_1"):
        cluster.wait_for(job, "COMPLETED")
    results = run.path / "evaluation" / "trained" / "results"
    for task in ("arc_challenge", "openbookqa"):
        found = json.loads((results / f"{task}.sampled.json").read_text())
        assert len(found["ids"]) == 10 and found["model"] == "trained"
    log = (run.path / "evaluation" / f"slurm-{array}_1.out").read_text()
    assert f"openbookqa of {run.checkpoints}" in log


def test_a_run_that_fails_is_not_evaluated(cluster: Cluster, jobs: Jobs, data: Path) -> None:
    (jobs.folder / "failing").mkdir()
    (jobs.folder / "failing" / "crash").touch()
    run, (job,) = jobs.submit(
        "failing",
        survival="max-tries = 1",
        entry=TOY,
        flags="--train-iters 30",
        more=section(data),
        variables={"A_TOKEN": "x"},
    )
    array = jobs.printed[1].removeprefix("evaluation after it: ").partition(",")[0]
    cluster.wait_for(job, "FAILED")
    cluster.wait_for(f"{array}_0", "FAILED")
    log = (run.path / "evaluation" / f"slurm-{array}_0.out").read_text()
    assert "the run is not finished, so nothing is evaluated" in log


def test_the_script_passes_shellcheck_and_sbatch(jobs: Jobs, data: Path) -> None:
    script = REPOSITORY / "slurm" / "evaluate.sbatch"
    subprocess.run(["shellcheck", "--exclude=SC2154,SC2153", str(script)], check=True)
    path = jobs.folder / "printed.ini"
    path.write_text(f"[run]\nfolder = {jobs.folder / 'printed'}\nentry = {TOY}\n{section(data)}")
    done = jobs.command(str(path), "--evaluate")
    assert done.returncode == 0 and "to start at" in done.stderr, done.stderr
    subprocess.run(["shellcheck", "-"], input=done.stdout, text=True, check=True)
