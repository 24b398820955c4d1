"""The record of a run: each start is an attempt with a folder, and ends in one of a few ways.

What is known at the time is written at the time, to files that a shell can write too, so that an
attempt that ends without a word differs from one that was asked to stop.

    RUN/settings.json      what to train, see `settings`
    RUN/checkpoints        Megatron's
    RUN/attempts/001       one start: its logs, and
        attempt.json         what is known about it
        signal               written by the job script when SLURM sends a signal: its meaning
        exit                 the training step's exit code, by the job script
        error.<rank>.json    written by a rank that fails
    RUN/attempt            path of the latest attempt's folder
    RUN/status.txt         the state for people; the first line says it all
    RUN/wandb_id           Weights & Biases' name for it: one run there, whatever becomes of jobs
    RUN/stop               made by a user: save, and do not go on
    RUN/finished           made by rank 0 when training has come to its end
    RUN/submitted          touched by a submission: failures before it do not count
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_skyladder.files import write_text
from megatron_skyladder.slurm import checkpoints
from megatron_skyladder.slurm.flags import by_flag, overrides
from megatron_skyladder.slurm.settings import BRIDGE_ENTRY, Settings

FINISHED, STOPPED, TIME_LIMIT, TERMINATED = "finished", "stopped", "time limit", "terminated"
EARLY_EXIT, CRASHED, VANISHED, RUNNING = "exited early", "crashed", "vanished", "running"
FAILURES = (CRASHED, VANISHED, EARLY_EXIT, TIME_LIMIT)  # where no new checkpoint was left
_REASONS = {
    VANISHED: "it ended without a word: a node failed, or something killed it",
    EARLY_EXIT: "training left before its end, without an error",
    TIME_LIMIT: "the time limit came before a new checkpoint: give a job more --time, or more "
    "signal-seconds to save",
}
_ROOT_CAUSE = re.compile(r"exitcode\s*:\s*(-?\d+)")


@dataclass(frozen=True)
class Attempt:
    """One start of a run.

    Args:
        number: from 1.
        job: SLURM's job id.
        restarts: how often SLURM had requeued the job.
        hosts: nodes.
        started: seconds since the epoch.
        start_iteration: that of the checkpoint it began from; 0: from nothing.
        skipped: incomplete checkpoints that were set aside, and why.
        ended: seconds since the epoch, if known.
        end_iteration: of the newest complete checkpoint afterwards, once known.
        outcome: one of the words above.
        reason: why it failed.
    """

    number: int
    job: str
    restarts: int
    hosts: str
    started: float
    start_iteration: int
    skipped: tuple[str, ...] = ()
    ended: float | None = None
    end_iteration: int | None = None
    outcome: str = RUNNING
    reason: str = ""

    @property
    def made_progress(self) -> bool:
        """Whether it left a newer checkpoint than it began from."""
        return (self.end_iteration or 0) > self.start_iteration


@dataclass(frozen=True)
class RunFolder:
    """The files of one run."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Megatron's --save and --load."""
        return self.path / "checkpoints"

    @property
    def flags(self) -> dict[str, str]:
        """Megatron's flags with their values; none before there are settings.

        Of Bridge's overrides, those of the section ``checkpoint``, which has Megatron's names, but
        for what is set to null, which is Bridge's word for nothing.
        """
        try:
            settings = Settings.read(self.path)
        except FileNotFoundError:
            return {}
        if settings.entry != BRIDGE_ENTRY:
            return by_flag(settings.flags)
        split = ((name.partition("."), value) for name, value in overrides(settings.flags).items())
        return {
            f"--{name.replace('_', '-')}": value
            for (section, _, name), value in split
            if section == "checkpoint" and value.lower() not in ("null", "~")
        }

    def newest_checkpoint(self) -> int:
        """Return the iteration of the newest complete checkpoint; 0: there is none."""
        flags = self.flags
        found = [
            checkpoints.find(folder, flags.get("--ckpt-format")).newest
            for folder in checkpoints.folders(self.checkpoints, flags)
        ]
        return max(*found, checkpoints.newest_local(flags))

    def lost_iteration(self) -> int:
        """Return the newest iteration that the run has had a checkpoint of, where none is left.

        0: there is one, there never was one, or other nodes may have it: local checkpoints.
        """
        flags, attempts = self.flags, self.attempts()
        local = flags.get("--non-persistent-ckpt-type") == "local"
        if not attempts or local or self.newest_checkpoint():
            return 0
        had = [max(each.start_iteration, each.end_iteration or 0) for each in attempts]
        # of an attempt that vanished, Megatron's own note is all that tells
        had += map(checkpoints.noted, checkpoints.folders(self.checkpoints, flags))
        return max(had)

    @property
    def has_own_checkpoint(self) -> bool:
        """Whether the latest attempt begins from a checkpoint of the run's own."""
        attempts = self.attempts()
        return bool(attempts) and attempts[-1].start_iteration > 0

    def first_load(self) -> str | None:
        """Return where the run's flags load from, while it has no checkpoint of its own.

        None: there is one, or nothing is said, and the run folder is loaded from.
        """
        return None if self.has_own_checkpoint else self.flags.get("--load")

    @property
    def is_finished(self) -> bool:
        """Whether training has come to its end."""
        return (self.path / "finished").exists()

    @property
    def is_stopped(self) -> bool:
        """Whether a user wants it to stop."""
        return (self.path / "stop").exists()

    def wandb_id(self) -> str:
        """Return what Weights & Biases knows the run by, chosen at the first call."""
        path = self.path / "wandb_id"
        if not path.exists():
            name = re.sub(r"[^\w.-]", "-", self.path.name)[:100]  # folders of one name are many
            write_text(path, f"{name}-{secrets.token_hex(4)}\n")
        return path.read_text().strip()

    def attempt_folder(self, number: int) -> Path:
        """Return the folder of an attempt."""
        return self.path / "attempts" / f"{number:03}"

    def attempts(self) -> list[Attempt]:
        """Return all attempts, in order."""
        files = (self.attempt_folder(number) / "attempt.json" for number in self._numbers())
        return [_from_json(file.read_text()) for file in files if file.exists()]

    def next_number(self) -> int:
        """Return the number of the next attempt, one that no folder has.

        Folders may have been removed, so their count may be the number of one that is there.
        """
        return max(self._numbers(), default=0) + 1

    def _numbers(self) -> list[int]:
        """Return the numbers of the attempts' folders, in order: as names, 1000 is before 101."""
        found = (path.name for path in (self.path / "attempts").glob("*") if path.is_dir())
        return sorted(int(name) for name in found if name.isdecimal())

    def write(self, attempt: Attempt) -> None:
        """Write what is known of an attempt, and point to it as the latest."""
        folder = self.attempt_folder(attempt.number)
        folder.mkdir(parents=True, exist_ok=True)
        # in this order: the job script finds an attempt that has a record, whenever it is killed
        write_text(self.path / "attempt", f"{folder}\n")
        write_text(folder / "attempt.json", json.dumps(asdict(attempt), indent=1) + "\n")

    def close_earlier(self) -> None:
        """Note how attempts ended that could not say so themselves."""
        newest = self.newest_checkpoint()
        for attempt in self.attempts():
            if attempt.outcome != RUNNING:
                continue
            folder = self.attempt_folder(attempt.number)
            signal, exit_code = _noted_signal(folder), _noted_exit_code(folder)
            if exit_code is not None:  # training did end; the check that notes it failed
                self.write(self.closed(attempt, exit_code, signal or ""))
                continue
            outcome = signal or VANISHED
            closed = replace(attempt, outcome=outcome, end_iteration=newest)
            self.write(replace(closed, reason=_REASONS.get(outcome, "")))

    def failures_in_a_row(self) -> list[Attempt]:
        """Return the failed attempts since the last progress or submission, latest first.

        Being preempted or requeued is no failure; it does not interrupt a row of them either.
        """
        submitted = self.path / "submitted"
        since = submitted.stat().st_mtime if submitted.exists() else 0.0
        failed = []
        for attempt in reversed(self.attempts()):
            if attempt.made_progress or attempt.started < since:
                break
            if attempt.outcome in FAILURES:
                failed.append(attempt)
        return failed

    def closed(self, attempt: Attempt, exit_code: int, signal: str) -> Attempt:
        """Return an attempt whose training step has ended, with how and why.

        Args:
            attempt: it.
            exit_code: of the training step.
            signal: what SLURM asked for meanwhile, or an empty text.
        """
        reason = ""
        if self.is_finished:
            outcome = FINISHED
        elif exit_code:
            outcome = CRASHED
            reason = failure_reason(self.attempt_folder(attempt.number), exit_code)
        elif signal:
            outcome = signal
        else:
            outcome = STOPPED if self.is_stopped else EARLY_EXIT
        newest = self.newest_checkpoint()
        closed = replace(attempt, ended=time.time(), end_iteration=newest, outcome=outcome)
        if outcome in FAILURES and not closed.made_progress:
            reason = reason or _REASONS[outcome]
        return replace(closed, reason=reason)

    def write_status(self, headline: str) -> None:
        """Write the state for people, the most important thing first."""
        lines = [headline, ""]
        for attempt in self.attempts():
            begun = time.strftime("%Y-%m-%d %H:%M", time.localtime(attempt.started))
            until = "?" if attempt.end_iteration is None else f"{attempt.end_iteration:,}"
            lines.append(
                f"attempt {attempt.number}, {begun}, job {attempt.job} on {attempt.hosts}: "
                f"iterations {attempt.start_iteration:,} to {until}, {attempt.outcome}"
                + (f": {attempt.reason}" if attempt.reason else "")
            )
            lines += [f"  skipped {skipped}" for skipped in attempt.skipped]
        write_text(self.path / "status.txt", "\n".join(lines) + "\n")


def failure_reason(folder: Path, exit_code: int) -> str:
    """Return the first error that a rank reported, or what its end says.

    The first by the clock: when one rank fails, the others soon complain about its silence.
    """
    errors = list(_reported_errors(folder))
    if errors:
        first = min(errors, key=lambda error: error["time"])
        return f"rank {first['rank']}: {first['message']}"
    for log in sorted(folder.glob("node.*.log")):
        codes = _ROOT_CAUSE.findall(log.read_text(errors="replace"))
        if codes:
            hint = " (SIGKILL: often out of host memory)" if codes[-1] == "-9" else ""
            return f"a rank ended with {codes[-1]}{hint}, see {log}"
    return f"the training step ended with {exit_code}, see the logs in {folder}"


def _reported_errors(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield what ranks reported, but for reports that are cut off: one must not hide the others."""
    for path in folder.glob("error.*.json"):
        with contextlib.suppress(OSError, ValueError):
            yield json.loads(path.read_text())


def _noted_signal(folder: Path) -> str | None:
    """Return what SLURM asked an attempt for, as the job script noted it; None: nothing.

    A shell writes it, and leaves an empty file on a full disk: a signal came, and which is lost.
    """
    path = folder / "signal"
    if not path.exists():
        return None
    said = path.read_text(errors="replace").strip()
    return said if said == TIME_LIMIT else TERMINATED


def _noted_exit_code(folder: Path) -> int | None:
    """Return what an attempt's training step ended with, as the job script noted it."""
    try:
        return int((folder / "exit").read_text(errors="replace"))
    except (FileNotFoundError, ValueError):  # an empty file: the disk was full
        return None


def _from_json(text: str) -> Attempt:
    values = json.loads(text)
    return Attempt(**{**values, "skipped": tuple(values["skipped"])})
