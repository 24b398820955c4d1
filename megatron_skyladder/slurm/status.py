"""How runs stand, from their folders alone: no Slurm is asked, so it works from any machine."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_skyladder.report.log_files import rank_logs, ranks_that_log
from megatron_skyladder.report.runlog import Iteration, parse, read_run
from megatron_skyladder.slurm import attempts
from megatron_skyladder.slurm.attempts import Attempt, RunFolder
from megatron_skyladder.slurm.flags import by_flag
from megatron_skyladder.slurm.settings import FILE_NAME, Settings

TAIL_BYTES = 256 * 1024  # of a log: its last training line is in there
HEAD_BYTES = 1024 * 1024  # Megatron's arguments
SILENT_SECONDS = 1800  # of a run that trains: a checkpoint or an evaluation takes less

SUBMITTED, RUNNING, SAVING, WAITING = "submitted", "running", "saving", "waiting"
FINISHED, STOPPING, STOPPED, GAVE_UP = "finished", "stopping", "stopped", "gave up"


@dataclass(frozen=True)
class Status:
    """A run at this moment; None for what its files do not tell.

    Args:
        run: its folder.
        state: one of the words above.
        attempts: how often it has started.
        job: of the latest start.
        hosts: of the latest start.
        iteration: of the last training line.
        total_iterations: of the run.
        checkpoint: iteration of the newest complete checkpoint; 0: there is none.
        window: attention window of that line, in tokens.
        tokens: trained on by then.
        hours_left: of training, at the rate of that line.
        failed: attempts in a row that failed without a new checkpoint.
        max_tries: of them after which it gives up.
        reason: why the latest attempt that has ended did.
        silent_seconds: since the last word of a run that trains.
    """

    run: str
    state: str
    attempts: int
    job: str | None
    hosts: str | None
    iteration: int | None
    total_iterations: int | None
    checkpoint: int
    window: int | None
    tokens: int | None
    hours_left: float | None
    failed: int
    max_tries: int
    reason: str
    silent_seconds: float | None

    @property
    def is_silent(self) -> bool:
        """Whether a run that should train has said nothing for longer than it ought to."""
        return (self.silent_seconds or 0.0) > SILENT_SECONDS


def find_runs(folder: Path) -> list[Path]:
    """Return the run folders that a folder is, or has in it or one level below."""
    found = [path.parent for below in ("", "*/", "*/*/") for path in folder.glob(below + FILE_NAME)]
    return sorted(path for path in found if (path / "checkpoints").is_dir())


def status_of(path: Path) -> Status:
    """Return how a run stands.

    Raises:
        ValueError: the folder is none of a run.
    """
    run = RunFolder(path)
    try:
        settings = Settings.read(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{path} is no run folder: it has no {FILE_NAME}. Give a folder that `skyladder slurm "
            "--submit` has made."
        ) from None
    starts = run.attempts()
    latest = starts[-1] if starts else None
    failed = run.failures_in_a_row()
    lost = run.lost_iteration()
    state = _state(run, latest, gave_up=len(failed) >= settings.max_tries or lost > 0)
    line, total = _last_line(run, starts)
    ended = next((each for each in reversed(starts) if each.outcome != attempts.RUNNING), None)
    return Status(
        run=str(path),
        state=state,
        attempts=len(starts),
        job=latest.job if latest else None,
        hosts=latest.hosts if latest else None,
        iteration=line.iteration if line else None,
        total_iterations=total,
        checkpoint=run.newest_checkpoint(),
        window=line.window if line else None,
        tokens=_tokens(run, settings, line),
        hours_left=None if state == FINISHED else _hours_left(line, total),
        failed=len(failed),
        max_tries=settings.max_tries,
        reason=f"no checkpoint is left, and iteration {lost:,} was saved once"
        if lost and state == GAVE_UP
        else _reason(ended),
        silent_seconds=_silence(run, latest) if latest and state == RUNNING else None,
    )


def _state(run: RunFolder, latest: Attempt | None, *, gave_up: bool) -> str:
    if run.is_finished:
        return FINISHED
    trains = latest is not None and latest.outcome == attempts.RUNNING
    if run.is_stopped:
        return STOPPING if trains else STOPPED
    if latest is None:
        return SUBMITTED
    if trains:
        return SAVING if (run.attempt_folder(latest.number) / "signal").exists() else RUNNING
    return GAVE_UP if gave_up else WAITING


def _reason(ended: Attempt | None) -> str:
    if ended is None or ended.outcome == attempts.FINISHED:
        return ""
    return f"{ended.outcome}: {ended.reason}" if ended.reason else ended.outcome


def _last_line(run: RunFolder, starts: list[Attempt]) -> tuple[Iteration | None, int | None]:
    """Return the last training line of the latest attempt that has one, and the run's length."""
    for attempt in reversed(starts):
        for log in ranks_that_log(rank_logs(run.attempt_folder(attempt.number))):
            found = parse(_part(log, -TAIL_BYTES))
            if found.iterations:
                return found.iterations[-1], found.total_iterations
    return None, None


def _tokens(run: RunFolder, settings: Settings, line: Iteration | None) -> int | None:
    if line is None:
        return None
    heads = (_part(log, HEAD_BYTES) for log in run.path.glob("attempts/*/rank.0000.log"))
    lengths = {length for length in (parse(head).seq_length for head in heads) if length}
    if len(lengths) > 1:  # the run went on with another one: each attempt's own counts
        return read_run(run.path).tokens()[-1]
    flag = by_flag(settings.flags).get("--seq-length", "")
    if not lengths and flag.isdigit():  # the first rank's log is not there
        lengths = {int(flag)}
    return line.consumed_samples * lengths.pop() if lengths else None


def _hours_left(line: Iteration | None, total: int | None) -> float | None:
    """Return what the run logs, which knows the windows ahead, or else an estimate."""
    if line is None:
        return None
    logged = line.values.get("skyladder/hours_left")
    if logged is not None and math.isfinite(logged):
        return logged
    if total is None or not line.elapsed_ms:
        return None
    return (total - line.iteration) * line.elapsed_ms / 3.6e6


def _silence(run: RunFolder, latest: Attempt) -> float:
    logs = rank_logs(run.attempt_folder(latest.number))
    spoke = max((log.stat().st_mtime for log in logs), default=latest.started)
    return max(0.0, time.time() - spoke)


def _part(path: Path, num_bytes: int) -> str:
    """Return the first bytes of a file as text, or the last ones where the number is negative."""
    with path.open("rb") as file:
        if num_bytes < 0:
            file.seek(max(0, path.stat().st_size + num_bytes))
        return file.read(abs(num_bytes)).decode("utf-8", errors="replace")
