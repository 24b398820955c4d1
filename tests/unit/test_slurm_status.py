"""How a run stands, in each of the states that it can be in, from its folder alone."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from test_runlog import ARGUMENTS, line
from test_slurm_attempts import Run

from megatron_skyladder.cli import main
from megatron_skyladder.slurm import status
from megatron_skyladder.slurm.settings import Environment, Settings

FLAGS = ("--seq-length", "128", "--train-iters", "40")


def make(path: Path, flags: tuple[str, ...] = FLAGS) -> Run:
    path.mkdir(parents=True)
    run = Run(path)
    settings = Settings(str(path), flags, "entry", 1, 2, 0, {}, Environment(), max_tries=2)
    run.settings = settings
    (path / "settings.json").write_text(settings.to_json())
    (path / "submitted").touch()
    return run


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[0-1]")
    return make(tmp_path / "runs" / "mine")


def log(run: Run, *iterations: int, extra: str = "") -> None:
    """Write what the ranks of the latest attempt print."""
    lines = "\n".join(line(i, 4.0, window=8.0 * i, extra=extra) for i in iterations)
    (run.attempt_folder() / "rank.0000.log").write_text(ARGUMENTS)
    (run.attempt_folder() / "rank.0011.log").write_text(lines + "\n")


def of(run: Run) -> status.Status:
    return status.status_of(run.folder.path)


def test_a_run_through_its_states(run: Run) -> None:
    found = of(run)
    assert (found.state, found.attempts, found.iteration, found.checkpoint) == (
        *("submitted", 0, None, 0),
    )
    run.begin()
    assert of(run).state == "running" and of(run).iteration is None
    log(run, 1, 2, 3, extra=" skyladder/hours_left: 1.5 |")
    found = of(run)
    assert (found.iteration, found.total_iterations, found.window) == (3, 40, 24)
    assert (found.tokens, found.hours_left) == (3 * 4 * 128, 1.5)
    assert (found.job, found.hosts, found.reason) == ("77", "node[0-1]", "")
    (run.attempt_folder() / "signal").write_text("time limit")
    assert of(run).state == "saving"
    run.save(3)
    run.end(signal="time limit")
    found = of(run)
    assert (found.state, found.checkpoint, found.reason) == ("waiting", 3, "time limit")
    run.begin()  # without a training line yet: what is known is the attempt's before
    assert (of(run).attempts, of(run).iteration) == (2, 3)
    (run.folder.path / "stop").touch()
    assert of(run).state == "stopping"
    run.end()
    assert of(run).state == "stopped"
    (run.folder.path / "stop").unlink()
    run.begin()
    (run.folder.path / "finished").touch()
    run.end()
    assert (of(run).state, of(run).hours_left) == ("finished", None)


def test_a_run_that_gave_up_and_was_submitted_again(run: Run) -> None:
    for attempt in (1, 2):
        run.begin()
        run.error(1, 2.0, "OutOfMemoryError: CUDA out of memory")
        run.end(exit_code=1)
        assert of(run).state == ("gave up" if attempt == 2 else "waiting")
    found = of(run)
    assert (found.failed, found.max_tries) == (2, 2)
    assert found.reason == "crashed: rank 1: OutOfMemoryError: CUDA out of memory"
    later = time.time() + 1
    os.utime(run.folder.path / "submitted", (later, later))
    assert (of(run).state, of(run).failed) == ("waiting", 0)


def test_a_run_whose_checkpoints_are_lost(run: Run) -> None:
    run.begin()
    run.save(3000)
    run.end(signal="time limit")
    shutil.rmtree(run.folder.checkpoints / "iter_0003000")
    found = of(run)
    assert (found.state, found.checkpoint) == ("gave up", 0)
    assert found.reason == "no checkpoint is left, and iteration 3,000 was saved once"
    (run.folder.path / "finished").touch()
    assert (of(run).state, of(run).reason) == ("finished", "time limit")


def test_a_run_that_is_silent(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.begin()
    log(run, 1)
    assert not of(run).is_silent
    before = time.time() - 3 * 3600
    for path in run.attempt_folder().glob("rank.*.log"):
        os.utime(path, (before, before))
    assert main(["slurm", "status", str(run.folder.path)]) == 0
    assert "last word 3 h ago: is the job still there? (squeue)" in capsys.readouterr().out


def test_hours_left_of_a_run_that_does_not_log_them(run: Run) -> None:
    run.begin()
    log(run, 1, 4)
    assert of(run).hours_left == pytest.approx(36 * 0.1 / 3600)
    log(run, 4, extra=" skyladder/hours_left: nan |")
    assert of(run).hours_left == pytest.approx(36 * 0.1 / 3600)


def test_tokens_of_a_script_that_knows_its_rows_by_itself(tmp_path: Path) -> None:
    run = make(tmp_path / "run", flags=())
    run.begin()
    log(run, 5)
    assert of(run).tokens == 5 * 4 * 128


def test_tokens_of_a_run_that_went_on_with_longer_sequences(run: Run) -> None:
    run.begin()
    log(run, 1, 2, 3)
    run.end()
    settings = (run.folder.path / "settings.json").read_text().replace('"128"', '"512"')
    (run.folder.path / "settings.json").write_text(settings)  # --allow-changes
    assert of(run).tokens == 3 * 4 * 128
    run.begin()
    log(run, 4, 5)
    head = run.attempt_folder() / "rank.0000.log"
    head.write_text(ARGUMENTS.replace(" 128\n", " 512\n"))
    assert of(run).tokens == 3 * 4 * 128 + 2 * 4 * 512


def test_the_end_of_a_long_log_is_enough(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "TAIL_BYTES", 2000)
    run.begin()
    log(run, *range(1, 40))
    with (run.attempt_folder() / "rank.0011.log").open("a") as file:
        file.write("a warning of some library\n" * 5)
    assert of(run).iteration == 39


@pytest.mark.parametrize("speaker", ["first", "last", "none"])
def test_of_thousands_of_ranks_only_the_first_and_the_last_are_asked(
    run: Run, monkeypatch: pytest.MonkeyPatch, speaker: str
) -> None:
    """Megatron's last rank prints training lines, Bridge's first; a start may have none yet."""
    run.begin()
    for rank in range(12):
        (run.attempt_folder() / f"rank.{rank:04}.log").write_text("building the model\n")
    if speaker != "none":
        number = {"first": 0, "last": 11}[speaker]
        (run.attempt_folder() / f"rank.{number:04}.log").write_text(line(7, 4.0) + "\n")
    read: set[str] = set()
    part = status._part

    def noted(path: Path, num_bytes: int) -> str:
        read.add(path.name)
        return part(path, num_bytes)

    monkeypatch.setattr(status, "_part", noted)
    assert of(run).iteration == (None if speaker == "none" else 7)
    assert read <= {"rank.0000.log", "rank.0011.log"}


def test_the_command(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run.begin()
    log(run, 1, 2, extra=" skyladder/hours_left: 12.34 |")
    make(tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(["slurm", "status"]) == 0
    first, second = capsys.readouterr().out.split("\n\n")
    assert first == "other: submitted, not begun yet\n" + "\n".join(
        ["  checkpoint  none yet", "  tries       0 of 2 failed in a row"]
    )
    assert second.splitlines() == [
        "runs/mine: running, attempt 1, job 77 on node[0-1], last word 0 s ago",
        "  iteration   2 of 40",
        "  checkpoint  none yet",
        "  window      16 tokens",
        "  trained on  1,024 tokens",
        "  left        12.3 hours",
        "  tries       0 of 2 failed in a row",
    ]
    for words in (["runs/mine", "--json"], ["--json", "runs/mine"]):
        assert main(["slurm", "status", *words]) == 0
        (found,) = json.loads(capsys.readouterr().out)
        assert (found["state"], found["iteration"], found["window"]) == ("running", 2, 16)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["status"], "there is no run folder here or two levels below"),
        (["status", "nowhere"], "nowhere is no run folder: it has no settings.json"),
        (["status", "file"], "file is no run folder"),
        (["file", "runs"], "RUN_DIR and --json go with `skyladder slurm status` only"),
    ],
)
def test_what_is_no_run(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert main(["slurm", *words]) == 1
    assert message in capsys.readouterr().err
