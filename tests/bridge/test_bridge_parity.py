"""Bridge trains as the entry point does, in every layout; `parity.py` prints the whole table."""

from __future__ import annotations

import re

import pytest
from bridge_runs import LADDER, BridgeRuns, differences
from parity import LAYOUTS, LOSS_TOLERANCE, NORM_TOLERANCE, Case, measure

CASES = (
    Case("TP2 + SP + recompute", "local, documents"),
    Case("PP4", "local, documents"),  # middle stages read sequences
    Case("PP2 x VPP2", "sliding, documents"),
    Case("CP2 x TP2 + SP", "local, documents"),
    Case("DP2, distributed optimizer", "local, documents"),
    Case("CP2", "sliding"),
    Case("PP2", "local"),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case: Case, runs: BridgeRuns) -> None:
    loss, norm = measure(runs, case)
    assert loss <= LOSS_TOLERANCE
    assert norm <= NORM_TOLERANCE


@pytest.mark.parametrize("mask", ["local, documents", "local", "sliding"])
def test_one_process_is_bit_identical(mask: str, runs: BridgeRuns) -> None:
    assert measure(runs, Case("1 process", mask)) == (0, 0)


@pytest.mark.parametrize(("num_processes", "layout"), [(1, {}), (2, {"cp": 2})])
def test_local_layers_may_have_a_ladder_of_their_own(
    runs: BridgeRuns, num_processes: int, layout: dict[str, int]
) -> None:
    """From 3 tokens to all 12 of their own over the 8 steps: 3 + 9 * step // 8."""
    ladder = {**LADDER, "local_start_window": 3, "local_expand_fraction": 1}
    run = runs.bridge(num_processes, ladder=ladder, change="local_layers", **layout)
    losses, norms = differences(runs.reference(ladder, local=True), run)
    assert losses <= LOSS_TOLERANCE and norms <= NORM_TOLERANCE
    logged = re.findall(r"skyladder/local_window: (\d+)", run.log())
    assert logged == ["3", "4", "5", "6", "7", "8", "9", "10"]
    losses, _ = differences(runs.reference(LADDER, local=True), run)
    assert losses > 1e3 * LOSS_TOLERANCE


def test_losses_that_do_not_count_are_averaged_over_whole_sequences(runs: BridgeRuns) -> None:
    """Context-parallel ranks hold unlike numbers of them, and Bridge would average the ranks."""
    one, two = (runs.bridge(cp, cp=cp, ladder=LADDER, change="masked_losses") for cp in (1, 2))
    losses, norms = differences(one, two)
    assert losses <= LOSS_TOLERANCE
    assert norms <= NORM_TOLERANCE


def test_all_layouts_of_the_table_are_named() -> None:
    assert {case.layout for case in CASES} <= set(LAYOUTS)
