"""One rank of a job: its own log, its own error report, and a mark when training has ended.

    torchrun ... -m megatron_skyladder.slurm.rank ENTRY <flags>

ENTRY is a module such as ``megatron_skyladder.pretrain_gpt``, or the path of a script such as a
patched checkout's ``pretrain_gpt.py``. The folders come from the environment, see `node`.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path

from megatron_skyladder.errors import TRACEBACK_VARIABLE
from megatron_skyladder.files import write_text
from megatron_skyladder.slurm import masking

RUN_VARIABLE = "SKYLADDER_RUN_DIR"
ATTEMPT_VARIABLE = "SKYLADDER_ATTEMPT_DIR"


def main(words: list[str]) -> None:
    """Run the entry as this rank."""
    rank = int(os.environ["RANK"])
    attempt = Path(os.environ[ATTEMPT_VARIABLE])
    _log_to(attempt / f"rank.{rank:04}.log")
    os.environ[TRACEBACK_VARIABLE] = "1"  # what is wrong must reach us as an exception
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # `node` waits until training listens for it
    entry, sys.argv = words[0], words
    try:
        if entry.endswith(".py"):
            sys.path[0] = str(Path(entry).resolve().parent)
            runpy.run_path(entry, run_name="__main__")
        else:
            runpy.run_module(entry, run_name="__main__", alter_sys=True)
    except SystemExit as leaving:  # also Megatron's way to leave before the end
        if leaving.code not in (0, None):
            said = leaving.code if isinstance(leaving.code, str) else f"exit code {leaving.code}"
            _report_error(attempt, rank, said.removeprefix(f"rank {rank}: "))
        raise
    except BaseException as error:
        _report_error(attempt, rank, f"{type(error).__name__}: {error}")
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Python, as it ends, would let it kill us
    if rank == 0:
        (Path(os.environ[RUN_VARIABLE]) / "finished").touch()


def _log_to(path: Path) -> None:
    """Let everything this process and its children print go to a file."""
    log = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


def _report_error(attempt: Path, rank: int, message: str) -> None:
    # it gets into status.txt; the name of a file may hold what is no text
    message = message.encode("utf-8", "backslashreplace").decode()
    message = masking.mask(message.strip(), os.environ)[:2000]
    report = {"rank": rank, "time": time.time(), "message": message}
    with contextlib.suppress(OSError):  # a full disk, say; the error itself goes on
        write_text(attempt / f"error.{rank:04}.json", json.dumps(report) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
