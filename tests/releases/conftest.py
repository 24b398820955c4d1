"""One set of documents for all launches of this folder."""

from typing import Any

import compared
import pytest
from launches import Data


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Short documents, whose ends fall into every row."""
    return Data(tmp_path_factory.mktemp("data"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what was compared with what, and how far apart it was."""
    if compared.ROWS:
        terminalreporter.section("releases")
        for line in compared.lines():
            terminalreporter.write_line(line)
