"""Stopping and going on, in Bridge and between Bridge and the Megatron-LM entry point."""

from __future__ import annotations

import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from bridge_runs import LADDER, BridgeRun, BridgeRuns, differences
from parity import LOSS_TOLERANCE, NORM_TOLERANCE


class Halves:
    """Runs that stop in the middle of the ladder, after 4 of 8 iterations."""

    def __init__(self, runs: BridgeRuns) -> None:
        self.runs = runs

    @cached_property
    def of_bridge(self) -> BridgeRun:
        return self.runs.bridge(ladder=LADDER, save_interval=4, exit_interval=4)

    @cached_property
    def of_megatron_lm(self) -> BridgeRun:
        return self.runs.megatron_lm(ladder=LADDER, save=True, save_interval=4, exit_interval=4)


@pytest.fixture(scope="module")
def halves(runs: BridgeRuns) -> Halves:
    return Halves(runs)


def goes_on(halves: Halves, half: BridgeRun, processes: int = 1, **options: Any) -> BridgeRun:
    options = {"ladder": LADDER, **options}
    return halves.runs.bridge(processes, load=str(half.checkpoint), **options)


def test_resume_is_bit_identical(halves: Halves) -> None:
    run = goes_on(halves, halves.of_bridge)
    assert [step["iteration"] for step in run.steps()] == [5, 6, 7, 8]
    assert differences(halves.runs.reference(LADDER), run, first=4) == (0, 0)


def test_resume_in_another_layout(halves: Halves) -> None:
    """From one process to PP2, as in Megatron-LM: the optimizer has to be saved for it."""
    half = halves.runs.bridge(
        ladder=LADDER, save_interval=4, exit_interval=4, change="fully_reshardable"
    )
    run = goes_on(halves, half, 2, pp=2, change="fully_reshardable")
    losses, norms = differences(halves.runs.reference(LADDER), run, first=4)
    assert losses <= LOSS_TOLERANCE
    assert norms <= NORM_TOLERANCE


def test_from_megatron_lm_to_bridge(halves: Halves) -> None:
    run = goes_on(halves, halves.of_megatron_lm)
    assert differences(halves.runs.reference(LADDER), run, first=4) == (0, 0)


def test_from_bridge_to_megatron_lm(halves: Halves) -> None:
    run = halves.runs.megatron_lm(ladder=LADDER, load=str(halves.of_bridge.checkpoint))
    assert differences(halves.runs.reference(LADDER), run, first=4) == (0, 0)


OTHER = {**LADDER, "start_window": 16}


@pytest.mark.parametrize("half", ["of_bridge", "of_megatron_lm"])
def test_another_schedule_is_refused(half: str, halves: Halves) -> None:
    log = goes_on(halves, getattr(halves, half), ladder=OTHER, exit_codes=(1,)).log()
    assert "the checkpoint was trained under another schedule" in log
    assert "To keep the checkpoint's windows: skyladder.start_window=8" in log
    assert "skyladder.allow_schedule_change=true" in log


@pytest.fixture(scope="module")
def routes(runs: BridgeRuns) -> dict[str, dict[str, Any]]:
    """Where Bridge looks besides a folder of iterations: in one of them, and at interim ones."""
    options = {"save_interval": 3, "exit_interval": 4, "change": "interim_checkpoints"}
    half = runs.bridge(ladder=LADDER, **options)
    elsewhere = half.folder / "elsewhere"
    shutil.copytree(half.checkpoint / "non_persistent", elsewhere / "non_persistent")
    return {
        "an iteration": {"load": str(half.checkpoint / "non_persistent" / "iter_0000004")},
        "interim": {"load": str(half.checkpoint), "change": "interim_checkpoints"},
        "interim alone": {"load": str(elsewhere), "change": "interim_checkpoints"},
    }


ROUTES = ("an iteration", "interim", "interim alone")


@pytest.mark.parametrize("route", ROUTES)
def test_another_schedule_is_refused_by_every_route(
    route: str, routes: dict[str, dict[str, Any]], runs: BridgeRuns
) -> None:
    log = runs.bridge(ladder=OTHER, exit_codes=(1,), **routes[route]).log()
    assert "the checkpoint was trained under another schedule" in log


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_goes_on(
    route: str, routes: dict[str, dict[str, Any]], runs: BridgeRuns
) -> None:
    run = runs.bridge(ladder=LADDER, **routes[route])
    assert [step["iteration"] for step in run.steps()] == [5, 6, 7, 8]
    assert differences(runs.reference(LADDER), run, first=4) == (0, 0)
    assert "cannot be read" not in run.log()


def test_a_local_checkpoint_is_compared_by_the_one_saved_before_it(tmp_path: Path) -> None:
    """It has no configuration of its own."""
    from megatron_skyladder.megatron_bridge import checkpoints

    for name in ("iter_0000002", "iter_0000004", "iter_0000006", "hf"):
        (tmp_path / name).mkdir()
    found = checkpoints._before(str(tmp_path), 5)
    assert found == [str(tmp_path / "iter_0000004"), str(tmp_path / "iter_0000002")]
    assert checkpoints._before(str(tmp_path / "absent"), 5) == []


def test_a_schedule_that_cannot_be_read_is_refused(halves: Halves) -> None:
    half, change = halves.of_bridge, "checkpoints_that_cannot_be_found"
    log = goes_on(halves, half, change=change, exit_codes=(1,)).log()
    assert f"the schedule of the checkpoint in {half.checkpoint} cannot be read" in log
    assert "skyladder.allow_schedule_change=true" in log
    allowed = {**LADDER, "allow_schedule_change": True}
    run = goes_on(halves, half, change=change, ladder=allowed)
    assert "SkyLadder: WARNING: the schedule of the checkpoint in" in run.log()
    assert [step["iteration"] for step in run.steps()] == [5, 6, 7, 8]


def test_the_first_rank_finds_the_checkpoint_for_all(runs: BridgeRuns) -> None:
    """What it reads is sent to all, so none may have turned off before."""
    half = runs.bridge(2, ladder=LADDER, save_interval=4, exit_interval=4)
    change = "checkpoints_that_rank_1_cannot_find"
    run = runs.bridge(2, ladder=LADDER, load=str(half.checkpoint), change=change)
    assert [step["iteration"] for step in run.steps()] == [5, 6, 7, 8]


def test_bridges_checkpoint_under_another_schedule_is_refused_by_megatron_lm(
    halves: Halves,
) -> None:
    run = halves.runs.megatron_lm(
        ladder=OTHER, load=str(halves.of_bridge.checkpoint), exit_codes=(1, 2)
    )
    assert "the checkpoint was trained under another schedule" in run.log()


def test_another_schedule_is_taken_on_request_and_said(halves: Halves) -> None:
    other = {**OTHER, "allow_schedule_change": True}
    run = goes_on(halves, halves.of_bridge, ladder=other)
    assert "SkyLadder: WARNING: schedule changed on resume, as allowed" in run.log()
    assert run.steps()[0]["window"] != halves.runs.reference(LADDER).steps()[4]["window"]


def test_a_longer_run_with_the_same_windows_is_taken(halves: Halves) -> None:
    """Twice the iterations, half the share: the fingerprint's text differs, no window does."""
    longer = {**LADDER, "expand_fraction": "0.32"}
    run = goes_on(halves, halves.of_bridge, ladder=longer, iterations=16)
    assert "from here on the windows are the same" in run.log()
    assert differences(halves.runs.reference(LADDER), _first(run, 4), first=4) == (0, 0)


class _first(BridgeRun):
    """The first steps of a run."""

    def __init__(self, run: BridgeRun, count: int) -> None:
        super().__init__(run.folder)
        self.count = count

    def steps(self) -> list[dict[str, Any]]:
        return super().steps()[: self.count]


def test_a_checkpoint_without_its_configuration_is_refused(halves: Halves) -> None:
    """Bridge writes run_config.yaml last, so a run that was killed may have left none.

    Bridge itself takes it for a checkpoint of Megatron-LM then, and finds no arguments.
    """
    half = halves.of_bridge
    copy = half.folder.parent / "without-config"
    shutil.copytree(half.checkpoint, copy / "checkpoint")
    (copy / "checkpoint" / "iter_0000004" / "run_config.yaml").unlink()
    log = goes_on(halves, BridgeRun(copy), exit_codes=(1,)).log()
    assert "missing 'args' field" in log


def test_from_samples(runs: BridgeRuns) -> None:
    run = runs.bridge(ladder=LADDER, samples=64)
    assert differences(runs.reference(LADDER), run) == (0, 0)
