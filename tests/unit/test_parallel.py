"""``skyladder plan`` under context parallelism: balance and traffic at each stage."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_skyladder.cli import main
from megatron_skyladder.data.indexed import IndexedWriter
from megatron_skyladder.planning import estimate, parallel, run_flags

# 100 steps of 4 rows of 64 tokens; windows of 8 at step 0, 16 at step 8, 24 at step 16, ...
LAUNCH = (
    "plan --num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 64 "
    "--group-query-attention --num-query-groups 2 --position-embedding-type rope --vocab-size 512 "
    "--global-batch-size 4 --train-iters 100 --skyladder-start-window 8 --skyladder-alpha 1"
)


def call(capsys: pytest.CaptureFixture[str], flags: str) -> str:
    assert main(f"{LAUNCH} {flags}".split()) == 0, capsys.readouterr().err
    return capsys.readouterr().out


ZIGZAG = "--skyladder-context-parallel-layout zigzag"


def plan_json(
    capsys: pytest.CaptureFixture[str], flags: str, layout: str = ZIGZAG
) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(call(capsys, f"--json {flags} {layout}"))
    return result


def planned(flags: str) -> estimate.Plan:
    parser = argparse.ArgumentParser()
    run_flags.add_run_flags(parser)
    words = LAUNCH.removeprefix("plan ").split()
    return estimate.make_plan(parser.parse_args([*words, *flags.split()]), name="run")


def test_balance_and_traffic_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    """Chunks of 16 on 2 ranks: rank 0 has 0..15 and 48..63, rank 1 has 16..47."""
    plan = plan_json(capsys, "--context-parallel-size 2 --at 0,16,99")["context_parallel"]
    assert plan["size"] == 2
    # windows of 8: two in a chunk, 36 pairs each
    assert plan["stages"]["0"] == {
        "work_of_ranks": [144, 144],
        "work_max_over_mean": 1.0,
        "waiting_share": 0.0,
        "received_bytes_per_layer_and_row": 0.0,
        "share_of_all_gather": 0.0,
        "zigzag_work_max_over_mean": 1.0,
        "zigzag_share_of_all_gather": 0.0,
    }
    # windows of 24 (0..23, 24..47, 48..63): rank 0 has 136 + 136 pairs; rank 1 the other 300 - 136
    # of the first window and all 300 of the second. It needs 0..15: 16 of the 2 * 32 tokens that an
    # all-gather would bring; 8 tokens per rank, 2 groups of 8 numbers, K and V, 2 bytes, both ways
    stage = plan["stages"]["16"]
    assert stage["work_of_ranks"] == [272, 464]
    assert stage["work_max_over_mean"] == pytest.approx(464 / 368)
    assert stage["waiting_share"] == pytest.approx(164 / 736)
    assert stage["share_of_all_gather"] == 16 / 64
    assert stage["received_bytes_per_layer_and_row"] == 8 * 2 * 8 * 2 * 2 * 2
    # the whole row: zigzag balances it
    assert plan["stages"]["99"]["work_max_over_mean"] == 1.0
    assert 1.0 < plan["work_max_over_mean"] < 464 / 368


def test_the_busiest_rank_over_a_run_is_the_mean_over_its_steps() -> None:
    """Against every step of a run with more steps than are looked at."""
    plan = planned(f"--context-parallel-size 2 --train-iters 5000 --skyladder-alpha 1/64 {ZIGZAG}")
    works = {
        window: parallel.parallel_costs(plan, window).work
        for window in {plan.window(step) for step in range(5000)}
    }
    of_steps = [works[plan.window(step)] for step in range(5000)]
    exact = sum(map(max, of_steps)) / sum(sum(work) / 2 for work in of_steps)
    assert exact > 1.01 and plan.busiest_over_mean == pytest.approx(exact, rel=2e-3)
    at_steps = [plan.timed_fraction_at(step) for step in range(5000)]
    assert sum(at_steps) / 5000 == pytest.approx(plan.timed_fractions[1], rel=2e-3)


def test_tensor_parallel_ranks_share_the_groups(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [
        plan_json(capsys, f"--context-parallel-size 2 --tensor-model-parallel-size {tp} --at 99")[
            "context_parallel"
        ]["stages"]["99"]["received_bytes_per_layer_and_row"]
        for tp in (1, 2, 4)
    ]
    assert sizes[0] == 2 * sizes[1] == 2 * sizes[2]  # with 4 ranks each has one of the 2 groups


def test_what_a_rank_keeps_for_the_backward_pass(capsys: pytest.CaptureFixture[str]) -> None:
    """In two layers of 2 groups of 8 numbers, K and V, 2 bytes, at the last window."""

    def kept(flags: str) -> float:
        found: float = plan_json(capsys, flags)["context_parallel"]["kept_bytes_per_sequence"]
        return found / (2 * 2 * 8 * 2 * 2)

    # the whole sequence: rank 0's last chunk sees all 64 keys, rank 1's run 16..47 sees 0..47
    assert kept("--context-parallel-size 2") == 64
    # chunks of 8: rank 1's see 0..15 and 0..55, rank 2's 0..23 and 0..47
    assert kept("--context-parallel-size 4") == 16 + 56
    # with 32 visible tokens at last, the first 31 queries of 16..47 and of 48..63 see keys before
    # their run: rank 0's 16 queries see 48 - 31 .. 63, rank 1's 31 see 0 .. 46
    sliding = "--skyladder-mask sliding --skyladder-final-window 32"
    assert kept(f"--context-parallel-size 2 {sliding}") == 47
    # windows of 32 end with ranks' runs of whole windows
    balanced = "--skyladder-context-parallel-layout balanced --skyladder-final-window 32"
    flags = f"--json --context-parallel-size 2 {balanced}"
    assert json.loads(call(capsys, flags))["context_parallel"]["kept_bytes_per_sequence"] == 0
    text = " ".join(call(capsys, "-v --context-parallel-size 4").split())
    assert "at a window of 64, keys and values of other ranks take up to 9.22e-06 GB" in text
    assert "other ranks take" not in call(capsys, f"-v --context-parallel-size 2 {balanced}")


def test_documents_are_measured(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Documents of 16 tokens end with the chunks: nothing to fetch at any window."""
    with IndexedWriter(tmp_path / "data", "<u2") as writer:
        for _ in range(100):
            writer.add_document(np.arange(16))
    flags = f"--context-parallel-size 2 --at 99 --data-path {tmp_path / 'data'}"
    masked = plan_json(capsys, f"{flags} --skyladder-intra-document")["context_parallel"]
    assert masked["stages"]["99"]["work_of_ranks"] == [272, 272]
    assert masked["stages"]["99"]["share_of_all_gather"] == 0
    joined = plan_json(capsys, flags)["context_parallel"]
    assert joined["stages"]["99"]["share_of_all_gather"] > 0


def test_the_sliding_window_fetches_less_than_a_window(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_json(capsys, "--context-parallel-size 2 --skyladder-mask sliding --at 0")
    stage = plan["context_parallel"]["stages"]["0"]
    # 7 tokens before 16 and before 48
    assert stage["share_of_all_gather"] == 14 / 64


def test_the_text_has_a_table_and_explains_rounding(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "-v --context-parallel-size 2 --at 16 --skyladder-round-to auto"
    text = call(capsys, f"{flags} {ZIGZAG}")
    assert "2 ranks share a sequence, in Megatron's zigzag" in text
    assert "max / mean work" in text
    assert " 16      16            1.000   0.0%" in text  # 24 rounded down to 16
    words = " ".join(text.split())
    assert "--skyladder-round-to auto is 16, the largest number that divides" in words
    alone = call(capsys, "-v --at 16")
    assert "max / mean work" not in alone and "zigzag" not in alone


def test_a_step_takes_as_long_as_its_busiest_rank(capsys: pytest.CaptureFixture[str]) -> None:
    """At a window of 24 of 64 tokens zigzag's ranks have 464 and 272 pairs, see above."""
    flags = f"--context-parallel-size 2 {ZIGZAG} --tflops 1e-6 --gpus 2"
    time = planned(flags).time
    assert time is not None
    expected = [f"{time.step.seconds(work / 2080):.2f}" for work in (2 * 464, 2080)]
    text = call(capsys, f"-v --at 16,99 {flags}")
    assert "s/step: of the busiest context-parallel rank" in text
    rows = text.partition("s/step\n")[2].splitlines()[:2]
    assert [row.split()[::5] for row in rows] == [["16", expected[0]], ["99", expected[1]]]
    alone = call(capsys, "-v --at 16 --tflops 1e-6")
    assert "s/step\n" in alone and "rank" not in alone


def test_balanced_is_the_default_and_shown_beside_zigzag(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Windows of 24 on 2 ranks of 32 tokens: 24 + 24 + 16 tokens, 300 + 300 + 136 pairs."""
    plan = plan_json(capsys, "--context-parallel-size 2 --at 16,99", layout="")
    plan = plan["context_parallel"]
    assert plan["layout"] == "window"
    stage = plan["stages"]["16"]
    assert stage["work_of_ranks"] == [368, 368]
    assert stage["zigzag_work_max_over_mean"] == pytest.approx(464 / 368)
    assert stage["zigzag_share_of_all_gather"] == 16 / 64
    # the last window's shells: 48..51 and 60..63 for rank 0, which needs 52..59 of rank 1, which
    # needs 48..51
    assert stage["share_of_all_gather"] == (8 + 4) / 64
    assert plan["stages"]["99"]["work_of_ranks"] == [1040, 1040]  # the whole row is zigzag's
    assert plan["work_max_over_mean"] <= 1.01
    text = call(capsys, "-v --context-parallel-size 2 --at 16")
    assert "2 ranks share a sequence, balanced by the window;" in text
    assert " 16      24            1.000      1.261" in text


def test_rows_that_do_not_divide_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(f"{LAUNCH} --context-parallel-size 3".split())
    assert "--seq-length=64 does not divide into 6 chunks" in " ".join(
        capsys.readouterr().err.split()
    )
