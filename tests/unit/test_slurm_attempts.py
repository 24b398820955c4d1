"""When a run goes on, when it has ended, and when it gives up."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_skyladder.slurm import attempts, gate, node
from megatron_skyladder.slurm.attempts import RunFolder, failure_reason
from megatron_skyladder.slurm.checkpoints import TRACKER
from megatron_skyladder.slurm.settings import BRIDGE_ENTRY, Environment, Settings

TRAIN, GAVE_UP, NOTHING_TO_DO, GO_ON = 0, 11, 12, 13  # as job.sbatch has them


class Run:
    """A run folder and what happens to it."""

    def __init__(self, path: Path, max_tries: int = 3) -> None:
        self.folder = RunFolder(path)
        self.folder.checkpoints.mkdir()
        self.settings = Settings(
            str(path), (), "entry", 1, 1, 0, {}, Environment(), max_tries=max_tries
        )

    def begin(self) -> int:
        return gate.begin(self.folder, self.settings)

    def end(self, exit_code: int = 0, signal: str = "") -> int:
        return gate.end(self.folder, self.settings, exit_code, signal)

    def save(self, iteration: int) -> None:
        (self.folder.checkpoints / f"iter_{iteration:07}" / "mp_rank_00").mkdir(parents=True)
        (self.folder.checkpoints / TRACKER).write_text(str(iteration))

    def attempt_folder(self) -> Path:
        return Path((self.folder.path / "attempt").read_text().strip())

    def error(self, rank: int, seconds: float, message: str) -> None:
        report = {"rank": rank, "time": seconds, "message": message}
        (self.attempt_folder() / f"error.{rank:04}.json").write_text(json.dumps(report))

    @property
    def headline(self) -> str:
        return (self.folder.path / "status.txt").read_text().splitlines()[0]

    @property
    def outcomes(self) -> list[str]:
        return [attempt.outcome for attempt in self.folder.attempts()]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[0-1]")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    return Run(tmp_path)


def test_the_exit_codes_are_those_of_the_job_script() -> None:
    assert (gate.TRAIN, gate.GAVE_UP) == (TRAIN, GAVE_UP)
    assert (gate.NOTHING_TO_DO, gate.GO_ON) == (NOTHING_TO_DO, GO_ON)


def test_a_run_to_its_end(run: Run) -> None:
    assert run.begin() == TRAIN
    assert run.headline == "training, attempt 1, from the beginning"
    run.save(500)
    assert run.end(signal="time limit") == GO_ON
    assert run.headline == "waiting to go on from iteration 500 (time limit)"
    assert run.begin() == TRAIN
    assert run.headline == "training, attempt 2, from iteration 500"
    run.save(1000)
    (run.folder.path / "finished").touch()
    assert run.end() == NOTHING_TO_DO
    assert run.begin() == NOTHING_TO_DO
    assert run.headline.startswith("finished; to train on, remove")
    assert run.outcomes == ["time limit", "finished"]  # the third start was none
    first, second = run.folder.attempts()
    assert (first.start_iteration, first.end_iteration) == (0, 500)
    assert (second.start_iteration, second.end_iteration) == (500, 1000)
    assert (first.job, first.hosts, first.restarts) == ("77", "node[0-1]", 0)


def test_a_run_that_begins_from_another_ones_checkpoint(run: Run) -> None:
    """Its flags' --load counts until it has a checkpoint of its own."""
    settings = replace(run.settings, flags=("--load", "/stock", "--lr", "1"))
    (run.folder.path / "settings.json").write_text(settings.to_json())
    environment = {"MASTER_ADDR": "alpha", "MASTER_PORT": "7"}

    def loads_from() -> str:
        words = node.command(run.folder, settings, environment)
        return words[len(words) - words[::-1].index("--load")]

    for _ in range(2):
        assert run.begin() == TRAIN
        assert run.headline.endswith("from /stock") and loads_from() == "/stock"
        run.end(exit_code=1)
    run.begin()
    run.save(1_000_010)
    run.end(signal="time limit")
    run.begin()
    assert run.headline.endswith("from iteration 1,000,010")
    assert loads_from() == str(run.folder.checkpoints)


# as `skyladder import-hf` prints them, and some more
IMPORTED = [
    *("--load", "/imported", "--finetune", "--no-load-optim", "--no-load-rng", "--lr", "1"),
    "--ckpt-step=7",
]
FIRST_ONLY = ["--finetune", "--no-load-optim", "--no-load-rng", "--ckpt-step=7"]


def command_words(run: Run, *flags: str, entry: str = "entry") -> list[str]:
    """What is trained with, behind the entry, in the latest attempt."""
    run.settings = replace(run.settings, flags=flags, entry=entry)
    (run.folder.path / "settings.json").write_text(run.settings.to_json())
    words = node.command(run.folder, run.settings, {"MASTER_ADDR": "a", "MASTER_PORT": "7"})
    return words[words.index(entry) + 1 :]


def test_flags_of_the_first_load_are_left_out_of_later_ones(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    """Or Megatron sets iteration and samples to 0, and drops Adam, each time a job comes back."""
    caplog.set_level("INFO", logger="megatron_skyladder.slurm")
    for _ in range(2):  # no checkpoint yet: it begins as it was asked to
        command_words(run, *IMPORTED)
        run.begin()
        assert command_words(run, *IMPORTED)[: len(IMPORTED)] == IMPORTED
        run.end(exit_code=1)
    run.begin()
    run.save(10)
    run.end(signal="time limit")
    assert "left out" not in caplog.text
    run.begin()
    assert command_words(run, *IMPORTED)[:5] == ["--load", "/imported", "--lr", "1", "--save"]
    message = "left out, as the run's own checkpoint is loaded, with all that it holds: "
    assert message + " ".join(FIRST_ONLY) in caplog.text


def test_what_is_not_saved_is_not_loaded(run: Run) -> None:
    run.save(10)
    run.begin()
    flags = ("--no-save-optim", "--no-load-optim", "--no-load-rng", "--ckpt-step", "7", "--lr", "1")
    assert command_words(run, *flags)[:4] == ["--no-save-optim", "--no-load-optim", "--lr", "1"]
    flags = ("--no-save-rng", "--no-load-optim", "--no-load-rng")
    assert command_words(run, *flags)[:2] == ["--no-save-rng", "--no-load-rng"]
    overrides = ("checkpoint.save_optim=False", "checkpoint.load_optim=false")
    assert command_words(run, *overrides, entry=BRIDGE_ENTRY)[:2] == list(overrides)
    overrides = ("checkpoint.save_rng=false", "checkpoint.load_rng=false")
    assert command_words(run, *overrides, entry=BRIDGE_ENTRY)[:2] == list(overrides)


def test_where_a_run_of_bridge_begins(run: Run) -> None:
    """Its overrides count until it has a checkpoint of its own, as flags do."""
    flags = (
        *("--recipe", "r", "checkpoint.load=/base", "checkpoint.finetune=true"),
        *("+checkpoint.load_optim=false", "train.train_iters=7"),
    )
    command_words(run, *flags, entry=BRIDGE_ENTRY)
    run.begin()
    assert run.headline.endswith("from /base")
    words = command_words(run, *flags, entry=BRIDGE_ENTRY)
    assert words[: len(flags)] == list(flags)
    loads = [word for word in words if word.startswith("checkpoint.load=")]
    assert loads == ["checkpoint.load=/base"] * 2
    run.save(10)
    run.begin()
    assert run.headline.endswith("from iteration 10")
    words = command_words(run, *flags, entry=BRIDGE_ENTRY)
    assert words[:5] == [
        *("--recipe", "r", "checkpoint.load=/base", "train.train_iters=7"),
        "checkpoint.finetune=false",  # a recipe for a longer context has it on
    ]
    loads = [word for word in words if word.startswith("checkpoint.load=")]
    assert loads[-1] == f"checkpoint.load={run.folder.checkpoints}"


@pytest.mark.parametrize("nothing", ["null", "NULL", "~"])
def test_a_run_of_bridge_that_loads_nothing_has_its_own_folder(run: Run, nothing: str) -> None:
    words = command_words(run, f"checkpoint.load={nothing}", entry=BRIDGE_ENTRY)
    loads = [word for word in words if word.startswith("checkpoint.load=")]
    assert loads[-1] == f"checkpoint.load={run.folder.checkpoints}"


def test_checkpoints_of_bridge_are_looked_for_where_its_overrides_say(run: Run) -> None:
    overrides = (
        *("--recipe", "r", "checkpoint.non_persistent_ckpt_type=global"),
        *("++checkpoint.ckpt_format='fsdp_dtensor'", "model.x=1"),
    )
    command_words(run, *overrides, entry=BRIDGE_ENTRY)
    assert run.folder.flags == {
        "--non-persistent-ckpt-type": "global",
        "--ckpt-format": "fsdp_dtensor",
    }


def test_finished_counts_even_where_the_step_failed_afterwards(run: Run) -> None:
    run.begin()
    (run.folder.path / "finished").touch()
    assert run.end(exit_code=139) == NOTHING_TO_DO  # a library that crashes while leaving


def test_a_stop_file(run: Run) -> None:
    run.begin()
    (run.folder.path / "stop").touch()
    run.save(42)
    assert run.end() == NOTHING_TO_DO
    assert run.headline.startswith("stopped at iteration 42 by")
    assert run.begin() == NOTHING_TO_DO
    (run.folder.path / "stop").unlink()
    assert run.begin() == TRAIN
    assert run.outcomes == ["stopped", "running"]


def test_a_stop_file_counts_whatever_else_happens(run: Run) -> None:
    run.begin()
    (run.folder.path / "stop").touch()
    assert run.end(signal="time limit") == NOTHING_TO_DO


def test_crashes_in_a_row(run: Run) -> None:
    for attempt in (1, 2, 3):
        assert run.begin() == TRAIN
        run.error(2, 5.0, f"RuntimeError: number {attempt}")
        assert run.end(exit_code=1) == (GO_ON if attempt < 3 else GAVE_UP)
    assert run.headline == (
        "gave up: rank 2: RuntimeError: number 3 (3 attempts in a row failed without a new "
        "checkpoint; fix the cause and submit again)"
    )
    assert run.begin() == GAVE_UP  # the next job of a chain
    assert len(run.outcomes) == 3


def test_progress_gives_all_tries_back(run: Run) -> None:
    for attempt in range(1, 6):  # each crashes, but leaves a checkpoint before that
        assert run.begin() == TRAIN
        run.save(attempt)
        assert run.end(exit_code=1) == GO_ON


def test_preemption_is_no_failure_and_hides_none(run: Run) -> None:
    answers = []
    for _ in range(3):
        run.begin()
        (run.attempt_folder() / "signal").write_text("terminated\n")  # and killed, with no end
        run.begin()
        answers.append(run.end(exit_code=1))
    assert answers == [GO_ON, GO_ON, GAVE_UP]
    assert run.outcomes == ["terminated", "crashed"] * 3


def test_a_node_that_fails_without_a_word_counts(run: Run) -> None:
    for _ in range(3):
        assert run.begin() == TRAIN
    assert run.begin() == GAVE_UP
    assert run.outcomes == ["vanished"] * 3
    assert "gave up: it ended without a word" in run.headline


def test_an_end_that_nobody_noted_is_noted_by_the_next_start(run: Run) -> None:
    """The check after training failed; the job script had written how training ended."""
    for code in ("1", "0", ""):  # an empty file: the disk was full
        run.begin()
        (run.attempt_folder() / "exit").write_text(f"{code}\n")
        if code == "1":
            run.error(3, 5.0, "ValueError: too far")
        if code == "0":
            run.save(20)
            (run.attempt_folder() / "signal").write_text("time limit\n")
    assert run.begin() == TRAIN
    assert run.outcomes == ["crashed", "time limit", "vanished", "running"]
    first, second = run.folder.attempts()[:2]
    assert first.reason == "rank 3: ValueError: too far"
    assert (second.start_iteration, second.end_iteration) == (0, 20)
    (run.attempt_folder() / "exit").write_text("0\n")
    (run.folder.path / "finished").touch()
    assert run.begin() == NOTHING_TO_DO
    assert run.outcomes[-1] == "finished"


def test_a_time_limit_too_short_to_save_counts(run: Run) -> None:
    answers = []
    for _ in range(3):
        run.begin()
        answers.append(run.end(signal="time limit"))
    assert answers == [GO_ON, GO_ON, GAVE_UP]
    assert "give a job more --time" in run.headline


def test_leaving_early_is_fine_with_progress_only(run: Run) -> None:
    run.begin()
    run.save(10)  # such as --exit-interval, or --exit-duration-in-mins
    assert run.end() == GO_ON
    assert run.headline == "waiting to go on from iteration 10 (exited early)"
    answers = []
    for _ in range(3):
        run.begin()
        answers.append(run.end())
    assert answers == [GO_ON, GO_ON, GAVE_UP]


def test_submitting_again_gives_all_tries_back(run: Run) -> None:
    for _ in range(3):
        run.begin()
        run.end(exit_code=1)
    assert run.begin() == GAVE_UP
    submitted = run.folder.path / "submitted"
    submitted.touch()
    later = time.time() + 1
    os.utime(submitted, (later, later))
    assert run.begin() == TRAIN


def test_the_status_has_every_attempt(run: Run) -> None:
    run.begin()
    run.save(10)
    run.end(exit_code=1)
    (run.folder.checkpoints / "iter_0000020" / "mp_rank_00").mkdir(parents=True)
    run.begin()
    lines = (run.folder.path / "status.txt").read_text().splitlines()
    assert len(lines) == 5
    assert "job 77 on node[0-1]: iterations 0 to 10, crashed: the training step ended" in lines[2]
    assert lines[3].endswith("iterations 10 to ?, running")
    assert lines[4] == "  skipped iter_0000020: Megatron has not noted it as saved"


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_whose_checkpoints_are_lost_does_not_begin_anew(run: Run) -> None:
    run.begin()
    run.save(50_000)
    run.end(signal="time limit")
    part = run.folder.checkpoints / "iter_0050000" / "mp_rank_00" / "model_optim_rng.pt"
    part.write_bytes(b"PK\x03\x04")  # the beginning of an archive
    before = files_below(run.folder.checkpoints)
    for _ in range(2):
        assert run.begin() == GAVE_UP
    assert files_below(run.folder.checkpoints) == before
    assert run.outcomes == ["time limit"]
    assert run.headline.startswith("gave up: iteration 50,000 was saved once, and")
    assert "(iter_0050000: mp_rank_00/model_optim_rng.pt is cut off)" in run.headline
    assert f"to begin anew, give another --run-dir, or remove {run.folder.path}" in run.headline

    part.unlink()  # repaired
    assert run.begin() == TRAIN
    assert run.headline.endswith("from iteration 50,000")


def test_megatrons_note_tells_of_an_attempt_that_vanished(run: Run) -> None:
    run.begin()
    run.save(10)
    shutil.rmtree(run.folder.checkpoints / "iter_0000010")
    assert run.begin() == GAVE_UP
    assert run.headline.startswith("gave up: iteration 10 was saved once")
    assert run.outcomes == ["vanished"]


def test_a_first_checkpoint_that_was_never_complete_is_no_loss(run: Run) -> None:
    run.begin()
    run.save(10)
    (run.folder.checkpoints / TRACKER).write_text("release")
    assert run.begin() == TRAIN
    assert "skipped iter_0000010" in (run.folder.path / "status.txt").read_text()


def test_a_run_may_begin_anew_where_the_user_says_so(run: Run) -> None:
    run.begin()
    run.save(10)
    run.begin()  # the first vanished: where the second began is all that tells
    shutil.rmtree(run.folder.checkpoints)
    assert run.begin() == GAVE_UP
    assert "(it has none at all)" in run.headline
    shutil.rmtree(run.folder.path / "attempts")
    assert run.begin() == TRAIN
    assert run.headline == "training, attempt 1, from the beginning"


def test_local_checkpoints_of_other_nodes_are_not_taken_for_lost(run: Run) -> None:
    flags = ("--non-persistent-ckpt-type", "local", "--non-persistent-local-ckpt-dir", "/none")
    run.settings = replace(run.settings, flags=flags)
    (run.folder.path / "settings.json").write_text(run.settings.to_json())
    run.begin()
    (attempt,) = run.folder.attempts()
    run.folder.write(replace(attempt, outcome="time limit", end_iteration=10))
    assert run.begin() == TRAIN


def test_attempts_are_numbered_past_those_that_were_removed(run: Run) -> None:
    """Or one would begin in an old folder, whose signal file asks its ranks to stop at once."""
    for _ in range(3):
        run.begin()
        (run.attempt_folder() / "signal").write_text("time limit\n")
        run.save(10 * len(run.folder.attempts()))
        run.end(signal="time limit")
    shutil.rmtree(run.folder.attempt_folder(1))
    run.begin()
    assert run.attempt_folder() == run.folder.attempt_folder(4)
    assert not (run.attempt_folder() / "signal").exists()
    assert [attempt.number for attempt in run.folder.attempts()] == [2, 3, 4]


def test_a_folder_without_a_record_keeps_its_number(run: Run) -> None:
    (run.folder.attempt_folder(2)).mkdir(parents=True)
    (run.folder.path / "attempts" / "002.kept").mkdir()
    run.begin()
    assert [attempt.number for attempt in run.folder.attempts()] == [3]


def test_a_thousand_attempts_are_in_order(run: Run) -> None:
    run.begin()
    (first,) = run.folder.attempts()
    for number in (101, 999, 1000):
        run.folder.write(replace(first, number=number, outcome="stopped"))
    assert [attempt.number for attempt in run.folder.attempts()] == [1, 101, 999, 1000]
    run.begin()
    assert run.attempt_folder().name == "1001"
    run.end(exit_code=1)
    assert run.folder.attempts()[-1].outcome == "crashed"


def test_versions_are_noted(run: Run) -> None:
    run.begin()
    versions = json.loads((run.attempt_folder() / "versions.json").read_text())
    assert versions["megatron_skyladder"] and versions["python"]
    assert versions["commit"] is None or len(versions["commit"]) >= 40


# --- why an attempt failed ------------------------------------------------------------------------


def test_changed_code_may_be_in_any_encoding(tmp_path: Path) -> None:
    """Or the gate ends before training, on every try."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "a.txt").write_text("before\n")
    subprocess.run(["git", "-C", str(tmp_path), "add", "a.txt"], check=True)
    (tmp_path / "a.txt").write_bytes("f\u00fcr\n".encode("latin-1"))
    assert "+f\ufffdr" in (gate._git(tmp_path, "diff") or "")


def test_the_first_error_by_the_clock_is_the_reason(run: Run) -> None:
    run.begin()
    run.error(0, 7.5, "DistBackendError: Connection closed by peer")
    run.error(3, 7.1, "OutOfMemoryError: CUDA out of memory")
    reason = failure_reason(run.attempt_folder(), 1)
    assert reason == "rank 3: OutOfMemoryError: CUDA out of memory"


@pytest.mark.parametrize(
    "report",
    ["", '{"rank": 0, "time": 0.5, "mess', "\0" * 64],
    ids=["empty", "cut off", "blocks without data"],
)
def test_a_report_that_is_cut_off_hides_no_other(run: Run, report: str) -> None:
    """A full disk or a killed rank leaves one; the run goes on as after any failure."""
    run.begin()
    run.error(3, 7.1, "OutOfMemoryError: CUDA out of memory")
    (run.attempt_folder() / "error.0000.json").write_text(report)
    (run.attempt_folder() / "error.0001.json").write_bytes(b'{"message": "\xc3')
    assert run.end(exit_code=1) == GO_ON
    assert run.headline.endswith("(crashed: rank 3: OutOfMemoryError: CUDA out of memory)")
    run.begin()
    (run.attempt_folder() / "error.0000.json").write_text(report)
    assert run.end(exit_code=1) == GO_ON
    assert "crashed: the training step ended with 1, see the logs in" in run.headline
    assert len(run.folder.failures_in_a_row()) == 2


@pytest.mark.parametrize("note", ["", "\0" * 11], ids=["empty", "blocks without data"])
def test_a_note_of_a_signal_that_is_cut_off_still_is_one(run: Run, note: str) -> None:
    for _ in range(4):
        assert run.begin() == TRAIN
        (run.attempt_folder() / "signal").write_text(note)
    assert run.outcomes == ["terminated"] * 3 + ["running"]


def test_the_latest_attempt_is_named_before_it_is_begun(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job script looks there for the attempt whose check was killed."""
    written: list[str] = []
    write = attempts.write_text

    def note(path: Path, text: str) -> None:
        written.append(path.name)
        write(path, text)

    monkeypatch.setattr(attempts, "write_text", note)
    run.begin()
    assert written[:2] == ["attempt", "attempt.json"]


def test_a_killed_rank_leaves_its_exit_code(run: Run) -> None:
    run.begin()
    (run.attempt_folder() / "node.1.log").write_text(
        "Root Cause (first observed failure):\n[0]:\n  rank : 5\n  exitcode  : -9 (pid: 7)\n"
    )
    reason = failure_reason(run.attempt_folder(), 1)
    assert "a rank ended with -9 (SIGKILL: often out of host memory), see" in reason


def test_the_command_line(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    path = run.folder.path
    (path / "settings.json").write_text(run.settings.to_json())
    assert gate.main(["begin", str(path)]) == TRAIN
    assert gate.main(["end", str(path), "1", ""]) == GO_ON
    assert gate.main(["end", str(path), "0", "time limit"]) == GO_ON
