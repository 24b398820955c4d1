"""One fork server with Bridge imported, one set of weights and data, for all tests here.

`make test-bridge` runs this folder in an environment of its own (build_bridge.py); in any other
nothing is collected.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import build_bridge
import pytest
from bridge_runs import BridgeRuns, new_pool

if not Path(sys.prefix, build_bridge.STAMP).exists():
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BridgeRuns]:
    """Starts runs of Bridge and of the entry point, from the same weights."""
    with new_pool() as pool:
        yield BridgeRuns(pool, tmp_path_factory.mktemp("bridge"))
