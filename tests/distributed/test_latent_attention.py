"""Multi-latent attention, whose keys are wider than its values, and which makes its own RoPE.

The reference is stock Megatron's attention with a dense mask, as in `test_parity`.
"""

from __future__ import annotations

from functools import cache

import pytest
from runs import Run, Trainer
from test_parity import LOSS_TOLERANCE, MASKS, SAMPLES, assert_parity, loss_errors

from megatron_skyladder.testing import requires_megatron

pytestmark = requires_megatron

UNIFORM = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
UP_PROJECTIONS = "--recompute-granularity selective --recompute-modules core_attn mla_up_proj"
TP2_SP = "--tensor-model-parallel-size 2 --sequence-parallel"
PP2 = "--pipeline-model-parallel-size 2"
CP2 = "--context-parallel-size 2"
STATISTICS = "--skyladder-attention-stats-interval 2"
BALANCED, ZIGZAG = (
    f"--skyladder-context-parallel-layout {held}" for held in ("balanced", "zigzag")
)
CASES = (  # ranks, mask, flags
    (1, "ragged+documents", f"--micro-batch-size 4 {UNIFORM}"),
    (2, "ragged+documents", f"--micro-batch-size 2 {TP2_SP} {UP_PROJECTIONS}"),
    (2, "ragged", f"--micro-batch-size 4 {PP2}"),
    (2, "ragged", f"--micro-batch-size 4 {CP2} {BALANCED} {STATISTICS}"),
    (2, "ragged+documents", f"--micro-batch-size 2 {CP2} {ZIGZAG} {UP_PROJECTIONS}"),
    (4, "ragged+documents", f"--micro-batch-size 1 {CP2} {TP2_SP} {BALANCED} {UNIFORM}"),
    (4, "ragged+documents", f"--micro-batch-size 2 {CP2} {PP2} {BALANCED} {UNIFORM}"),
)


@pytest.fixture(scope="module")
def reference(trainer: Trainer):
    """Runs of stock Megatron with dense masks; with tensor parallelism where a run has it.

    With it Megatron's local layers give the rotary part of the keys another gradient than one
    process has: gathered from all ranks, its gradients are not added up. A run with our flags
    inherits that, so it is compared with what stock Megatron does on as many ranks.
    """

    @cache
    def run(mask: str, layout: str) -> Run:
        return trainer.train(
            f"{SAMPLES} --micro-batch-size 4 {layout}",
            num_processes=2 if layout else 1,
            architecture="mla",
            gradients=True,
            dense=MASKS[mask].dense,
        )

    return run


@pytest.mark.parametrize(("num_processes", "mask", "flags"), CASES)
def test_equals_stock_megatron_with_a_dense_mask(
    trainer: Trainer,
    reference,
    num_processes: int,
    mask: str,
    flags: str,
) -> None:
    run = trainer.train(
        f"{SAMPLES} {flags} {MASKS[mask].flags}",
        num_processes=num_processes,
        architecture="mla",
        gradients=True,
    )
    assert tuple(run.windows.values()) == MASKS[mask].windows
    assert "mask probe passed" in run.log()
    assert ("shares out tokens by the" in run.log()) == (BALANCED in flags)
    assert_parity(run, reference(mask, TP2_SP if TP2_SP in flags else ""))
    if STATISTICS in flags:
        assert "skyladder/attention_entropy" in run.log(1)


@pytest.mark.parametrize("broken", ["rotary_left_to_megatron", "values_swapped_in_exchange"])
def test_parity_sees_wrong_positions_and_values(trainer: Trainer, reference, broken: str) -> None:
    run = trainer.train(
        f"{SAMPLES} --micro-batch-size 4 {CP2} {BALANCED} {MASKS['ragged'].flags} "
        "--skyladder-no-probe",
        num_processes=2,
        architecture="mla",
        gradients=True,
        broken=broken,
    )
    assert max(loss_errors(run, reference("ragged", ""))) > 1e3 * LOSS_TOLERANCE
