"""The job script under bash, with stubs for srun, scontrol and the run's Python."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_skyladder.slurm import script
from megatron_skyladder.slurm.attempts import Attempt, RunFolder
from megatron_skyladder.slurm.settings import Environment, Settings

SECONDS = 60

# Tells what it was started with, and behaves as the test's files say. Not a shell script: a shell
# cannot listen for signals that it was started to ignore.
PYTHON = """\
#!EXECUTABLE
import os, pathlib, signal, sys, time
folder = pathlib.Path("FOLDER")
module, words = sys.argv[2].rpartition(".")[2], sys.argv[3:]

def tell(line):
    with (folder / "calls").open("a") as calls:
        print(line, file=calls)

tell(" ".join([module, *words]))
if module == "gate":
    if words[0] == "begin":
        if not (folder / "killed").exists():
            attempt = folder / "run/attempts/001"
            attempt.mkdir(parents=True, exist_ok=True)
            (attempt / "attempt.json").write_text((folder / "record").read_text())
            (folder / "run/attempt").write_text(str(attempt))
        if (folder / "early").exists():
            for name in (folder / "early").read_text().split():
                os.kill(os.getppid(), signal.Signals[name])
    sys.exit(int((folder / f"answer.{words[0]}").read_text()))
value = os.environ
tell(f"attempt {value['SKYLADDER_ATTEMPT_DIR']} {value['MASTER_ADDR']}:{value['MASTER_PORT']}")
asked = []
signal.signal(signal.SIGUSR1, lambda number, frame: asked.append(number) or tell("node got USR1"))
(folder / "training").touch()
while (folder / "wait").exists() and not asked:
    time.sleep(0.02)
if asked:
    time.sleep(0.3)  # saving
while (folder / "hang").exists():
    time.sleep(0.02)
tell("node leaves")
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
sys.exit(int((folder / "exit").read_text()))
"""
# A slow one: training is asked to stop while it runs.
SETUP = """\
[ ! -e FOLDER/slow ] || [ -z "${SKYLADDER_ATTEMPT_DIR:-}" ] || {
    touch FOLDER/training
    while [ ! -e FOLDER/run/attempts/001/signal ]; do sleep 0.05; done
}
export PATH=FOLDER/set-up:$PATH
"""
# As srun does: starts the command, hands signals on, returns its exit code.
SRUN = """\
#!/bin/bash
echo "srun ${*//$'\\n'/ }" >> FOLDER/srun
while [ "$1" != bash ]; do shift; done
exec "$@"
"""
SCONTROL = """\
#!/bin/bash
if [ "$1" = show ]; then printf '%s\\n' alpha beta; exit; fi
echo "scontrol $*" >> FOLDER/calls
[ ! -e FOLDER/refuse ]
"""

# Prints the first line of a file, and drops it unless it is the last; "!" is an error.
SQUEUE = """\
#!/bin/bash
echo "squeue $*" >> FOLDER/calls
line=$(head -n 1 FOLDER/listed)
[ "$(wc -l < FOLDER/listed)" -le 1 ] || sed -i 1d FOLDER/listed
case $line in "!"*) echo "slurm_load_jobs error: ${line#!}" >&2; exit 1 ;; esac
printf "${line:+$line\\n}"
"""
SLEEP = """\
#!/bin/bash
echo "sleep $*" >> FOLDER/calls
[ ! -e FOLDER/terminate ] || kill -TERM $PPID
"""


def begun_attempt(restarts: int = 0) -> Attempt:
    """What the gate notes when the job begins an attempt."""
    return Attempt(1, "40007", restarts, "alpha,beta", 0.0, 0)


class Job:
    """A job script that can be started without Slurm."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = folder / "run"
        self.run.mkdir()
        self.calls_file = folder / "calls"
        self.calls_file.touch()
        self.environment = Environment(setup=SETUP.replace("FOLDER", str(folder)))
        self._write("set-up/python", PYTHON)
        self._write("bin/srun", SRUN)
        self._write("bin/scontrol", SCONTROL)
        self.variables = {
            "SLURM_JOB_ID": "40007",
            "SLURM_JOB_NODELIST": "alpha,beta",
            "SLURM_CPUS_PER_TASK": "6",
        }
        self.answer(begin=0, end=12)
        self.set("exit", "0")
        RunFolder(folder / "other").write(begun_attempt())
        self.set("record", (folder / "other/attempts/001/attempt.json").read_text())

    def _write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            text.replace("FOLDER", str(self.folder)).replace("EXECUTABLE", sys.executable)
        )
        path.chmod(0o755)

    def set(self, name: str, content: str = "") -> None:
        (self.folder / name).write_text(content)

    def answer(self, **codes: int) -> None:
        for moment, code in codes.items():
            self.set(f"answer.{moment}", str(code))

    def start(self, jobs: int | None = None) -> subprocess.Popen[str]:
        settings = Settings(str(self.run), (), "entry", 2, 2, 0, {}, self.environment)
        path = self.folder / "job.sbatch"
        path.write_text(script.job_script(settings, jobs=jobs))
        environment = {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", **self.variables}
        return subprocess.Popen(["bash", str(path)], env=environment, text=True)

    def finish(self, jobs: int | None = None) -> int:
        return self.start(jobs).wait(SECONDS)

    def interrupt(self, *signals: signal.Signals, hang: bool = False, seconds: float = 0.3) -> int:
        """Start, send signals while it trains, and wait for the end."""
        if not (self.folder / "slow").exists():
            self.set("wait")
        if hang:
            self.set("hang")
        job = self.start()
        self.wait_for(lambda: (self.folder / "training").exists())
        for number in signals:
            job.send_signal(number)
            time.sleep(seconds)
        (self.folder / "hang").unlink(missing_ok=True)
        return job.wait(SECONDS)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    @property
    def calls(self) -> list[str]:
        lines = self.calls_file.read_text().splitlines()
        return [line.replace(str(self.run), "RUN").rstrip() for line in lines]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


BEGIN, NODE = "gate begin RUN", "node RUN"
TRAINING = "attempt RUN/attempts/001 alpha:10007"  # 10000 + 40007 % 20000
LEAVES = "node leaves"
REQUEUE = "scontrol requeue 40007"


def end(code: int = 0, name: str = "") -> str:
    return f"gate end RUN {code} {name}".rstrip()


def test_a_job_that_finishes(job: Job) -> None:
    assert job.finish() == 0
    assert job.calls == [BEGIN, NODE, TRAINING, LEAVES, end()]
    first, training, last = (job.folder / "srun").read_text().splitlines()
    for line in (first, last):
        assert "--nodes=1 --ntasks=1 --nodelist=alpha bash -c" in line
    assert "--nodes=2 --ntasks=2 --kill-on-bad-exit=1 --wait=0 bash -c" in training
    assert training.startswith("srun --ntasks-per-node=1 --cpu-bind=none")


@pytest.mark.parametrize(("answer", "code"), [(12, 0), (11, 1)])
def test_what_the_check_before_training_may_say(job: Job, answer: int, code: int) -> None:
    job.answer(begin=answer)
    assert job.finish() == code
    assert job.calls == [BEGIN]


@pytest.mark.parametrize(
    ("answer", "code", "calls"), [(12, 0, []), (13, 0, [REQUEUE]), (11, 1, [])]
)
def test_what_the_check_after_training_may_say(
    job: Job, answer: int, code: int, calls: list[str]
) -> None:
    job.answer(end=answer)
    job.set("exit", "3")
    assert job.finish() == code
    assert job.calls == [BEGIN, NODE, TRAINING, LEAVES, end(3), *calls]


SLEEPS = "sleep 10"


@pytest.mark.parametrize("answer", [7, 127])
def test_a_check_before_training_that_fails_is_asked_again(
    job: Job, answer: int, capfd: pytest.CaptureFixture[str]
) -> None:
    job._write("bin/sleep", SLEEP)
    job.answer(begin=answer)
    assert job.finish() == answer
    assert job.calls == [BEGIN, SLEEPS, BEGIN, SLEEPS, BEGIN]
    said = capfd.readouterr().out
    for number in (1, 2, 3):
        assert f"before training failed with exit code {answer} (try {number} of 3); no" in said


def test_a_check_that_fails_once_changes_nothing(job: Job) -> None:
    """Slurm's own step may fail, with any exit code: 1 is srun's."""
    job.answer(begin=1, end=1)
    job._write("bin/sleep", f"{SLEEP}\necho 0 > FOLDER/answer.begin; echo 13 > FOLDER/answer.end\n")
    job.set("exit", "3")
    assert job.finish() == 0
    once = [BEGIN, SLEEPS, BEGIN, NODE, TRAINING, LEAVES, end(3)]
    assert job.calls == [*once, REQUEUE]  # the answers changed while it waited the first time
    job.answer(begin=0, end=1)
    job.calls_file.write_text("")
    assert job.finish() == 0
    assert job.calls == [BEGIN, NODE, TRAINING, LEAVES, end(3), SLEEPS, end(3), REQUEUE]


@pytest.mark.parametrize(("jobs", "calls"), [(None, [REQUEUE]), (4, [])])
def test_after_checks_that_all_fail_the_next_start_decides(
    job: Job, jobs: int | None, calls: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    """A run that stays down until somebody looks has lost the night."""
    job._write("bin/sleep", SLEEP)
    job.answer(end=1)
    job.set("exit", "3")
    assert job.finish(jobs) == 0
    checks = [end(3), SLEEPS, end(3), SLEEPS, end(3)]
    assert job.calls == [BEGIN, NODE, TRAINING, LEAVES, *checks, *calls]
    assert (job.run / "attempts/001/exit").read_text() == "3\n"
    assert "the check after training failed with exit code 1" in capfd.readouterr().out


def test_a_chain_leaves_the_rest_to_the_next_job(job: Job) -> None:
    job.answer(end=13)
    assert job.finish(jobs=4) == 0
    assert REQUEUE not in job.calls


def test_a_job_that_cannot_be_requeued_says_so(job: Job) -> None:
    job.answer(end=13)
    job.set("refuse")
    assert job.finish() == 1


def test_before_the_time_limit_it_saves_first_and_requeues_after(job: Job) -> None:
    job.answer(end=13)
    assert job.interrupt(signal.SIGUSR1) == 0
    assert job.calls == [
        *(BEGIN, NODE, TRAINING, "node got USR1", LEAVES, end(0, "time limit"), REQUEUE),
    ]
    assert (job.run / "attempts/001/signal").read_text() == "time limit\n"


def test_the_exit_code_survives_signals(job: Job) -> None:
    job.set("exit", "5")
    job.interrupt(*[signal.SIGUSR1] * 3, seconds=0.05)
    assert end(5, "time limit") in job.calls


def test_a_termination_is_passed_on_and_nothing_else(job: Job) -> None:
    job.answer(end=13)
    assert job.interrupt(signal.SIGTERM) == 143
    # Slurm brings the job back after preemption; after scancel it must not come back
    assert job.calls == [BEGIN, NODE, TRAINING, "node got USR1", LEAVES]
    assert (job.run / "attempts/001/signal").read_text() == "terminated\n"


def test_the_limit_itself_requeues_at_once(job: Job) -> None:
    assert job.interrupt(signal.SIGUSR1, signal.SIGTERM, hang=True) == 143
    assert job.calls == [BEGIN, NODE, TRAINING, "node got USR1", REQUEUE, LEAVES]
    assert (job.run / "attempts/001/signal").read_text() == "time limit\n"


def test_a_signal_before_training_starts_nothing(job: Job) -> None:
    job.answer(end=13)
    job.set("early", "SIGUSR1")
    assert job.finish() == 0
    assert NODE not in job.calls
    assert job.calls[-2:] == [end(0, "time limit"), REQUEUE]
    # the check after training may be killed before it notes that
    assert (job.run / "attempts/001/signal").read_text() == "time limit\n"


@pytest.mark.parametrize("answer", [0, 137])  # 137: killed, after it had begun an attempt
@pytest.mark.parametrize("restarts", [0, 2])
def test_a_preemption_before_training_is_noted(job: Job, answer: int, restarts: int) -> None:
    """Or the next job takes the attempt for one that vanished, which counts as a failure."""
    if restarts:
        job.variables["SLURM_RESTART_COUNT"] = str(restarts)
        RunFolder(job.folder / "other").write(begun_attempt(restarts))
        job.set("record", (job.folder / "other/attempts/001/attempt.json").read_text())
    job.answer(begin=answer)
    job.set("early", "SIGTERM")
    assert job.finish() == 143
    assert job.calls == [BEGIN]
    assert (job.run / "attempts/001/signal").read_text() == "terminated\n"


def test_a_preemption_before_an_attempt_is_not_noted_in_the_one_before(job: Job) -> None:
    """That one did vanish: with a node, after which Slurm requeued the job."""
    RunFolder(job.run).write(begun_attempt())
    job.variables["SLURM_RESTART_COUNT"] = "1"
    job.set("killed")
    job.answer(begin=137)
    job.set("early", "SIGTERM")
    assert job.finish() == 143
    assert not (job.run / "attempts/001/signal").exists()


def test_a_time_limit_that_comes_before_training_stays_one(job: Job) -> None:
    """It counts as a failure; else a job too short to begin would be requeued for ever."""
    job.set("early", "SIGUSR1 SIGTERM")
    assert job.finish() == 143
    assert job.calls == [BEGIN, REQUEUE]
    assert (job.run / "attempts/001/signal").read_text() == "time limit\n"


def test_a_signal_during_the_setup_is_kept_for_training(job: Job) -> None:
    job.answer(end=13)
    job.set("slow")
    assert job.interrupt(signal.SIGUSR1, signal.SIGUSR1) == 0
    assert job.calls[-2:] == [end(0, "time limit"), REQUEUE]
    assert (job.run / "attempts/001/signal").read_text() == "time limit\n"


# --- another job in the folder --------------------------------------------------------------------

ASKED = "squeue --noheader --jobs=7 --format=%A %T"
GONE = "!Invalid job id specified"
WAITS = [ASKED, "sleep 5"]


def begun_by(job: Job, other: str, *listed: str) -> None:
    """Let another job's attempt be the latest; squeue has one line after the other."""
    attempt = Attempt(1, other, 0, "node0", 0.0, 0)
    RunFolder(job.run).write(attempt)
    (job.run / "attempts/001").rename(job.run / "attempts/000")
    (job.run / "attempt").write_text(f"{job.run}/attempts/000\n")
    job.set("listed", "\n".join(listed) + "\n")
    job._write("bin/squeue", SQUEUE)
    job._write("bin/sleep", SLEEP)


@pytest.mark.parametrize(
    "listed",
    ["", GONE, "7 PENDING", "7 REQUEUED", "7 REQUEUE_HOLD", "8 RUNNING", "70 RUNNING\\n7 PENDING"],
)
def test_a_job_that_is_gone_or_waits_is_no_hindrance(job: Job, listed: str) -> None:
    begun_by(job, "7", listed)
    assert job.finish() == 0
    assert job.calls[:2] == [ASKED, BEGIN] and job.calls[-1] == end()


@pytest.mark.parametrize("other", ["40007", "none"])
def test_a_job_does_not_wait_for_itself(job: Job, other: str) -> None:
    begun_by(job, other, f"{other} RUNNING")
    assert job.finish() == 0
    assert job.calls[0] == BEGIN


@pytest.mark.parametrize("state", ["RUNNING", "SUSPENDED", "CONFIGURING"])
@pytest.mark.parametrize("jobs", [None, 4])
def test_beside_another_job_nothing_is_touched(
    job: Job, state: str, jobs: int | None, capfd: pytest.CaptureFixture[str]
) -> None:
    begun_by(job, "7", f"8 PENDING\\n7 {state}")
    assert job.finish(jobs) == 1
    assert job.calls == [ASKED]
    assert f"job 7 {state} is at work in {job.run}, so nothing is done" in capfd.readouterr().out


def test_a_job_that_was_cancelled_may_save_first(
    job: Job, capfd: pytest.CaptureFixture[str]
) -> None:
    begun_by(job, "7", "7 COMPLETING", "!Unable to contact slurm controller", "7 COMPLETING", "")
    assert job.finish() == 0
    assert job.calls[:8] == [*WAITS * 3, ASKED, BEGIN]
    assert capfd.readouterr().out.count(f"waiting until job 7 COMPLETING has left {job.run}") == 1


@pytest.mark.parametrize("listed", ["7 COMPLETING", "!Unable to contact slurm controller"])
def test_waiting_has_an_end(job: Job, listed: str, capfd: pytest.CaptureFixture[str]) -> None:
    begun_by(job, "7", listed)
    assert job.finish() == 1
    assert job.calls == WAITS * 180  # a quarter of an hour
    said = capfd.readouterr().out.splitlines()[-1]
    assert listed.removeprefix("!") in said and "submit again when it has ended" in said


def test_a_job_that_waits_can_be_cancelled(job: Job) -> None:
    begun_by(job, "7", "7 COMPLETING")
    job.set("terminate")
    assert job.finish() == 143
    assert job.calls == WAITS
