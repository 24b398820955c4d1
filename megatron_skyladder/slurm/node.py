"""One node of a job: starts torchrun, and hands signals to the ranks in a way they survive.

    srun --ntasks-per-node=1 ... python -m megatron_skyladder.slurm.node RUN

SLURM sends a signal to some or all processes of a step, depending on the cluster; torchrun, when it
gets SIGTERM, ends its ranks and kills them after 30 seconds, whatever they are writing. So torchrun
ignores these signals, and this process, which gets them on every cluster, tells the ranks alone:
with Megatron's ``--exit-signal-handler`` they finish the step, save and leave. The file RUN/stop
does the same.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from megatron_skyladder.slurm.attempts import RunFolder
from megatron_skyladder.slurm.rank import ATTEMPT_VARIABLE, RUN_VARIABLE
from megatron_skyladder.slurm.settings import Settings

POLL_SECONDS = 1.0
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


def command(run: RunFolder, settings: Settings, environment: dict[str, str]) -> list[str]:
    """Return the command line of this node's torchrun."""
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes", environment.get("SLURM_STEP_NUM_NODES", "1")),
        *("--node-rank", environment.get("SLURM_NODEID", "0")),
        *("--nproc-per-node", str(settings.ranks_per_node)),
        *("--master-addr", environment["MASTER_ADDR"]),
        *("--master-port", environment["MASTER_PORT"]),
        *("--max-restarts", "0"),  # the job script decides whether to try again
        *("-m", "megatron_skyladder.slurm.rank", settings.entry),
        *settings.flags,
        *("--save", str(run.checkpoints), "--load", str(run.checkpoints)),
        *("--tensorboard-dir", str(run.path / "tensorboard")),
        "--exit-signal-handler",
    ]


def main(words: list[str]) -> int:
    """Run this node's ranks and return torchrun's exit code."""
    run = RunFolder(Path(words[0]))
    settings = Settings.read(run.path)
    attempt = Path(os.environ[ATTEMPT_VARIABLE])
    index = int(os.environ.get("SLURM_NODEID", "0"))
    environment = {
        **os.environ,
        RUN_VARIABLE: str(run.path),
        # torchrun would end the ranks at once; up to torch 2.7 it knows no such variable
        "PET_SIGNALS_TO_HANDLE": "SIGINT,SIGHUP,SIGQUIT",
        # when one rank has failed, what the others wait for will not come
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5",
    }
    with (attempt / f"node.{index}.log").open("a") as log:
        torchrun = subprocess.Popen(
            command(run, settings, environment),
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=_ignore_signals,
        )
    asked = _Asked()
    watched = run.path / "stop" if index == 0 else None
    while torchrun.poll() is None:
        if asked.for_the_first_time(watched):
            tell_ranks(torchrun.pid)
        time.sleep(POLL_SECONDS)
    return torchrun.returncode if torchrun.returncode >= 0 else 128 - torchrun.returncode


class _Asked:
    """Whether somebody wants the ranks to save and leave."""

    def __init__(self) -> None:
        self._signalled = False
        self._told = False
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self._signalled = True

    def for_the_first_time(self, stop_file: Path | None) -> bool:
        """Return True once, when a signal has come or the file is there."""
        asked = self._signalled or (stop_file is not None and stop_file.exists())
        first = asked and not self._told
        self._told = self._told or asked
        return first


def tell_ranks(torchrun: int) -> None:
    """Send SIGTERM to torchrun's children, which are the ranks."""
    for children in Path(f"/proc/{torchrun}/task").glob("*/children"):
        for child in children.read_text().split():
            with contextlib.suppress(ProcessLookupError):  # it has ended already
                os.kill(int(child), signal.SIGTERM)


def _ignore_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
