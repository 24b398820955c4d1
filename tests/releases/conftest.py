"""One set of documents for all launches of this folder."""

import pytest
from launches import Data


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Short documents, whose ends fall into every row."""
    return Data(tmp_path_factory.mktemp("data"))
