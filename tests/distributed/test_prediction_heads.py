"""Multi-token prediction: heads that see no token beyond a fragment, in any layout.

The reference is stock Megatron in one process, with a dense mask, and with tokens, labels and loss
mask shifted one by one: the next token counts where the mask lets it see this one. That fragments
then train as each would alone, `prediction_bodies` shows.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
from histories import LADDER, WINDOWS, History, assert_same_history
from runs import SEQ_LENGTH, Run, Trainer
from test_parity import (
    GRADIENT_TOLERANCE,
    MASKS,
    SAMPLES,
    assert_parity,
    gradient_errors,
)

from megatron_skyladder.report.runlog import parse
from megatron_skyladder.testing import ProcessPool, requires_megatron

pytestmark = requires_megatron

UNIFORM = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
TP2_SP = "--tensor-model-parallel-size 2 --sequence-parallel"
PP2 = "--pipeline-model-parallel-size 2"
VPP2 = f"{PP2} --num-layers-per-virtual-pipeline-stage 1"
CP2 = "--context-parallel-size 2"
BALANCED, ZIGZAG = (
    f"--skyladder-context-parallel-layout {held}" for held in ("balanced", "zigzag")
)
CASES = (  # ranks, mask, architecture, flags
    (1, "ragged+documents", "heads", f"--micro-batch-size 4 {UNIFORM}"),
    (1, "sliding+documents", "tied-heads", "--micro-batch-size 2"),
    (2, "ragged+documents", "heads", f"--micro-batch-size 2 {TP2_SP}"),
    (2, "ragged+documents", "heads", f"--micro-batch-size 2 {PP2} {UNIFORM}"),
    (2, "ragged+documents", "heads", f"--micro-batch-size 2 {VPP2} {UNIFORM}"),
    (2, "ragged", "heads", f"--micro-batch-size 4 {CP2} {BALANCED}"),
    (2, "ragged+documents", "heads", f"--micro-batch-size 2 {CP2} {BALANCED} {UNIFORM}"),
    (2, "ragged+documents", "heads", f"--micro-batch-size 4 {CP2} {ZIGZAG}"),
    (4, "ragged+documents", "heads", f"--micro-batch-size 2 {CP2} {TP2_SP} {BALANCED}"),
    (2, "two-ladders+documents", "heads", f"--micro-batch-size 4 {CP2} {BALANCED}"),
)


@pytest.fixture(scope="module")
def reference(trainer: Trainer):
    """Runs of stock Megatron with dense masks and heads that keep to them."""

    @cache
    def run(mask: str, architecture: str, micro_batch_size: int) -> Run:
        return trainer.train(
            f"{SAMPLES} --micro-batch-size {micro_batch_size}",
            architecture=architecture,
            gradients=True,
            dense={**MASKS[mask].dense, "shifts_within_it": True},
        )

    return run


@pytest.mark.parametrize(("num_processes", "mask", "architecture", "flags"), CASES)
def test_equals_one_process_with_a_dense_mask(
    trainer: Trainer,
    reference,
    num_processes: int,
    mask: str,
    architecture: str,
    flags: str,
) -> None:
    run = trainer.train(
        f"{SAMPLES} {flags} {MASKS[mask].flags}",
        num_processes=num_processes,
        architecture=architecture,
        gradients=True,
    )
    assert tuple(run.windows.values()) == MASKS[mask].windows
    assert "mask probe passed" in run.log()
    assert ("shares out tokens by the" in run.log()) == (BALANCED in flags)
    # Megatron divides a head's loss by the tokens of its micro-batch
    expected = reference(mask, architecture, int(flags.split()[1]))
    assert any(name.startswith("mtp.") for name in run.gradients)
    assert_parity(run, expected)


def test_parity_sees_tokens_beyond_a_fragment(trainer: Trainer, reference) -> None:
    run = trainer.train(
        f"{SAMPLES} --micro-batch-size 4 {MASKS['ragged+documents'].flags}",
        architecture="heads",
        gradients=True,
        broken="heads_see_beyond_fragments",
    )
    errors = gradient_errors(run, reference("ragged+documents", "heads", 4))
    assert max(errors.values()) > 1e3 * GRADIENT_TOLERANCE


def test_a_full_window_equals_stock_megatron(trainer: Trainer) -> None:
    """Within rounding; and a run without our flags is the one that Megatron starts, bit by bit."""
    flags = f"{SAMPLES} --micro-batch-size 4"
    stock, ours = (
        trainer.train(f"{flags} {more}", architecture="heads", gradients=True)
        for more in ("", "--skyladder-schedule constant")
    )
    assert_parity(ours, stock)
    script = str(Path(__file__).with_name("plain_script.py"))
    own = trainer.train(flags, architecture="heads", gradients=True, script=script)
    assert own.steps("loss") == stock.steps("loss")
    assert own.steps("grad_norm") == stock.steps("grad_norm")
    assert all(bool((own.gradients[name] == stock.gradients[name]).all()) for name in own.gradients)


@pytest.mark.parametrize("layout", [PP2, VPP2], ids=["pp2", "vpp2"])
def test_losses_by_length_are_those_of_one_process(trainer: Trainer, layout: str) -> None:
    """The heads' stage embeds tokens, in validation's extra passes as well."""
    flags = (
        "--train-samples 8 --micro-batch-size 2 --split 50,50,0 --eval-iters 4 --eval-interval 1 "
        "--skyladder-schedule constant --skyladder-no-probe --skyladder-eval-lengths 16"
    )
    (one,), (several,) = (
        parse(run.log(rank)).validations
        for rank, run in (
            (0, trainer.train(flags, architecture="heads")),
            (1, trainer.train(f"{flags} {layout}", architecture="heads", num_processes=2)),
        )
    )
    assert list(several.by_length) == [16, SEQ_LENGTH]
    assert several.by_length == pytest.approx(one.by_length, rel=1e-5)
    assert several.by_positions == pytest.approx(one.by_positions, rel=1e-5)


def test_resumed_in_mid_ramp(trainer: Trainer) -> None:
    """With latent attention, too: the same bits as straight through."""
    flags = f"{LADDER} --micro-batch-size 2 {CP2} {BALANCED} --skyladder-intra-document"
    whole, history = (History(trainer, flags, 2) for _ in range(2))
    whole.go_on(architecture="mla-heads")
    history.go_on("--exit-interval 4", architecture="mla-heads")
    history.go_on(architecture="mla-heads")
    assert whole.merged("windows") == WINDOWS
    assert_same_history(history, whole)


def test_each_fragment_trains_as_it_would_alone(pool: ProcessPool, tmp_path: Path) -> None:
    """Losses and gradients, against stock Megatron with each fragment as a sequence of its own."""
    results = tmp_path / "found"
    arguments = {"results": str(results)}
    pool.run("prediction_bodies:compare", num_processes=1, folder=tmp_path, arguments=arguments)
    found = json.loads(results.read_text())
    assert found["losses"] < 1e-5 and found["gradients"] < 1e-5
    assert found["effect"] > 0.1 and found["of_heads"] > 10
