"""Ranks whose nodes give them other settings are refused, all of them, before anything is trained.

A process reads its settings itself, so a file or a variable may differ from node to node.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from runs import Run, Trainer

from megatron_skyladder.testing import requires_megatron

pytestmark = requires_megatron

TWO_STEPS = "--train-samples 16 --micro-batch-size 2"
POINTS = "--skyladder-schedule points --skyladder-points points.csv --skyladder-no-probe"
SPEC = "--spec megatron_skyladder.layer_specs skyladder"
SCRIPT = str(Path(__file__).with_name("plain_script.py"))


def refused(trainer: Trainer, flags: str, nodes: list[dict[str, Any]], **options: Any) -> Run:
    """Start a run that has to end before its first step, on each rank by itself."""
    run = trainer.train(
        f"{TWO_STEPS} {flags}",
        num_processes=len(nodes),
        load=False,
        body="settings_bodies:train_on_nodes",
        nodes=nodes,
        exit_codes=(1, -9),  # the other is killed where one has ended
        **options,
    )
    assert 1 in run.exit_codes
    for rank in (rank for rank, code in enumerate(run.exit_codes) if code == 1):
        assert "UsageError: this run cannot begin: the ranks disagree on " in run.log(rank)
    assert not run.of("step")
    return run


def said(run: Run) -> str:
    """Return what the ranks that were not killed have said."""
    return "".join(run.log(rank) for rank, code in enumerate(run.exit_codes) if code == 1)


@pytest.fixture
def with_other_points(tmp_path: Path) -> list[dict[str, Any]]:
    """Two nodes on which a file of the same name holds other windows."""
    for name, window in (("a", 8), ("b", 16)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "points.csv").write_text(f"0,{window}\n0.5,32\n1,64\n")
    return [{"folder": str(tmp_path / name)} for name in ("a", "b")]


@pytest.mark.parametrize("layout", ["", "--context-parallel-size 2"], ids=["dp2", "cp2"])
def test_another_file_of_points(
    trainer: Trainer, with_other_points: list[dict[str, Any]], layout: str
) -> None:
    run = refused(trainer, f"{POINTS} {layout}", with_other_points)
    assert "schedule: 'points 0:8 0.5:32 1:64 of 2 steps' on rank 0 (" in said(run)
    assert "); 'points 0:16 0.5:32 1:64 of 2 steps' on rank 1 (" in said(run)


def test_another_file_of_points_in_an_evaluation(
    trainer: Trainer, with_other_points: list[dict[str, Any]]
) -> None:
    """Under --skip-train, where Megatron's `train` is not called."""
    flags = f"{POINTS} --skip-train --eval-iters 1 --split 50,50,0"
    run = refused(trainer, flags, with_other_points)
    assert "schedule: 'points 0:8" in said(run)


@pytest.mark.parametrize(
    ("variable", "difference"),
    [
        ("SKYLADDER_START_WINDOW", "schedule: 'linear 32 -> 64"),
        ("SKYLADDER_NO_PROBE", "probe: 'True' on rank 0 ("),
        ("SKYLADDER_EVAL_LENGTHS", "eval_lengths: '()' on rank 0 ("),
        ("SKYLADDER_END_LADDER", "SKYLADDER_END_LADDER: 'unset' on rank 0 ("),
    ],
)
def test_a_variable_of_one_node(trainer: Trainer, variable: str, difference: str) -> None:
    """With --spec; two of these would make one rank wait for the other's messages."""
    value = {"SKYLADDER_START_WINDOW": "16", "SKYLADDER_EVAL_LENGTHS": "8"}.get(variable, "1")
    run = refused(trainer, SPEC, [{}, {"variables": {variable: value}}], script=SCRIPT)
    assert difference in said(run)


def test_the_ladder_ends_where_every_node_has_the_variable(trainer: Trainer) -> None:
    folder = trainer.new_folder("checkpoints")
    begun, ended = (
        trainer.train(
            f"--train-samples 32 --micro-batch-size 2 --save {folder} --save-interval 9 "
            f"{SPEC} {flags}",
            num_processes=2,
            load=False,
            body="settings_bodies:train_on_nodes",
            nodes=[{"variables": variables}] * 2,
            script=SCRIPT,
        )
        for flags, variables in (
            ("--exit-interval 2", {"SKYLADDER_START_WINDOW": "8"}),
            (f"--load {folder}", {"SKYLADDER_END_LADDER": "1"}),
        )
    )
    assert begun.steps("window").keys() == {0, 8}
    assert "the ladder ends here, as --skyladder-end-ladder says: from 16 samples" in ended.log()
    windows = {(entry["samples"], entry["window"]) for entry in ended.of("step")}
    assert windows == {(16, None), (24, None)}
