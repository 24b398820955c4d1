"""For tests of training code: runs on several processes, the dense oracle, skip marks.

Shipped, so that whoever trains with SkyLadder can test their own changes in the same way. Needs
pytest; imports torch and Megatron only inside functions.

    with ProcessPool() as pool:
        pool.run("my_module:train", num_processes=2, folder=tmp_path, arguments={"tp": 2})

runs ``my_module.train(tp=2)`` as ranks 0 and 1, with torch and Megatron imported already and the
CPU engine installed: a two-process run of Megatron's trainer takes seconds.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
import socket
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from megatron_skyladder.ladder.fragments import dense_mask

if TYPE_CHECKING:
    import torch

LOG_TAIL_LINES = 40
_PORTS = range(20_000, 32_000)

requires_megatron = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None
    or importlib.util.find_spec("megatron.training") is None,
    reason="needs megatron.training (pip install megatron-skyladder[training])",
)


class ProcessPool:
    """Runs functions on several processes that have imported Megatron before they start.

    One job at a time; two pools may run side by side.

    Args:
        python_path: folders that come first on the processes' path, such as a Megatron-LM checkout
            in the place of the installed one.
        preload: modules to import before the first job, such as another trainer's.
    """

    def __init__(self, python_path: Sequence[Path] = (), preload: Sequence[str] = ()) -> None:
        self._python_path = [str(folder) for folder in python_path]
        self._preload = list(preload)
        self._server: subprocess.Popen[str] | None = None

    def __enter__(self) -> ProcessPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the pool's process."""
        if self._server is not None:
            assert self._server.stdin is not None
            self._server.stdin.close()
            self._server.wait()
            self._server = None

    def run(
        self,
        body: str,
        *,
        num_processes: int,
        folder: Path,
        arguments: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
        timeout_seconds: float = 300,
        exit_codes: tuple[int, ...] = (0,),
    ) -> list[int]:
        """Run ``body`` as every rank of one job; RANK, WORLD_SIZE and the like are set.

        Args:
            body: ``module:function``, importable from where this process imports.
            num_processes: ranks.
            folder: gets ``log.<rank>.txt`` with all output.
            arguments: keyword arguments of the function, as JSON can hold them.
            environment: set in every rank.
            timeout_seconds: after these all ranks are killed. When one rank fails the others are
                killed too.
            exit_codes: what may happen; a rank killed by signal 9 has -9.

        Returns:
            The ranks' exit codes.

        Raises:
            AssertionError: a rank ended with another code; the message has the ends of the logs.
        """
        folder.mkdir(parents=True, exist_ok=True)
        job = {
            "body": body,
            "arguments": dict(arguments or {}),
            "num_processes": num_processes,
            "folder": str(folder),
            "environment": dict(environment or {}),
            "path": [*self._python_path, *(entry for entry in sys.path if entry)],
            "port": free_port(),
            "timeout_seconds": timeout_seconds,
        }
        server = self._running_server()
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        if not answer:
            self.close()
            raise AssertionError(f"the process that starts the ranks died during {body}")
        codes: list[int] = json.loads(answer)["exit_codes"]
        if not set(codes) <= set(exit_codes):
            raise AssertionError(f"{body} ended with {codes}\n{log_tails(folder, num_processes)}")
        return codes

    def _running_server(self) -> subprocess.Popen[str]:
        if self._server is None:
            package = str(Path(__file__).resolve().parents[2])
            self._server = subprocess.Popen(
                [sys.executable, "-m", "megatron_skyladder.testing.worker", *self._preload],
                cwd=package,  # so that -m finds the package where it is not installed
                env=self._environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        return self._server

    def _environment(self) -> dict[str, str]:
        """Return this process's, with the path."""
        path = [*self._python_path, os.environ.get("PYTHONPATH", "")]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}


def log_tails(folder: Path, num_processes: int) -> str:
    """Return the last lines of every rank's log."""
    parts = []
    for rank in range(num_processes):
        with contextlib.suppress(FileNotFoundError):
            lines = (folder / f"log.{rank}.txt").read_text(errors="replace").splitlines()
            parts.append(f"--- rank {rank} ---\n" + "\n".join(lines[-LOG_TAIL_LINES:]))
    return "\n".join(parts)


def read_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """Return the whole tensors of a ``torch_dist`` checkpoint, by name, whatever wrote it.

    Args:
        folder: one iteration's folder, such as ``checkpoints/iter_0000010``.
    """
    import torch
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = checkpoint.FileSystemReader(folder)
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        checkpoint.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def megatron_dense_mask(
    tokens: np.ndarray,
    *,
    window_len: int,
    eod: int | None = None,
    sliding: bool = False,
) -> torch.Tensor:
    """Return the mask of some sequences as stock Megatron's own (local) attention takes it.

    With it, stock Megatron is the oracle: nothing of SkyLadder's attention is involved.

    Args:
        tokens: int [sequences, seq_length].
        window_len: tokens.
        eod: the token that ends a document; None: documents are not masked.
        sliding: whether the window slides.

    Returns:
        bool [sequences, 1, seq_length, seq_length], True where a query may NOT see a key.
    """
    import torch

    num_rows, seq_length = tokens.shape
    masks = []
    for row in tokens:
        ends = None if eod is None else np.flatnonzero(row == eod) + 1
        masks.append(
            dense_mask(seq_length, window_len=window_len, document_ends=ends, sliding=sliding)
        )
    visible = torch.from_numpy(np.stack(masks))
    return ~visible.view(num_rows, 1, seq_length, seq_length)


def free_port(num_behind: int = 0) -> int:
    """Return a port that is free, for a process that listens there some seconds later.

    It is below those that the system gives to whoever asks for any (from 32,768 on under Linux), or
    another run's sockets might take it in the meantime.

    Args:
        num_behind: how many ports after it are wanted too; these are not tried.
    """
    while True:
        port = secrets.choice(_PORTS[: len(_PORTS) - num_behind])
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
