"""The process that `testing.ProcessPool` keeps: it has imported Megatron once and forks from there.

Importing torch and Megatron takes some seconds, a fork none. One JSON object per line comes in on
the standard input, one goes out per finished job:

    {"body": "module:function", "arguments": {...}, "num_processes": 2, "folder": "/tmp/x",
     "environment": {...}, "path": [...], "port": 29500, "timeout_seconds": 300}
    {"exit_codes": [0, -9]}

Runs on the CPU engine whatever the machine has.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import gc
import importlib
import inspect
import json
import os
import signal
import sys
import time
import traceback
from typing import IO, Any

POLL_SECONDS = 0.01
_IMPORTED_BY_RANKS = (
    "megatron.core.datasets.gpt_dataset",
    "megatron.core.datasets.blended_megatron_dataset_builder",
    "megatron.core.models.mimo",
    "megatron.core.tokenizers.text.models",
    "megatron_skyladder.megatron_lm.batches",
    "megatron_skyladder.megatron_lm.evaluate",
    "megatron_skyladder.megatron_lm.launch",
    "megatron_skyladder.megatron_lm.patch_calls",
    "megatron_skyladder.megatron_lm.spec",
    "megatron_skyladder.runtime.evaluation",
    "megatron_skyladder.runtime.sequence_mean",
    "megatron_skyladder.schedules",
)
TIMED_OUT = 124  # as timeout(1) has it


def main() -> None:
    """Serve jobs until the standard input is closed."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print must not look like an answer
    _prepare(sys.argv[1:])
    for line in sys.stdin:
        job = json.loads(line)
        answers.write(json.dumps({"exit_codes": _run(job, answers)}) + "\n")
        answers.flush()
    gc.unfreeze()  # else what is collected at an interpreter's end is reported as leaked


def _prepare(preload: list[str]) -> None:
    """Import what every job needs, and more modules by name; no thread may start before forks."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["SKYLADDER_DEVICE"] = "cpu"
    os.environ["OMP_NUM_THREADS"] = "1"  # bit-identical sums, and the cores are few
    gc.disable()  # nothing that is imported is garbage
    from megatron_skyladder.cpu import engine as cpu_engine

    cpu_engine.install()
    for name in (
        *preload,
        "megatron.training.training",
        "megatron.training.checkpointing",
        "megatron.training.models.gpt",
        "megatron.training.argument_utils",
        "megatron.core.tokenizers.text",
        "megatron_skyladder.runtime.document_mask",
        "megatron_skyladder.megatron_lm.compat",
        "megatron_skyladder.megatron_lm.hooks",
        "megatron_skyladder.pretrain_gpt",
        "megatron_skyladder.runtime.probe",
    ):
        try:
            importlib.import_module(name)
        except ImportError:  # another release: the job itself will say what it lacks
            traceback.print_exc()
    for name in _IMPORTED_BY_RANKS:
        with contextlib.suppress(ImportError):  # a release has it, or not
            importlib.import_module(name)
    _read_packages_once()
    _fork_checkpoint_helpers()
    _read_help_once()
    # a rank's first full collection would walk half a million objects, and so copy their pages
    gc.collect()
    gc.freeze()
    gc.enable()


def _read_packages_once() -> None:
    """Keep what packages announce, which torch asks of all of them in each rank."""
    from importlib import metadata

    kept: Any = functools.cache(metadata.entry_points)
    metadata.entry_points = kept
    metadata.entry_points(group="torch.distributed.backends")


def _read_help_once() -> None:
    """Keep the help of flags, which Megatron (since 0.17) reads out of the source of its classes.

    It does so whenever it makes its parser, which is twice in each rank.
    """
    from megatron.training import arguments

    factory = getattr(arguments, "ArgumentGroupFactory", None)
    if factory is None:
        return
    original = factory._get_field_docstrings
    known: dict[type, dict[str, str]] = {}

    def docstrings(self: Any, config: type) -> dict[str, str]:
        if config not in known:
            known[config] = original(self, config)
        return known[config]

    factory._get_field_docstrings = docstrings
    reader = factory.__new__(factory)
    for module in (arguments, importlib.import_module("megatron.training.config")):
        for value in list(vars(module).values()):
            if isinstance(value, type) and dataclasses.is_dataclass(value):
                with contextlib.suppress(OSError, TypeError):  # its source is not there
                    reader._get_field_docstrings(value)


def _fork_checkpoint_helpers() -> None:
    """Let each rank that saves fork the process that holds its queue; a new one imports torch."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    original = getattr(filesystem_async, "get_write_results_queue", None)  # since 0.17
    if original is not None and "mp_mode" in inspect.signature(original).parameters:
        filesystem_async.get_write_results_queue = lambda mp_mode="fork": original(mp_mode="fork")


def _run(job: dict[str, Any], answers: IO[str]) -> list[int]:
    """Fork the ranks of one job and wait for all; when one fails the others are killed."""
    ranks = {}
    for rank in range(job["num_processes"]):
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            answers.close()
            _be_rank(rank, job)  # does not return
        os.setpgid(child, child)  # here too: whoever comes first
        ranks[child] = rank
    exit_codes: dict[int, int] = {}
    deadline = time.monotonic() + job["timeout_seconds"]
    try:
        while len(exit_codes) < len(ranks) and not any(exit_codes.values()):
            child, status = os.waitpid(-1, os.WNOHANG)
            if child in ranks:
                exit_codes[ranks[child]] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                exit_codes |= {r: TIMED_OUT for r in ranks.values() if r not in exit_codes}
            else:
                time.sleep(POLL_SECONDS)
    finally:
        for child in ranks:  # and the processes it started, when interrupted as well
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
    for child, rank in ranks.items():
        with contextlib.suppress(ChildProcessError):  # waited for above
            os.waitpid(child, 0)
        exit_codes.setdefault(rank, -signal.SIGKILL)
    return [exit_codes[rank] for rank in range(len(ranks))]


def _be_rank(rank: int, job: dict[str, Any]) -> None:
    """Run the job's body as one rank and end the process."""
    code = 1
    try:
        _enter(rank, job)
        module, _, function = job["body"].partition(":")
        getattr(importlib.import_module(module), function)(**job["arguments"])
        code = 0
    except SystemExit as exit_request:
        code = _exit_code(exit_request.code)
    except BaseException:
        traceback.print_exc()
    try:
        atexit._run_exitfuncs()  # ends the data loader's workers
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _exit_code(value: Any) -> int:
    """Return what the interpreter would make of ``sys.exit(value)``."""
    if value is None:
        return 0
    if isinstance(value, int):
        return value
    sys.stderr.write(f"{value}\n")
    return 1


def _enter(rank: int, job: dict[str, Any]) -> None:
    log = os.open(
        os.path.join(job["folder"], f"log.{rank}.txt"), os.O_CREAT | os.O_WRONLY | os.O_APPEND
    )
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)  # the buffers of before the fork are not ours
    sys.stderr = os.fdopen(2, "w", buffering=1)
    count = str(job["num_processes"])
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=count,
        LOCAL_WORLD_SIZE=count,
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(job["port"]),
        **job["environment"],
    )
    sys.path[:0] = [folder for folder in job["path"] if folder not in sys.path]
    import torch

    torch.set_num_threads(1)


if __name__ == "__main__":
    main()
