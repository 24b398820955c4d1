"""The real FlashAttention 4 kernels, compiled for Hopper and Blackwell: few, and never a new one.

`make test-fa4` makes the environment that SKYLADDER_FA4_PYTHON names; what is compiled, and how
without a device, says `ladder_kernels`. What the kernels compute only a GPU can tell.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

PYTHON = os.environ.get("SKYLADDER_FA4_PYTHON")
SCRIPT = Path(__file__).with_name("ladder_kernels.py")

pytestmark = pytest.mark.skipif(not PYTHON, reason="make test-fa4 runs these")


@pytest.fixture(scope="module", params=["sm_90", "sm_100"])
def ladder(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Windows, and case -> [forward kernels, backward kernels] compiled up to each of them."""
    assert PYTHON is not None
    done = subprocess.run(
        [str(Path(PYTHON).absolute()), str(SCRIPT), request.param],
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parents[2])},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_the_ladder_is_a_whole_one(ladder: dict[str, Any]) -> None:
    windows = ladder["windows"]
    assert windows[0] == 32 and windows[-1] == 8192 and len(windows) > 30
    # two models, local and sliding, documents, CP; the four of documents under CP with sinks too
    assert len(ladder["kernels"]) == 16 + 4


def test_a_ladder_needs_a_handful_of_kernels(ladder: dict[str, Any]) -> None:
    one_b, three_b, with_sinks = (
        [after[-1] for name, after in ladder["kernels"].items() if chosen(name)][-1]
        for chosen in (
            lambda name: name.startswith("1b") and "sinks" not in name,
            lambda name: name.startswith("3b") and "sinks" not in name,
            lambda name: "sinks" in name,
        )
    )
    forward, backward = (last - first for last, first in zip(with_sinks, three_b, strict=True))
    # a sink is added up behind the backward kernel, which stays the same
    assert 0 < forward <= 6 and backward == 0
    both = [last - first for last, first in zip(three_b, one_b, strict=True)]
    for forward, backward in (one_b, both):  # of all masks and layouts together
        assert forward <= 3 and backward <= 7


def test_a_growing_window_compiles_nothing_new(ladder: dict[str, Any]) -> None:
    """But once or twice, early: kernels know whether a call is longer than a tile or two."""
    for name, after in ladder["kernels"].items():
        changes = [
            window
            for window, before, now in zip(
                ladder["windows"][1:], after[:-1], after[1:], strict=True
            )
            if now != before
        ]
        assert len(changes) <= 2, f"{name}: new kernels at windows {changes}"
        assert all(window <= 2048 for window in changes), f"{name}: {changes}"
