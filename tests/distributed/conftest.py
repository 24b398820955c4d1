"""One pool of processes and one set of starting weights for all tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
from histories import RESHARDABLE, History
from runs import Run, Trainer

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


@pytest.fixture(scope="session")
def reference(trainer: Trainer) -> Callable[[str, str], Run]:
    """Runs of stock Megatron with dense masks, one per mask and architecture of `test_parity`."""
    from test_parity import MASKS, SAMPLES

    @cache
    def run(mask: str, architecture: str) -> Run:
        flags = f"{SAMPLES} --micro-batch-size 4"
        return trainer.train(
            flags, architecture=architecture, gradients=True, dense=MASKS[mask].dense
        )

    return run


@pytest.fixture(scope="session")
def uninterrupted(trainer: Trainer) -> Callable[..., History]:
    """Whole runs, one per set of flags."""

    @cache
    def run(flags: str, num_processes: int = 1) -> History:
        history = History(trainer, flags, num_processes)
        history.go_on(f"--save-interval 100 {RESHARDABLE}")
        return history

    return run
