"""Context parallelism: random rows against dense ones, the order of calls, whole training runs."""

from __future__ import annotations

import re
from dataclasses import astuple, dataclass
from pathlib import Path

import pytest
from histories import LADDER, RESHARDABLE, WINDOWS, History, assert_same_history
from runs import Run, Trainer
from test_parity import (
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    MASKS,
    RECOMPUTE,
    SAMPLES,
    assert_as_exact,
    assert_parity,
    assert_same_data,
    gradient_errors,
    loss_errors,
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
    "cp8": (8, ""),
    "cp2-ep2": (4, "--expert-model-parallel-size 2"),
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
LOCAL_LAYERS = (  # each kind of layer exchanges its own keys
    Case("cp4", 1, "uniform", "llama", "local+documents"),
    Case("cp2-tp2-sp", 2, "selective", "llama", "local+sliding"),
    Case("cp2", 2, "none", "llama", "two-ladders+documents"),
    Case("cp2-pp2", 1, "uniform", "llama", "two-ladders+documents"),
    Case("cp2-tp2", 1, "selective", "llama", "two-ladders+sliding"),
)
MORE_BALANCED = (
    Case("cp8", 2, "none", "llama", "ragged+documents"),
    Case("cp2-ep2", 2, "none", "moe", "ragged+documents"),
)


@pytest.mark.parametrize(
    ("case", "held"),
    [
        *((case, held) for case in CASES for held in ("balanced", "zigzag")),
        *((case, "balanced") for case in (*MORE_BALANCED, *LOCAL_LAYERS)),
        (LOCAL_LAYERS[0], "zigzag"),
    ],
    ids=str,
)
def test_equals_one_process_with_a_dense_mask(
    trainer: Trainer,
    reference,
    case: Case,
    held: str,
) -> None:
    num_processes, layout = LAYOUTS[case.layout]
    cp_size = int(case.layout[2])
    run = trainer.train(
        f"{SAMPLES} --micro-batch-size {case.micro_batch_size} {layout} "
        f"--context-parallel-size {cp_size} {RECOMPUTE[case.recompute]} {MASKS[case.mask].flags} "
        f"--skyladder-context-parallel-layout {held}",
        num_processes=num_processes,
        architecture=case.architecture,
        gradients=True,
    )
    assert tuple(run.windows.values()) == MASKS[case.mask].windows
    assert "mask probe passed" in run.log()
    assert ("shares out tokens by the" in run.log()) == (held == "balanced")
    keeps = case.recompute in ("none", "block")  # which recomputes one layer
    assert ("values of other ranks take up to" in run.log()) == keeps
    assert_parity(run, reference(case.mask, case.architecture))


def test_bf16_is_as_exact_as_stock_megatron_in_one_process(
    trainer: Trainer,
    reference,
) -> None:
    """The error against fp32 is at most twice that of Megatron's attention with a dense mask."""
    mask = "ragged+documents"
    flags = f"{SAMPLES} --micro-batch-size 2 --bf16"
    stock = trainer.train(flags, gradients=True, dense=MASKS[mask].dense)
    flags += f" --context-parallel-size 2 {MASKS[mask].flags}"
    run = trainer.train(flags, num_processes=2, gradients=True)
    assert "shares out tokens by the window and each sequence's documents" in run.log()
    # at the full window rank 0's last chunk sees all 64 keys: 2 groups of 8 numbers, K and V, 2
    # bytes, in 4 layers
    assert "values of other ranks take up to 0.0164 MB on a rank for each sequence" in run.log()
    assert_as_exact(run, stock, reference(mask, "llama"))


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


# --- layouts by the window and by documents -------------------------------------------------------

BALANCED = "--skyladder-context-parallel-layout balanced"
TWO_RANKS = f"{SAMPLES} --micro-batch-size 1 --context-parallel-size 2 {BALANCED}"


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        ("rotary_left_to_megatron", "the rotary embedding is that of other positions"),
        ("keys_of_another_layout", "the attention mask is not applied"),
        ("batch_left_in_order", "WrongPositionsError: sequence 0 of the micro-batch has position"),
    ],
)
def test_layouts_that_differ_end_the_run(trainer: Trainer, broken: str, complaint: str) -> None:
    run = trainer.train(
        f"{TWO_RANKS} {MASKS['ragged'].flags} --skyladder-start-window 24",
        num_processes=2,
        load=False,
        broken=broken,
        exit_codes=(1, -9),
    )
    assert any(complaint in run.log(rank) for rank in (0, 1))
    assert not run.of("step")


@pytest.mark.parametrize(
    "broken", ["rotary_left_to_megatron", "rotary_kept_by_length", "keys_of_another_layout"]
)
def test_parity_sees_layouts_that_differ(
    trainer: Trainer,
    reference,
    broken: str,
) -> None:
    """Embeddings are relative: where ranks hold whole windows a wrong start alone is not seen."""
    run = trainer.train(
        f"{TWO_RANKS} {MASKS['ragged'].flags} --skyladder-no-probe",
        num_processes=2,
        gradients=True,
        broken=broken,
    )
    expected = reference("ragged", "llama")
    assert_same_data(run, expected)
    assert max(loss_errors(run, expected)) > 1e3 * LOSS_TOLERANCE


def test_evaluation_in_between_sees_megatrons_shards(trainer: Trainer) -> None:
    """Validation by length too; training goes on as without it, and as in one process."""
    flags = (
        f"--train-samples 32 --split 80,20,0 --eval-iters 2 --eval-interval 2 --micro-batch-size 2 "
        f"{MASKS['ragged+documents'].flags} --skyladder-eval-lengths 16,32"
    )
    one = trainer.train(flags)
    two = trainer.train(f"{flags} --context-parallel-size 2 {BALANCED}", num_processes=2)
    for name in ("tokens", "labels", "windows"):
        assert getattr(two, name) == getattr(one, name), name
    assert two.losses == pytest.approx(one.losses, rel=1e-6)
    pattern = r"(?:lm loss value|skyladder/loss_\w+ value): ([0-9.E+-]+)"
    reported = [
        [float(value) for value in re.findall(pattern, run.log(rank))]
        for run, rank in ((one, 0), (two, 1))
    ]
    assert len(reported[0]) >= 6
    assert reported[1] == pytest.approx(reported[0], rel=1e-5)


def test_killed_and_resumed_in_mid_ramp(trainer: Trainer, uninterrupted) -> None:
    flags = (
        f"{LADDER} --micro-batch-size 1 --context-parallel-size 2 {BALANCED} "
        "--skyladder-intra-document"
    )
    history = History(trainer, flags, 2)
    history.go_on(kill={"samples": 40, "when": "forward", "micro_batch": 1}, exit_codes=(0, -9))
    assert -9 in history.attempts[0].exit_codes
    history.go_on(RESHARDABLE)
    whole = uninterrupted(flags, 2)
    assert whole.merged("windows") == WINDOWS
    assert_same_history(history, whole)


def test_resumed_across_layouts(trainer: Trainer, uninterrupted) -> None:
    """From zigzag on 2 ranks to balanced on 4: the same fingerprint, losses to rounding."""
    flags = f"{LADDER} --micro-batch-size 2 --skyladder-intra-document"
    whole = uninterrupted(flags)
    history = History(trainer, flags)
    zigzag = "--context-parallel-size 2 --skyladder-context-parallel-layout zigzag"
    history.go_on(f"{zigzag} --exit-interval 3", num_processes=2)
    history.go_on(f"--context-parallel-size 4 {BALANCED}", num_processes=4)
    assert set(history.attempts[1].losses) == set(range(24, 64))
    for name in ("tokens", "labels", "windows", "learning_rate"):
        assert history.merged(name) == whole.merged(name), name
    assert history.merged("losses") == pytest.approx(whole.merged("losses"), rel=1e-6)
