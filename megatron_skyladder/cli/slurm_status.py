"""``skyladder slurm status``: how runs stand, a few lines for each."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from megatron_skyladder.slurm import status
from megatron_skyladder.slurm.status import Status


def show(folders: list[Path], *, as_json: bool) -> int:
    """Print how runs stand and return the exit code.

    Args:
        folders: of the runs; none: those below this folder.
        as_json: print one JSON list instead.

    Raises:
        ValueError: there is no run.
    """
    runs = folders or status.find_runs(Path())
    if not runs:
        raise ValueError(
            "there is no run folder here or two levels below. Name one: skyladder slurm status "
            "RUN_DIR ..."
        )
    found = [status.status_of(run) for run in runs]
    if as_json:
        print(json.dumps([asdict(each) for each in found], indent=2, allow_nan=False))
    else:
        print("\n\n".join(to_text(each) for each in found))
    return 0


def to_text(found: Status) -> str:
    """Return a run's lines, what is most important first; what is not known is left out."""
    lines = [f"{found.run}: {_headline(found)}"]
    if found.iteration is not None:
        total = f" of {found.total_iterations:,}" if found.total_iterations else ""
        lines.append(f"  iteration   {found.iteration:,}{total}")
    lines.append(f"  checkpoint  {f'{found.checkpoint:,}' if found.checkpoint else 'none yet'}")
    if found.window is not None:
        lines.append(f"  window      {found.window:,} tokens")
    if found.tokens is not None:
        lines.append(f"  trained on  {found.tokens:,} tokens")
    if found.hours_left is not None:
        lines.append(f"  left        {found.hours_left:,.1f} hours")
    lines.append(f"  tries       {found.failed} of {found.max_tries} failed in a row")
    if found.reason:
        lines.append(f"  last end    {found.reason}")
    return "\n".join(lines)


def _headline(found: Status) -> str:
    if found.state == status.SUBMITTED:
        return "submitted, not begun yet"
    words = f"{found.state}, attempt {found.attempts}, job {found.job} on {found.hosts}"
    if found.silent_seconds is not None:
        words += f", last word {_ago(found.silent_seconds)} ago"
    if found.is_silent:
        words += ": is the job still there? (squeue)"
    return words


def _ago(seconds: float) -> str:
    for size, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {name}"
    return f"{seconds:.0f} s"
