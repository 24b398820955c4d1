"""Softmax sinks (--softmax-type): as Megatron's own attention has them, in any layout.

The reference is stock Megatron's plain softmax attention with its own ``softmax_offset`` and a
dense mask, in one process. A parameter for each head: shared out over tensor-parallel ranks, whole
on context-parallel ones, whose gradients of it add up.
"""

from __future__ import annotations

import pytest
from histories import LADDER, WINDOWS, History, assert_same_history
from runs import Run, Trainer
from test_context_parallel_runs import BALANCED
from test_parity import (
    MASKS,
    OWN,
    RECOMPUTE,
    SAMPLES,
    assert_parity,
    gradient_errors,
)

from megatron_skyladder.testing import requires_megatron

pytestmark = requires_megatron

PARAMETER = "core_attention.softmax_offset"


def train(trainer: Trainer, flags: str, num_processes: int, **options: object) -> Run:
    return trainer.train(
        f"{SAMPLES} {flags}",
        num_processes=num_processes,
        architecture="sinks",
        gradients=True,
        **options,
    )


@pytest.mark.parametrize(
    ("num_processes", "layout", "mask"),
    [
        (2, "--tensor-model-parallel-size 2 --sequence-parallel", "ragged+documents"),
        (2, f"--pipeline-model-parallel-size 2 {RECOMPUTE['uniform']}", "local+sliding"),
        (2, f"--context-parallel-size 2 {BALANCED}", "ragged+documents"),
        (
            4,
            f"--context-parallel-size 2 --tensor-model-parallel-size 2 {BALANCED}",
            "local+sliding",
        ),
        (2, f"--context-parallel-size 2 {BALANCED}", "two-ladders+documents"),
    ],
)
def test_equals_one_process_with_a_dense_mask(
    trainer: Trainer,
    reference,
    num_processes: int,
    layout: str,
    mask: str,
) -> None:
    run = train(trainer, f"--micro-batch-size 2 {layout} {MASKS[mask].flags}", num_processes)
    assert "mask probe passed" in run.log()
    assert ("(12 at most in local layers)" in run.log()) == ("local" in mask)
    expected = reference(mask, "sinks")
    assert any(PARAMETER in name for name in expected.gradients)
    assert_parity(run, expected)


def test_resumed_in_mid_ramp(trainer: Trainer) -> None:
    """With local layers, on two tensor-parallel ranks: the same bits as straight through."""
    layout = "--tensor-model-parallel-size 2 --sequence-parallel --skyladder-intra-document"
    flags = f"{LADDER} --micro-batch-size 2 {layout} {OWN}"
    whole, history = (History(trainer, flags, 2) for _ in range(2))
    whole.go_on(architecture="sinks")
    history.go_on("--exit-interval 4", architecture="sinks")
    history.go_on(architecture="sinks")
    assert whole.merged("windows") == WINDOWS
    assert_same_history(history, whole)


def test_a_sink_that_is_left_out_would_be_seen(
    trainer: Trainer,
    reference,
) -> None:
    flags = f"--micro-batch-size 2 {MASKS['ragged+documents'].flags}"
    run = train(trainer, flags, 1, broken="sinks_left_out")
    expected = reference("ragged+documents", "sinks")
    wrong = {name: error for name, error in gradient_errors(run, expected).items() if error > 1e-3}
    assert any(PARAMETER in name for name in wrong) and len(wrong) > 4
