"""Install the stand-ins once per session; without Transformer Engine nothing here is collected.

`make test-te` runs this folder in an environment of its own (build_te.py). The stand-ins change
torch for the whole process, so other tests must not share it.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_skyladder.testing import ProcessPool

HERE = Path(__file__).resolve().parent

if importlib.util.find_spec("transformer_engine") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    import stand_ins

    sys.path.append(str(HERE.parent / "distributed"))  # the harness of recorded training runs
    stand_ins.install()


class StandInPool(ProcessPool):
    """Processes that have imported Megatron and Transformer Engine on top of the stand-ins."""

    def _running_server(self) -> subprocess.Popen[str]:
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, str(HERE / "pool_worker.py")],
                cwd=HERE.parents[1],
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
