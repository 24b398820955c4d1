"""Checkpoints that Megatron's trainer wrote, made once for all tests of this folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from trained import Runs

from megatron_skyladder.testing import ProcessPool

sys.path.append(str(Path(__file__).resolve().parents[1] / "unit"))  # prepare_inputs


@pytest.fixture(scope="session")
def pool() -> Iterator[ProcessPool]:
    """Processes that have Megatron imported."""
    with ProcessPool() as processes:
        yield processes


@pytest.fixture(scope="session")
def runs(pool: ProcessPool, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Trains what is asked for."""
    return Runs(pool, tmp_path_factory.mktemp("trained"))
