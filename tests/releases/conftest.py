"""One set of documents for all launches of this folder, and processes that launches share."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import compared
import pytest
from launches import Data
from resuming import pool_for

from megatron_skyladder.testing import ProcessPool


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Short documents, whose ends fall into every row."""
    return Data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def shared_pool() -> Iterator[Callable[[Path | None], ProcessPool]]:
    """The pool of the installed Megatron (None) or of a wheel, until all modules have run.

    Checkouts are many; each has a pool for as long as its tests take.
    """
    with ExitStack() as pools:

        @cache
        def of(megatron: Path | None) -> ProcessPool:
            return pools.enter_context(pool_for(megatron))

        yield of


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what was compared with what, and how far apart it was."""
    if compared.ROWS:
        terminalreporter.section("releases")
        for line in compared.lines():
            terminalreporter.write_line(line)
