"""Install the stubs once per session; outside of build_te's environment collect nothing.

`make test-te` runs this folder in an environment of its own (build_te.py). The stubs change
torch for the whole process, so other tests must not share it: on a machine with a GPU and the real
Transformer Engine the whole suite has to leave this folder out.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import build_te
import pytest

from megatron_skyladder.testing import ProcessPool

HERE = Path(__file__).resolve().parent

if not Path(sys.prefix, build_te.STAMP).exists():
    collect_ignore_glob = ["test_*.py"]
else:
    import stubs
    import torch

    # the harnesses of recorded training runs
    sys.path += [str(HERE.parent / "distributed"), str(HERE.parent / "bridge")]
    stubs.install()
    torch.set_num_threads(1)  # tensors are small, and threads only wait for each other


class StandInPool(ProcessPool):
    """Processes that have imported Megatron and Transformer Engine on top of the stubs."""

    def _running_server(self) -> subprocess.Popen[str]:
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, str(HERE / "pool_worker.py"), *self._preload],
                cwd=HERE.parents[1],
                env=self._environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        return self._server


@pytest.fixture
def exact() -> Iterator[None]:
    """Kernels take float32, so that numerics can be compared tightly."""
    from reference_kernels import float32_kernels

    with float32_kernels():
        yield


@pytest.fixture(scope="session")
def pool() -> Iterator[StandInPool]:
    """Processes to train in."""
    with StandInPool() as processes:
        yield processes
