"""One node of a job: starts torchrun, and hands signals to the ranks in a way they survive.

    srun --ntasks-per-node=1 ... python -m megatron_skyladder.slurm.node RUN

SLURM sends a signal to some or all processes of a step, depending on the cluster; torchrun, when it
gets SIGTERM, ends its ranks and kills them after 30 seconds, whatever they are writing. So torchrun
ignores these signals, and this process, which gets them on every cluster, tells the ranks alone:
with Megatron's ``--exit-signal-handler`` they finish the step, save and leave. The file RUN/stop
does the same, and so does the job script's note of the signal, which cannot come too early.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from megatron_skyladder.slurm import first_load
from megatron_skyladder.slurm.attempts import RunFolder
from megatron_skyladder.slurm.rank import ATTEMPT_VARIABLE, RUN_VARIABLE
from megatron_skyladder.slurm.settings import BRIDGE_ENTRY, Settings

POLL_SECONDS = 1.0
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


def command(run: RunFolder, settings: Settings, environment: dict[str, str]) -> list[str]:
    """Return the command line of this node's torchrun."""
    load = run.first_load() or str(run.checkpoints)
    words, _ = first_load.words(run, settings)
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes", environment.get("SLURM_STEP_NUM_NODES", "1")),
        *("--node-rank", environment.get("SLURM_NODEID", "0")),
        *("--nproc-per-node", str(settings.ranks_per_node)),
        *("--master-addr", environment["MASTER_ADDR"]),
        *("--master-port", environment["MASTER_PORT"]),
        *("--max-restarts", "0"),  # the job script decides whether to try again
        *("-m", "megatron_skyladder.slurm.rank", settings.entry),
        *words,
        *_of_the_run(settings.entry, str(run.checkpoints), load, str(run.path / "tensorboard")),
    ]


def _of_the_run(entry: str, save: str, load: str, tensorboard: str) -> list[str]:
    """Return what the run folder decides, as the entry takes it."""
    if entry == BRIDGE_ENTRY:
        return [
            *(f"checkpoint.save={save}", f"checkpoint.load={load}"),
            *(f"logger.tensorboard_dir={tensorboard}", "train.exit_signal_handler=true"),
        ]
    return [
        *("--save", save, "--load", load, "--tensorboard-dir", tensorboard),
        "--exit-signal-handler",
    ]


def rank_environment(run: RunFolder, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of this node's ranks, from that of this process."""
    return {
        # an attempt goes on with the W&B run of the one before it; Megatron names none
        "WANDB_RUN_ID": run.wandb_id(),
        "WANDB_RESUME": "allow",
        **environment,
        RUN_VARIABLE: str(run.path),
        # torchrun would end the ranks at once; up to torch 2.7 it knows no such variable
        "PET_SIGNALS_TO_HANDLE": "SIGINT,SIGHUP,SIGQUIT",
    }


def main(words: list[str]) -> int:
    """Run this node's ranks and return torchrun's exit code."""
    came = _note_signals()
    run = RunFolder(Path(words[0]))
    settings = Settings.read(run.path)
    attempt = Path(os.environ[ATTEMPT_VARIABLE])
    index = int(os.environ.get("SLURM_NODEID", "0"))
    environment = rank_environment(run, os.environ)
    with (attempt / f"node.{index}.log").open("a") as log:
        torchrun = subprocess.Popen(
            command(run, settings, environment),
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=_ignore_signals,
        )
    # one node is enough: Megatron's ranks tell each other
    watched = (attempt / "signal", run.path / "stop") if index == 0 else ()
    signalled: set[int] = set()
    while torchrun.poll() is None:
        if came or any(path.exists() for path in watched):
            for rank in listening_ranks(torchrun.pid) - signalled:
                with contextlib.suppress(ProcessLookupError):  # it has ended
                    os.kill(rank, signal.SIGTERM)
                signalled.add(rank)
        time.sleep(POLL_SECONDS)
    _ignore_signals()  # Python, as it ends, would let them kill us
    return torchrun.returncode if torchrun.returncode >= 0 else 128 - torchrun.returncode


def _note_signals() -> list[int]:
    """Return a list that grows when a signal comes."""
    came: list[int] = []
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: came.append(number))
    return came


def listening_ranks(torchrun: int) -> set[int]:
    """Return the process ids of torchrun's children, the ranks, that have a handler for SIGTERM.

    Before training installs it, they ignore the signal and would not know later that it came.
    """
    children: set[int] = set()
    for thread in Path(f"/proc/{torchrun}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            children.update(map(int, thread.read_text().split()))
    return {child for child in children if _listens(child)}


def _listens(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False  # it has ended
    caught = re.search(r"^SigCgt:\s*(\w+)$", status, flags=re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


def _ignore_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
