"""Megatron Bridge's default layers, of Transformer Engine, train as the entry point's do.

Needs Megatron Bridge, which `make test-bridge` installs; SKYLADDER_BRIDGE_PACKAGES says where.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bridge_runs import LADDER, BridgeRun, BridgeRuns, differences
from conftest import StandInPool
from reference_kernels import FLOAT32_VARIABLE

PACKAGES = os.environ.get("SKYLADDER_BRIDGE_PACKAGES", "")
BRIDGE_TESTS = Path(__file__).resolve().parents[1] / "bridge"
pytestmark = [
    pytest.mark.te,
    pytest.mark.skipif(not PACKAGES, reason="needs Megatron Bridge: make test-bridge first"),
]

TE_LADDER = {**LADDER, "attention_backend": "te"}
EXACT = {FLOAT32_VARIABLE: "1"}


@pytest.fixture(scope="module")
def te_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BridgeRuns]:
    with StandInPool([BRIDGE_TESTS, Path(PACKAGES)], preload=["bridge_preload"]) as pool:
        yield BridgeRuns(pool, tmp_path_factory.mktemp("te-bridge"))


@pytest.fixture(scope="module")
def weights(te_runs: BridgeRuns) -> str:
    run = te_runs.start("train_megatron_lm", iterations=1, save=True, te=True, environment=EXACT)
    return str(run.checkpoint)


@pytest.fixture(scope="module")
def reference(te_runs: BridgeRuns, weights: str) -> BridgeRun:
    """The entry point on one process."""
    return te_runs.start(
        "train_megatron_lm", ladder=TE_LADDER, te=True, weights=weights, environment=EXACT
    )


@pytest.mark.parametrize(
    "layout",
    [{}, {"tp": 2, "sp": True}, {"pp": 2}, {"cp": 2}],
    ids=["1 process", "TP2 + SP", "PP2", "CP2"],
)
def test_bridges_own_layers(
    layout: dict[str, Any], te_runs: BridgeRuns, reference: BridgeRun, weights: str
) -> None:
    size = layout.get("tp", 1) * layout.get("pp", 1) * layout.get("cp", 1)
    run = te_runs.bridge(
        size, ladder=TE_LADDER, te=True, weights=weights, environment=EXACT, **layout
    )
    assert "thd_to_bshd" in run.log().rpartition("stubs called: ")[2]
    losses, norms = differences(reference, run)
    assert losses <= (2e-6 if layout else 0)
    assert norms <= (5e-6 if layout else 0)
