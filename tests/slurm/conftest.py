"""One cluster for all tests of this folder, which run with ``-m slurm`` only: make test-slurm."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from cluster import Cluster, why_not

from megatron_skyladder.slurm.attempts import Attempt, RunFolder

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
SHOWN_LINES = 40  # of each file, where a test fails


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests of this folder, and leave them out unless they are asked for."""
    asked_for = "slurm" in config.option.markexpr
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slurm)
            if not asked_for:
                item.add_marker(pytest.mark.skip(reason="make test-slurm runs these"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what the jobs of a test that failed have printed: their folders are gone by then."""
    report = yield
    jobs = getattr(item, "funcargs", {}).get("jobs")
    if report.failed and isinstance(jobs, Jobs):
        for pattern in ("slurm-*.out", "status.txt"):
            for path in sorted(jobs.folder.rglob(pattern)):
                lines = path.read_text(errors="replace").splitlines()[-SHOWN_LINES:]
                report.sections.append((str(path.relative_to(jobs.folder)), "\n".join(lines)))
    return report


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Who asks for these tests wants them run: what is missing is a failure, not a skip."""
    reason = why_not()
    assert reason is None, f"no Slurm can be started here: it {reason}"
    with Cluster() as running:
        yield running


class Jobs:
    """Submits runs through ``skyladder slurm`` and looks into their folders."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        self.printed: list[str] = []

    def submit(
        self,
        name: str,
        *,
        entry: str,
        flags: str = "",
        example: str = "",
        slurm: str = "time = 20",
        survival: str = "max-tries = 2",
        variables: dict[str, str] | None = None,
        options: tuple[str, ...] = (),
        more: str = "",
    ) -> tuple[RunFolder, list[str]]:
        """Write an example file, submit it, and return the run and the jobs' ids.

        `more` are further sections; what was printed is kept in ``printed``.
        """
        path = self.folder / f"{name}.ini"
        assignments = "\n".join(f"{key} = {value}" for key, value in (variables or {}).items())
        path.write_text(
            f"[run]\n{example}\nfolder = {self.folder / name}\nentry = {entry}\nflags = {flags}\n"
            "[slurm]\nnodes = 2\ngpus-per-node = 0\nranks-per-node = 2\n"
            f"cpus-per-task = 2\n{slurm}\n"
            f"[environment]\npython = {sys.executable}\n"
            f"[survival]\n{survival}\n"
            f"[variables]\nPYTHONPATH = {REPOSITORY}\nSKYLADDER_DEVICE = cpu\n"
            f"OMP_NUM_THREADS = 1\n{assignments}\n{more}"
        )
        done = self.command(str(path), "--submit", *options)
        assert done.returncode == 0, done.stderr
        self.printed = done.stdout.splitlines()
        ids = done.stdout.splitlines()[0].removeprefix("submitted ").split(", ")
        return RunFolder(self.folder / name), ids

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run ``skyladder slurm``."""
        return subprocess.run(
            [sys.executable, "-m", "megatron_skyladder", "slurm", *words],
            env={**self.cluster.environment, "PYTHONPATH": str(REPOSITORY)},
            cwd=os.path.expanduser("~"),
            capture_output=True,
            text=True,
        )


@pytest.fixture
def jobs(cluster: Cluster, tmp_path: Path) -> Jobs:
    return Jobs(cluster, tmp_path)


def outcomes(run: RunFolder) -> list[str]:
    """How the attempts of a run ended."""
    return [attempt.outcome for attempt in run.attempts()]


def iterations(attempts: list[Attempt]) -> list[tuple[int, int | None]]:
    """Where the attempts of a run began and ended."""
    return [(attempt.start_iteration, attempt.end_iteration) for attempt in attempts]


def headline(run: RunFolder) -> str:
    """The first line of a run's status."""
    return (run.path / "status.txt").read_text().splitlines()[0]
