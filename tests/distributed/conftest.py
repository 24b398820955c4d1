"""One pool of processes and one set of starting weights for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from runs import Trainer

from megatron_skyladder.testing import ProcessPool


@pytest.fixture(scope="session")
def pool() -> Iterator[ProcessPool]:
    """Processes that have Megatron imported."""
    with ProcessPool() as processes:
        yield processes


@pytest.fixture(scope="session")
def trainer(pool: ProcessPool, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """Starts recorded runs."""
    return Trainer(pool, tmp_path_factory.mktemp("runs"))
