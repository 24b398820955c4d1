"""One run of the study: Megatron's trainer on one core, its log, and the CPU time of each step.

The clock on the wall says nothing on a machine that does other work meanwhile, so the time of a
step is the CPU time that the training process spent on it, read from Linux when the step's line
comes.
"""

from __future__ import annotations

import contextlib
import enum
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from megatron_skyladder.errors import UsageError
from megatron_skyladder.files import write_text
from megatron_skyladder.slurm.checkpoints import TRACKER
from megatron_skyladder.study.settings import LOWEST_PRIORITY, Planned

TRAIN_DATA, VALIDATION_DATA = "corpus/train_text_document", "corpus/validation_text_document"
TOKENIZER = "corpus/tokenizer"
PRETRAIN = ("-m", "megatron_skyladder.pretrain_gpt")

_STEP = re.compile(r" iteration +(\d+)/ +(\d+) \|.*?lm loss: (\S+)")
_OTHER_WORK = re.compile(r"validation loss at|saving checkpoint|saved checkpoint|loaded checkpoint")
_ERROR = re.compile(r"^(?:\[?\w*\]?:?\s*)?(?:\w+\.)*\w*(?:Error|Exception)\b.*|.*\berror\b:.*")
_LEFT = "exiting program after receiving SIGTERM"  # also where another than the queue has sent it
_WARMING_UP = 2  # steps of a start that are slower than others
# glibc gives a step's large tensors back to Linux and gets them anew as pages to be cleared, which
# took a sixth of a step. Other C libraries do not read these.
_KEPT_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),  # bytes
    "MALLOC_ARENA_MAX": "1",
}


class Outcome(enum.Enum):
    """How a call of `Training.train` ended."""

    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass
class Training:
    """A run in its folder; what is in the folder is gone on from.

    Args:
        planned: the run.
        output: the study's folder, which commands are relative to.
        corpus: what identifies the text, so that a run never goes on with another one.
        priority: of nice.
        kept_open: file descriptors that the process gets, such as that of a lock.
        failure: why the last call failed.
    """

    planned: Planned
    output: Path
    corpus: str
    priority: int = LOWEST_PRIORITY
    kept_open: tuple[int, ...] = ()
    failure: str = ""
    _process: subprocess.Popen[str] | None = None
    _stopping: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def folder(self) -> Path:
        """Everything of this run."""
        return self.output / "runs" / self.planned.name

    @property
    def log(self) -> Path:
        """Console output of all its starts."""
        return self.folder / "train.log"

    @property
    def checkpoints(self) -> Path:
        """Megatron's --save; the newest is kept."""
        return self.folder / "checkpoints"

    def command(self) -> list[str]:
        """Return the words after ``python``; paths are relative to the study's folder."""
        here = self.folder.relative_to(self.output)
        save = str(here / "checkpoints")
        return [
            *PRETRAIN,
            *self.planned.flags,
            *("--train-data-path", TRAIN_DATA, "--valid-data-path", VALIDATION_DATA),
            *("--data-cache-path", str(here / "cache")),
            *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", TOKENIZER),
            *("--save", save, "--load", save, "--exit-signal-handler"),
            *("--save-retain-interval", str(10 * self.planned.train_iters)),  # the newest alone
        ]

    @property
    def iteration(self) -> int:
        """The last step that a start has logged; a checkpoint may be older."""
        rows = read_rows(self.folder / "steps.jsonl")
        return int(rows[-1]["iteration"]) if rows else 0

    @property
    def saved_iteration(self) -> int:
        """The step of the newest checkpoint; 0 where there is none."""
        tracker = self.checkpoints / TRACKER
        text = tracker.read_text().strip() if tracker.exists() else ""
        return int(text) if text.isdigit() else 0

    def is_complete(self) -> bool:
        """Return whether training is over."""
        events = read_rows(self.folder / "events.jsonl")
        return any(event["event"] == Outcome.FINISHED.value for event in events)

    def train(self, on_step: Callable[[int, float], None]) -> Outcome:
        """Train to the end, or until `stop`.

        Args:
            on_step: called with the step and its loss.

        Raises:
            UsageError: the folder holds a run with other settings.
        """
        if self.is_complete():
            return Outcome.FINISHED
        self._begin()
        environment = {**os.environ, **_alone(), "PYTHONUNBUFFERED": "1"}
        command = [*nice(self.priority), sys.executable, *self.command()]
        with self._lock:
            if self._stopping:
                return Outcome.STOPPED
            self._process = subprocess.Popen(
                command,
                cwd=self.output,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C is ours to pass on
                pass_fds=self.kept_open,
            )
        threading.Thread(target=_end_group, args=(self._process,), daemon=True).start()
        self._note("started", self.saved_iteration)
        with self._process as process, self.log.open("a", 1, encoding="utf-8") as log:
            # line by line: what a killed queue holds back would be missing from the run's record
            assert process.stdout is not None
            _Steps(self.folder, process.pid, on_step).follow(process.stdout, log.write)
        return self._end(process.returncode)

    def stop(self, *, at_once: bool = False) -> None:
        """Let the run save and end after its step, or end it at once."""
        with self._lock:
            self._stopping = True
            if self._process is not None and self._process.poll() is None:
                # its helpers end with it; a SIGTERM is the trainer's alone to answer
                self._process.send_signal(signal.SIGKILL if at_once else signal.SIGTERM)

    def _begin(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = {"command": self.command(), "corpus": self.corpus}
        path = self.folder / "settings.json"
        if path.exists():
            earlier = json.loads(path.read_text(encoding="utf-8"))
            if earlier != settings:
                raise UsageError(
                    f"{self.planned.name} was begun with other flags or other text, see {path}. "
                    "Give the arm another name, or delete the folder to begin anew."
                )
        write_text(path, json.dumps(settings, indent=1) + "\n")

    def _end(self, code: int) -> Outcome:
        last = self.iteration
        if code == 0 and self.saved_iteration == self.planned.train_iters:
            outcome, what = Outcome.FINISHED, ""
        elif self._stopping or (code == 0 and _LEFT in self._tail()):
            outcome, what = Outcome.STOPPED, ""
        else:
            outcome = Outcome.FAILED
            self.failure = what = f"exit code {code} after step {last}: {self._reason()}"
        self._note(outcome.value, last, what)
        return outcome

    def _tail(self) -> str:
        return "\n".join(self.log.read_text(encoding="utf-8").splitlines()[-200:])

    def _reason(self) -> str:
        lines = [line.strip() for line in self._tail().splitlines() if line.strip()]
        found = [line for line in lines if _ERROR.match(line)]
        return (found or lines or ["no output"])[-1][-300:].replace(str(self.output), ".")

    def _note(self, event: str, iteration: int, what: str = "") -> None:
        row = {"time": now(), "event": event, "iteration": iteration, "what": what}
        append_row(self.folder / "events.jsonl", row)


def _end_group(process: subprocess.Popen[str]) -> None:
    """End what a trainer leaves behind when it is killed, or its output would never end."""
    process.wait()
    with contextlib.suppress(ProcessLookupError):  # nobody is left
        os.killpg(process.pid, signal.SIGKILL)


class _Steps:
    """Follows what a start prints, and notes each step with its CPU time."""

    def __init__(self, folder: Path, pid: int, on_step: Callable[[int, float], None]) -> None:
        self._path, self._pid, self._on_step = folder / "steps.jsonl", pid, on_step
        self._before: float | None = None
        self._count = 0
        self._is_clean = False

    def follow(self, lines: Any, write: Callable[[str], Any]) -> None:
        for line in lines:
            write(line)
            match = _STEP.search(line)
            if match:
                self._note(int(match[1]), float(match[3]))
            elif _OTHER_WORK.search(line):
                self._is_clean = False

    def _note(self, iteration: int, loss: float) -> None:
        so_far = cpu_seconds(self._pid)
        self._count += 1
        spent = None
        if self._is_clean and self._count > _WARMING_UP and so_far is not None:
            spent = round(so_far - (self._before or 0.0), 2)
        row = {"iteration": iteration, "cpu": spent}
        append_row(self._path, row)
        self._before, self._is_clean = so_far, True
        self._on_step(iteration, loss)


def cpu_seconds(pid: int) -> float | None:
    """Return the CPU time of a process, its children's left out; None where nobody says."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None


def step_seconds(rows: Sequence[Mapping[str, Any]], train_iters: int) -> list[float] | None:
    """Return the CPU time of each step.

    A step that was not timed (the first of a start, those behind a validation or a checkpoint) gets
    the median of the nearest ones that were, four on either side.

    Args:
        rows: what was noted; of a step that was trained twice, the last time counts.
        train_iters: steps of the run.

    Returns:
        [train_iters], or None where no step was timed.
    """
    timed = {int(row["iteration"]): row["cpu"] for row in rows if row["cpu"] is not None}
    known = sorted(timed)
    if not known:
        return None
    seconds = []
    for step in range(1, train_iters + 1):
        if step in timed:
            seconds.append(float(timed[step]))
            continue
        before = [place for place in known if place < step][-4:]
        after = [place for place in known if place > step][:4]
        near = sorted(timed[place] for place in (*before, *after))
        middle = len(near) // 2
        seconds.append(near[middle] if len(near) % 2 else (near[middle - 1] + near[middle]) / 2)
    return seconds


def nice(priority: int) -> list[str]:
    """Return the words in front of a command that give it a priority."""
    return ["nice", "-n", str(priority)]


def now() -> str:
    """Return the date and the time, UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add a line of JSON to a file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return a file's lines of JSON; one that a crash cut off is left out."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
    return rows


def _alone() -> dict[str, str]:
    """Return the environment of a process that is its own world, on one core."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {**ranks, **threads, **where, **_KEPT_MEMORY, "SKYLADDER_DEVICE": "cpu"}
