"""Context parallelism: random rows against dense ones, the order of calls, whole training runs."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from pathlib import Path

import pytest
from runs import Run, Trainer
from test_parity import (  # noqa: F401
    GRADIENT_TOLERANCE,
    MASKS,
    RECOMPUTE,
    SAMPLES,
    assert_parity,
    gradient_errors,
    reference,
)

from megatron_skyladder.testing import ProcessPool, requires_megatron

pytestmark = requires_megatron


def test_random_rows_in_groups_of_any_start(pool: ProcessPool, tmp_path: Path) -> None:
    """Outputs and gradients, to rounding of float64; a deadlock would run into the time limit.

    Groups of 4, 3 and 2 ranks, among them some without rank 0; windows, documents, sliding,
    several rows, grouped queries, activation recompute.
    """
    pool.run(
        "parallel_rows:random_rows",
        num_processes=4,
        folder=tmp_path,
        arguments={"num_cases": 40},
    )


def test_messages_are_sent_before_own_work_begins(pool: ProcessPool, tmp_path: Path) -> None:
    """Forward and backward, and no host waits for its device."""
    pool.run("parallel_rows:order_of_calls", num_processes=4, folder=tmp_path)


def test_bf16_is_as_exact_as_whole_rows(pool: ProcessPool, tmp_path: Path) -> None:
    pool.run("parallel_rows:bfloat16", num_processes=4, folder=tmp_path, arguments={"num_cases": 8})


LAYOUTS = {
    "cp2": (2, ""),
    "cp4": (4, ""),
    "cp2-tp2": (4, "--tensor-model-parallel-size 2"),
    "cp2-tp2-sp": (4, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "cp2-pp2": (4, "--pipeline-model-parallel-size 2"),
    "cp2-pp2-vpp2": (
        4,
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    ),
    "cp2-dp2": (4, ""),
    "cp2-dp2-distopt": (4, "--use-distributed-optimizer --overlap-grad-reduce"),
}


@dataclass(frozen=True)
class Case:
    """One run; as in `test_parity`. ``llama`` has 2 query groups: fewer than TP x CP."""

    layout: str
    micro_batch_size: int
    recompute: str
    architecture: str
    mask: str

    def __str__(self) -> str:
        return "-".join(map(str, astuple(self)))


CASES = (
    Case("cp2", 1, "none", "llama", "ragged"),
    Case("cp2", 2, "uniform", "gpt", "sliding+documents"),
    Case("cp4", 4, "none", "llama", "ragged+documents"),
    Case("cp4", 1, "selective", "gpt", "documents"),
    Case("cp4", 2, "block", "llama", "sliding"),
    Case("cp4", 2, "none", "gpt", "dividing"),
    Case("cp2-tp2", 2, "selective", "llama", "ragged+documents"),
    Case("cp2-tp2-sp", 1, "uniform", "llama", "sliding+documents"),
    Case("cp2-pp2", 2, "block", "llama", "ragged+documents"),
    Case("cp2-pp2-vpp2", 1, "selective", "gpt", "sliding+documents"),
    Case("cp2-dp2", 2, "none", "gpt", "ragged"),
    Case("cp2-dp2-distopt", 1, "uniform", "llama", "documents"),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_one_process_with_a_dense_mask(
    trainer: Trainer,
    reference,  # noqa: F811
    case: Case,
) -> None:
    num_processes, layout = LAYOUTS[case.layout]
    cp_size = 4 if case.layout == "cp4" else 2
    run = trainer.train(
        f"{SAMPLES} --micro-batch-size {case.micro_batch_size} {layout} "
        f"--context-parallel-size {cp_size} {RECOMPUTE[case.recompute]} {MASKS[case.mask].flags}",
        num_processes=num_processes,
        architecture=case.architecture,
        gradients=True,
    )
    assert tuple(run.windows.values()) == MASKS[case.mask].windows
    assert "mask probe passed" in run.log()
    assert_parity(run, reference(case.mask, case.architecture))


# --- tokens that do not count -------------------------------------------------------------------

SPARSE = "ragged"  # the mask of these runs


@pytest.fixture(scope="module")
def sparse_reference(trainer: Trainer) -> Run:
    """Stock Megatron in one process; most tokens of the data do not count, in places none does."""
    return train_sparse(trainer, dense=MASKS[SPARSE].dense)


def train_sparse(trainer: Trainer, flags: str = "", **options: object) -> Run:
    """Train with ``--eod-mask-loss`` in micro-batches of two sequences."""
    return trainer.train(
        f"{SAMPLES} --micro-batch-size 2 --eod-mask-loss --data-path {trainer.sparse_documents} "
        f"{flags}",
        gradients=True,
        **options,
    )


@pytest.mark.parametrize("layout", ["cp4", "cp2-tp2-sp", "cp2-pp2", "cp2-dp2-distopt"])
def test_tokens_that_do_not_count_weigh_as_in_one_process(
    trainer: Trainer, sparse_reference: Run, layout: str
) -> None:
    num_processes, flags = LAYOUTS[layout]
    cp_size = 4 if layout == "cp4" else 2
    flags += f" --context-parallel-size {cp_size} {MASKS[SPARSE].flags}"
    run = train_sparse(trainer, flags, num_processes=num_processes)
    silent = [loss for entry in run.of("loss") for loss in entry["rows"] if loss == 0]
    assert silent, "no sequence had a part of which no token counts"
    assert_parity(run, sparse_reference)
    assert run.steps("loss") == pytest.approx(sparse_reference.steps("loss"), rel=1e-6)  # logged


def test_counting_each_ranks_own_tokens_would_be_seen(
    trainer: Trainer, sparse_reference: Run
) -> None:
    flags = f"--context-parallel-size 2 {MASKS[SPARSE].flags}"
    run = train_sparse(trainer, flags, num_processes=2, broken="mean_of_means")
    assert max(gradient_errors(run, sparse_reference).values()) > 1e3 * GRADIENT_TOLERANCE


def test_counting_over_all_ranks_stays_megatrons(trainer: Trainer) -> None:
    """``--calculate-per-token-loss`` divides by all tokens of the step in any layout."""
    one, two = (
        train_sparse(
            trainer,
            f"--calculate-per-token-loss --context-parallel-size {cp_size} {MASKS[SPARSE].flags}",
            num_processes=cp_size,
        )
        for cp_size in (1, 2)
    )
    assert_parity(two, one)
