"""Before and after training, on the job's first node: start or not, go on or not.

    python -m megatron_skyladder.slurm.gate begin RUN
    python -m megatron_skyladder.slurm.gate end RUN EXIT_CODE [SIGNAL]

The answer is the exit code, as the job script reads it; the reason goes to the job's log and to
RUN/status.txt.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

from megatron_skyladder.files import write_text
from megatron_skyladder.slurm import attempts, checkpoints, first_load
from megatron_skyladder.slurm.attempts import Attempt, RunFolder
from megatron_skyladder.slurm.settings import Settings

TRAIN = 0
GAVE_UP = 11  # too many failures in a row, or all checkpoints are lost
NOTHING_TO_DO = 12  # finished, or stopped by the user
GO_ON = 13  # not finished: another job has to

logger = logging.getLogger("megatron_skyladder.slurm")


def begin(run: RunFolder, settings: Settings) -> int:
    """Decide whether to train, settle from which checkpoint, and note a new attempt."""
    run.close_earlier()
    answer = _reason_not_to_train(run, settings)
    if answer is not None:
        return answer
    start, skipped = _settle_checkpoints(run)
    attempt = Attempt(
        number=run.next_number(),
        job=os.environ.get("SLURM_JOB_ID", "none"),
        restarts=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        hosts=os.environ.get("SLURM_JOB_NODELIST", "this machine"),
        started=time.time(),
        start_iteration=start,
        skipped=skipped,
    )
    run.write(attempt)
    run.wandb_id()  # chosen here, where nobody else asks for it
    _write_versions(run.attempt_folder(attempt.number))
    begins = f"from iteration {start:,}" if start else "from the beginning"
    if run.first_load():
        begins = f"from {run.first_load()}"
    _report(run, f"training, attempt {attempt.number}, {begins}")
    _, left_out = first_load.words(run, settings)
    if left_out:
        logger.info(
            "left out, as the run's own checkpoint is loaded, with all that it holds: %s",
            " ".join(left_out),
        )
    logger.info("logs: %s", run.attempt_folder(attempt.number))
    return TRAIN


def _settle_checkpoints(run: RunFolder) -> tuple[int, tuple[str, ...]]:
    """Return the iteration that training begins from, and which checkpoints were not used."""
    flags = run.flags
    start, notes = checkpoints.newest_local(flags), []
    for folder in checkpoints.folders(run.checkpoints, flags):
        found = checkpoints.settle(folder, flags.get("--ckpt-format"))
        start = max(start, found.newest)
        for entry in found.incomplete:
            notes.append(f"{entry.folder.name}: {entry.reason}")
            logger.warning("skipped an incomplete checkpoint, %s", notes[-1])
        for entry in found.unknown:
            notes.append(f"{entry.folder.name}, left as it is: {entry.reason}")
            logger.warning("did not use a checkpoint, %s", notes[-1])
        if found.named not in (None, "release", str(found.newest)):
            logger.warning(
                "%s named %s; the newest complete checkpoint there is %s",
                folder / checkpoints.TRACKER,
                found.named or "none",
                found.newest or "none",
            )
    return start, tuple(notes)


def _reason_not_to_train(run: RunFolder, settings: Settings) -> int | None:
    if run.is_finished:
        _report(run, "finished; to train on, remove the file 'finished' and submit a longer run")
        return NOTHING_TO_DO
    if run.is_stopped:
        _report(run, f"stopped by {run.path / 'stop'}; remove it and submit again to go on")
        return NOTHING_TO_DO
    failed = run.failures_in_a_row()
    if len(failed) >= settings.max_tries:
        return _give_up(run, failed)
    lost = run.lost_iteration()
    return _report_lost(run, lost) if lost else None


def end(run: RunFolder, settings: Settings, exit_code: int, signal: str) -> int:
    """Note how the latest attempt ended and decide whether another one is needed."""
    attempt = run.closed(run.attempts()[-1], exit_code, signal)
    run.write(attempt)
    iteration = attempt.end_iteration
    if attempt.outcome == attempts.FINISHED:
        _report(run, "finished")
        return NOTHING_TO_DO
    if run.is_stopped:
        _report(run, f"stopped at iteration {iteration:,} by {run.path / 'stop'}")
        return NOTHING_TO_DO
    failed = run.failures_in_a_row()
    if len(failed) >= settings.max_tries:
        return _give_up(run, failed)
    because = f"{attempt.outcome}: {attempt.reason}" if attempt.reason else attempt.outcome
    _report(run, f"waiting to go on from iteration {iteration:,} ({because})")
    return GO_ON


def _give_up(run: RunFolder, failed: list[Attempt]) -> int:
    _report(
        run,
        f"gave up: {failed[0].reason} ({len(failed)} attempts in a row failed without a new "
        "checkpoint; fix the cause and submit again)",
    )
    return GAVE_UP


def _report_lost(run: RunFolder, iteration: int) -> int:
    """Say what is wrong with the checkpoints: from the beginning is not where this run was."""
    flags, notes = run.flags, []
    for folder in checkpoints.folders(run.checkpoints, flags):
        found = checkpoints.find(folder, flags.get("--ckpt-format"))
        notes += [f"{each.folder.name}: {each.reason}" for each in found.incomplete + found.unknown]
    _report(
        run,
        f"gave up: iteration {iteration:,} was saved once, and {run.checkpoints} has no checkpoint "
        f"to go on from ({'; '.join(notes) or 'it has none at all'}). Nothing was changed there. "
        "Bring one back and submit again; or, to begin anew, give another --run-dir, or remove "
        f"{run.path / 'attempts'}",
    )
    return GAVE_UP


def _report(run: RunFolder, headline: str) -> None:
    run.write_status(headline)
    logger.info("%s: %s", run.path.name, headline)


def _write_versions(folder: Path) -> None:
    """Note which code this attempt runs."""
    import megatron_skyladder

    package = Path(megatron_skyladder.__file__).resolve().parent
    versions = {
        "megatron_skyladder": megatron_skyladder.__version__,
        "package": str(package),
        "commit": _git(package, "describe", "--always", "--dirty", "--abbrev=40"),
        "python": sys.version.split()[0],
        **_installed_versions(),
    }
    write_text(folder / "versions.json", json.dumps(versions, indent=1) + "\n")
    changes = _git(package, "diff", "HEAD", "--", ".")
    if changes:
        write_text(folder / "uncommitted.diff", changes + "\n")


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True,
            text=True,
            errors="replace",  # a changed file may be in any encoding
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _installed_versions() -> dict[str, str | None]:
    from importlib import metadata

    versions: dict[str, str | None] = {}
    for name in ("torch", "megatron-core", "transformer-engine", "flash-attn", "numpy"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def main(words: list[str]) -> int:
    """Run ``begin`` or ``end`` and return the answer."""
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="skyladder: %(message)s")
    parser = argparse.ArgumentParser(prog="python -m megatron_skyladder.slurm.gate")
    parser.add_argument("moment", choices=("begin", "end"))
    parser.add_argument("run", type=Path)
    parser.add_argument("exit_code", type=int, nargs="?", default=0)
    parser.add_argument("signal", nargs="?", default="")
    args = parser.parse_args(words)
    run, settings = RunFolder(args.run), Settings.read(args.run)
    if args.moment == "begin":
        return begin(run, settings)
    return end(run, settings, args.exit_code, args.signal)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
