"""What the jobs of test_jobs.py run in place of Megatron: counts, saves, listens for SIGTERM.

Fast to start, and as awkward as a test wants: RUN/crash makes it fail; with --hold-at N the first
attempt does not get past iteration N until it is asked to leave; --save-seconds N is what the save
of one that is asked to leave takes.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from megatron_skyladder.slurm.rank import ATTEMPT_VARIABLE, RUN_VARIABLE

STEP_SECONDS = 0.1
SAVE_INTERVAL = 10


def main() -> None:
    """Count to --train-iters, from the latest checkpoint on."""
    run, attempt = Path(os.environ[RUN_VARIABLE]), Path(os.environ[ATTEMPT_VARIABLE])
    if (run / "crash").exists():
        raise RuntimeError(f"Disk quota exceeded {os.environ['A_TOKEN']}")
    if os.environ["RANK"] != "0":  # the others leave with the first, as Megatron's ranks do
        while not (attempt / "leaving").exists():
            time.sleep(0.1)
        return
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    checkpoints = Path(value_of("--save"))
    tracker = checkpoints / "latest_checkpointed_iteration.txt"
    iteration = int(tracker.read_text()) if tracker.exists() else 0
    held_at = int(value_of("--hold-at")) if attempt.name == "001" else 0
    try:
        while iteration < int(value_of("--train-iters")):
            time.sleep(STEP_SECONDS)
            while iteration == held_at > 0 and not asked:
                time.sleep(STEP_SECONDS)
            iteration += 1
            if asked:
                time.sleep(float(value_of("--save-seconds")))
            if asked or iteration % SAVE_INTERVAL == 0:
                (checkpoints / f"iter_{iteration:07}" / "mp_rank_00").mkdir(parents=True)
                tracker.write_text(str(iteration))
            if asked:
                sys.exit(0)
    finally:
        (attempt / "leaving").touch()


def value_of(flag: str) -> str:
    """Return the last value of a flag; 0 where it is not given."""
    pairs = zip(sys.argv, sys.argv[1:], strict=False)
    return ["0", *(after for word, after in pairs if word == flag)][-1]


if __name__ == "__main__":
    main()
