"""Context parallelism: random rows against dense ones, the order of calls, whole training runs."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from pathlib import Path

import pytest
from runs import Trainer
from test_parity import MASKS, RECOMPUTE, SAMPLES, assert_parity, reference  # noqa: F401

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
