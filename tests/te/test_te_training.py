"""Megatron training through every backend: TP2, sequence parallelism, recompute, both specs.

The reference is the sdpa backend, which tests/distributed holds against a dense mask.
"""

from __future__ import annotations

from functools import cache

import pytest
from reference_kernels import FLOAT32_VARIABLE
from runs import SEQ_LENGTH, Run, Trainer
from test_parity import (
    CONSTANT,
    LAYOUTS,
    LOSS_TOLERANCE,
    MASKS,
    RECOMPUTE,
    SAMPLES,
    assert_parity,
    gradient_errors,
    loss_errors,
)

pytestmark = pytest.mark.te

LOCAL, FULL_TE = "--transformer-impl local", "--transformer-impl transformer_engine"
KERNELS = {"te": "thd_to_bshd", "varlen": "varlen_forward", "flash": "flash_forward"}
SINK_LAYOUTS = {"tp2-sp": LAYOUTS["tp2-sp"][1], "cp2": "--context-parallel-size 2"}
UNFUSED = "--attention-backend unfused"  # Transformer Engine's own attention in PyTorch


@pytest.fixture(scope="session")
def trainer(pool, tmp_path_factory) -> Trainer:
    """Starts recorded runs on the stubs."""
    return Trainer(pool, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def reference(trainer: Trainer):
    """Runs of the sdpa backend in Megatron's local spec, float32."""

    @cache
    def run(mask: str) -> Run:
        return train(trainer, f"{MASKS[mask].flags} --skyladder-attention-backend sdpa {LOCAL}")

    return run


@pytest.fixture(scope="session")
def context_parallel(trainer: Trainer):
    """Runs of two context-parallel ranks, float32."""

    @cache
    def run(backend: str) -> Run:
        return trainer.train(
            f"{SAMPLES} --micro-batch-size 2 --context-parallel-size 2 {LOCAL} {UNFUSED} "
            f"{MASKS['ragged+documents'].flags} --skyladder-attention-backend {backend}",
            num_processes=2,
            gradients=True,
            environment={FLOAT32_VARIABLE: "1"},
        )

    return run


def train(trainer: Trainer, flags: str, environment: dict[str, str] | None = None) -> Run:
    """Train in TP2 with sequence parallelism and recompute."""
    num_processes, layout = LAYOUTS["tp2-sp"]
    return trainer.train(
        f"{SAMPLES} --micro-batch-size 2 {layout} {RECOMPUTE['uniform']} {flags}",
        num_processes=num_processes,
        gradients=True,
        environment={FLOAT32_VARIABLE: "1"} if environment is None else environment,
    )


def calls(run: Run) -> str:
    """Return which stubs a run called and how often; the last line of its log."""
    return run.log().rpartition("stubs called: ")[2]


@pytest.mark.parametrize(
    ("backend", "spec", "mask"),
    [
        ("te", LOCAL, "ragged+documents"),
        ("te", FULL_TE, "ragged+documents"),
        ("te", FULL_TE, "sliding"),
        ("varlen", LOCAL, "sliding"),
        ("varlen", FULL_TE, "ragged+documents"),
        ("flash", LOCAL, "sliding"),
    ],
)
def test_trains_as_sdpa_does(trainer, reference, backend, spec, mask) -> None:
    flags = f"--skyladder-attention-backend {backend} {spec} {UNFUSED}"
    run = train(trainer, f"{MASKS[mask].flags} {flags}")
    assert KERNELS[backend] in calls(run)
    assert tuple(run.windows.values()) == MASKS[mask].windows
    assert_parity(run, reference(mask))


@pytest.mark.parametrize("backend", ["te", "sdpa"])
def test_megatrons_hybrid_stack_trains_as_the_gpt_does(trainer, reference, backend) -> None:
    """Its only spec is of Transformer Engine's layers."""
    mask = "ragged+documents"
    run = train(
        trainer,
        f"{MASKS[mask].flags} --skyladder-attention-backend {backend} {UNFUSED} --no-load-optim "
        "--hybrid-layer-pattern *-*-*-*-",
    )
    assert (KERNELS["te"] in calls(run)) == (backend == "te")
    assert max(loss_errors(run, reference(mask))) < LOSS_TOLERANCE


@pytest.mark.parametrize("backend", KERNELS)
def test_context_parallel_equals_sdpa(context_parallel, backend) -> None:
    """Each rank's queries end inside a fragment, with keys from the rank before."""
    run = context_parallel(backend)
    assert KERNELS[backend] in calls(run)
    assert_parity(run, context_parallel("sdpa"))


@pytest.fixture(scope="session")
def with_sinks(trainer: Trainer):
    """Runs of a model with learnable sinks, float32, documents, recompute, on two ranks."""

    @cache
    def run(backend: str, layout: str) -> Run:
        return trainer.train(
            f"{SAMPLES} --micro-batch-size 2 {SINK_LAYOUTS[layout]} {RECOMPUTE['uniform']} {LOCAL} "
            f"{UNFUSED} {MASKS['ragged+documents'].flags} "
            f"--skyladder-attention-backend {backend}",
            num_processes=2,
            architecture="sinks",
            gradients=True,
            environment={FLOAT32_VARIABLE: "1"},
            broken="on_hopper",
        )

    return run


@pytest.mark.parametrize(
    ("backend", "layout"),
    [("te", "tp2-sp"), ("te", "cp2"), ("flash", "tp2-sp"), ("varlen", "cp2")],
)
def test_sinks_train_as_in_sdpa(with_sinks, backend: str, layout: str) -> None:
    """tests/distributed holds sdpa against stock Megatron's own sinks."""
    run = with_sinks(backend, layout)
    assert KERNELS[backend] in calls(run)
    assert "mask probe passed" in run.log()
    assert any("core_attention.softmax_offset" in name for name in run.gradients)
    assert_parity(run, with_sinks("sdpa", layout))


def test_full_causal_attention_trains_otherwise(trainer, reference) -> None:
    flags = f"{CONSTANT} --skyladder-attention-backend te {FULL_TE} {UNFUSED}"
    run = train(trainer, flags)
    assert set(run.windows.values()) == {SEQ_LENGTH}
    assert max(gradient_errors(run, reference("sliding")).values()) > 1e-2
    assert min(loss_errors(run, reference("sliding"))[:2]) > 1e-4


@pytest.mark.parametrize(
    ("backend", "spec", "kernel"),
    [
        ("te", FULL_TE, "flash_backward"),
        ("varlen", LOCAL, "varlen_backward"),
        ("flash", LOCAL, "flash_backward"),
    ],
    ids=["te", "varlen", "flash"],
)
def test_bf16_reaches_the_kernels_in_bf16(trainer, reference, backend, spec, kernel) -> None:
    """Without leave to take float32, as on a GPU; there TE itself goes to flash-attn."""
    mask = "ragged+documents"
    flags = f"{MASKS[mask].flags} --skyladder-attention-backend {backend} {spec} --bf16"
    run = train(trainer, flags, environment={})
    assert max(loss_errors(run, reference(mask))) < 2e-2
    assert kernel in calls(run)
