"""The queue: which run is next, several at a time, one failure in nobody's way."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from megatron_skyladder.errors import UsageError
from megatron_skyladder.files import lock, write_bytes
from megatron_skyladder.study import records
from megatron_skyladder.study.records import Measured
from megatron_skyladder.study.settings import LOWEST_PRIORITY, Planned, Study
from megatron_skyladder.study.training import (
    VALIDATION_DATA,
    Outcome,
    Training,
    append_row,
    nice,
    now,
    read_rows,
)

RECORDS = "records"  # below the study's folder; --write takes them from there
LOCK = "lock"  # the same
_LOCK_TRIES = 5


@dataclass(frozen=True)
class State:
    """How far a run is.

    Args:
        planned: the run.
        word: ``finished``, ``running``, ``begun``, ``trained`` (what it can do is to be measured),
            ``failed`` or ``waiting``.
        iteration: the last step that was logged.
        step_seconds: mean CPU time of its steps so far; None where none was timed.
        failure: of the last start, if it failed.
    """

    planned: Planned
    word: str
    iteration: int
    step_seconds: float | None
    failure: str = ""

    @property
    def steps_left(self) -> int:
        """Steps to train."""
        return max(0, self.planned.train_iters - self.iteration)


def states(study: Study, output: Path) -> list[State]:
    """Return how far each run is, in the order of the queue."""
    is_running = is_locked(output)
    found = []
    for planned in study.runs:
        training = Training(planned, output, "")
        rows = read_rows(training.folder / "steps.jsonl")
        events = read_rows(training.folder / "events.jsonl")
        iteration = int(rows[-1]["iteration"]) if rows else 0
        timed = [row["cpu"] for row in rows if row["cpu"] is not None]
        last = events[-1]["event"] if events else ""
        failure = events[-1]["what"] if last == Outcome.FAILED.value else ""
        if is_finished(planned, output):
            word, iteration = "finished", planned.train_iters
        elif last == Outcome.FAILED.value:
            word = "failed"
        elif last == "started" and is_running:
            word = "running"
        elif training.is_complete():
            word = "trained"
        else:
            word = "begun" if events else "waiting"
        mean = sum(timed) / len(timed) if timed else None
        found.append(State(planned, word, iteration, mean, failure))
    return found


def seconds_left(found: Sequence[State]) -> float | None:
    """Return the CPU time that is left, by the pace of each run, or of all where it has none.

    Returns:
        Seconds of one core; None before any step was timed.
    """
    known = [state.step_seconds for state in found if state.step_seconds is not None]
    if not known:
        return None
    pace = sum(known) / len(known)
    return sum(state.steps_left * (state.step_seconds or pace) for state in found)


def record_path(planned: Planned, output: Path) -> Path:
    """Return where a run's record is, or will be."""
    return output / RECORDS / f"{planned.name}{records.SUFFIX}"


def is_finished(planned: Planned, output: Path) -> bool:
    """Return whether a run has a record that lacks nothing."""
    path = record_path(planned, output)
    return path.exists() and records.read(path).is_whole


def check(study: Study, output: Path, corpus: str = "") -> None:
    """Raise where a finished run is another one than the study's.

    Args:
        study: what there is to run.
        output: the study's folder.
        corpus: what identifies the text; empty: the text of the first record.

    Raises:
        UsageError: see `records.check`.
    """
    paths = [record_path(it, output) for it in study.runs]
    found = [records.read(path) for path in paths if path.exists()]
    records.check(found, study, output / RECORDS, corpus)


def kept(study: Study, output: Path) -> list[Path]:
    """Return the records beside the page of runs that have none in the study's folder."""
    names = [record_path(it, output).name for it in study.runs if not is_finished(it, output)]
    return [path for name in names if (path := study.records / name).exists()]


def take(study: Study, output: Path, corpus: str) -> int:
    """Take the records beside the page into the study's folder; return how many.

    Args:
        study: what there is to run.
        output: the study's folder.
        corpus: what identifies its text.

    Raises:
        UsageError: one is of other flags or other text; then none is taken.
    """
    paths = kept(study, output)
    records.check([records.read(path) for path in paths], study, study.records, corpus)
    failures = study.records / records.FAILURES  # of which the page tells, too
    is_known = (output / RECORDS / records.FAILURES).exists() or not failures.exists()
    for path in [*paths, *([] if is_known else [failures])]:
        write_bytes(output / RECORDS / path.name, path.read_bytes())
    return len(paths)


@contextmanager
def locked(output: Path) -> Iterator[int]:
    """Hold the study's folder for one queue; the descriptor goes to the processes it starts.

    Raises:
        UsageError: another queue runs, or what it started still does; or there are no locks.
    """
    output.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(output / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        for _ in range(_LOCK_TRIES):  # a --status holds it for a moment
            if _takes(descriptor, fcntl.LOCK_EX, output):
                break
            time.sleep(0.1)
        else:
            raise UsageError(
                f"another skyladder study runs in {output}, or a process that it started. Wait "
                "for it, stop it (Ctrl-C or SIGTERM: it saves first), or give another --output."
            )
        yield descriptor
    finally:
        os.close(descriptor)


def is_locked(output: Path) -> bool:
    """Return whether a queue runs in this folder; nothing is written."""
    try:
        descriptor = os.open(output / LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not _takes(descriptor, fcntl.LOCK_SH, output)
    except UsageError:  # where there are no locks no queue runs
        return False
    finally:
        os.close(descriptor)


def _takes(descriptor: int, kind: int, output: Path) -> bool:
    try:
        lock(descriptor, kind | fcntl.LOCK_NB, output)
    except BlockingIOError:
        return False
    return True


@dataclass
class Queue:
    """Trains what is not finished, in order.

    Args:
        study: what there is to train.
        output: the study's folder.
        corpus: what identifies its text.
        say: called with a line when a run begins or ends.
        on_step: called with a run's name and its step, after each.
        priority: of nice, for every process.
        lock: the descriptor of `locked`.
        failures: name -> what went wrong, of this call.
    """

    study: Study
    output: Path
    corpus: str
    say: Callable[[str], None]
    on_step: Callable[[str, int], None] = lambda name, iteration: None
    priority: int = LOWEST_PRIORITY
    lock: int | None = None
    failures: dict[str, str] = field(default_factory=dict)
    _active: dict[str, Training] = field(default_factory=dict)
    _processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _stopping: bool = False

    def run(self, workers: int) -> None:
        """Run everything that has no record yet; return when nothing runs any more.

        Args:
            workers: runs at a time, each on one core.

        Raises:
            UsageError: see `check`.
        """
        check(self.study, self.output, self.corpus)
        waiting = [it for it in self.study.runs if not is_finished(it, self.output)]
        with ThreadPoolExecutor(workers) as pool:
            for going in [pool.submit(self._one, planned) for planned in waiting]:
                while not going.done():  # a signal's handler runs between two waits
                    time.sleep(0.2)
                going.result()

    @property
    def is_stopping(self) -> bool:
        """Whether somebody has asked for an end."""
        return self._stopping

    def stop(self) -> None:
        """Let what runs save and end; the second time, end it at once."""
        at_once, self._stopping = self._stopping, True
        for training in list(self._active.values()):
            training.stop(at_once=at_once)
        for process in list(self._processes):
            process.kill()  # nothing to save: measured anew

    def _one(self, planned: Planned) -> None:
        """Train a run and write its record; what goes wrong is kept and said."""
        if self._stopping:
            return
        kept_open = () if self.lock is None else (self.lock,)
        training = Training(planned, self.output, self.corpus, self.priority, kept_open)
        self._active[planned.name] = training
        try:
            begin = training.saved_iteration
            self.say(f"{planned.name}: begins" + (f" after step {begin}" if begin else ""))
            outcome = training.train(lambda iteration, _: self.on_step(planned.name, iteration))
            if outcome is Outcome.FINISHED:
                self._conclude(planned, training)
            elif outcome is Outcome.STOPPED:
                self.say(f"{planned.name}: stopped, saved after step {training.saved_iteration}")
            else:
                self._fail(planned, training.failure, f"; its log is {training.log}")
        except Exception as error:  # one run's; the others go on
            self._fail(planned, f"{type(error).__name__}: {error}")
        finally:
            self._active.pop(planned.name)

    def _conclude(self, planned: Planned, training: Training) -> None:
        measured = self._measured(training) if planned.is_compared else Measured()
        if measured is None:
            self.say(f"{planned.name}: trained; what it can do is measured another time")
            return
        record = records.record_of(training, measured)
        records.write(record, self.output / RECORDS)
        loss = record.loss if record.is_compared else record.last.loss
        self.say(f"{planned.name}: finished, validation loss {loss:.4f}")

    def _fail(self, planned: Planned, what: str, where: str = "") -> None:
        what = what.replace(str(self.output), ".")  # the page has it too
        self.failures[planned.name] = what
        (self.output / RECORDS).mkdir(exist_ok=True)
        row = {"time": now(), "run": planned.name, "what": what}
        append_row(self.output / RECORDS / records.FAILURES, row)
        events = self.output / "runs" / planned.name / "events.jsonl"
        last = read_rows(events)[-1:]
        if last and last[0]["event"] != Outcome.FAILED.value:  # --status says why
            row = {"time": now(), "event": Outcome.FAILED.value, "what": what}
            append_row(events, {**row, "iteration": last[0]["iteration"]})
        self.say(f"{planned.name}: FAILED, {what}{where}")

    def _measured(self, training: Training) -> Measured | None:
        """Measure the last checkpoint, in a process of its own; None where it was stopped."""
        options, planned = self.study.copying, training.planned
        out = training.folder / "measured.json"
        command = [
            *(*nice(self.priority), sys.executable, "-m", "megatron_skyladder.study.measuring"),
            *("--checkpoints", str(training.checkpoints.relative_to(self.output))),
            *("--data", VALIDATION_DATA, "--seq-length", str(planned.seq_length)),
            *("--lengths", *map(str, planned.context_lengths)),
            *("--distances", *map(str, options.distances)),
            *("--span", str(options.span), "--samples", str(options.samples)),
            *("--out", str(out.relative_to(self.output))),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "SKYLADDER_DEVICE": "cpu"}
        log = training.folder / "measuring.log"
        with log.open("wb") as printed:
            process = subprocess.Popen(
                command,
                cwd=self.output,
                env=environment,
                stdout=printed,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._processes.append(process)
            code = process.wait()
            self._processes.remove(process)
        if code and self._stopping:
            return None
        if code:
            raise RuntimeError(f"what it can do could not be measured; the log is {log}")
        return Measured.read(out, options)
