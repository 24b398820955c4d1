"""Every layout trains like one process of stock Megatron with a dense mask, in fp32.

The reference of each case: stock Megatron, no flag of ours, one process, its own plain softmax
attention, handed a mask that was made pair by pair from the definition, with windows worked out by
hand. Same starting weights (one checkpoint), same data.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields

import pytest
import torch
from runs import EOD, SEQ_LENGTH, Run, Trainer

from megatron_skyladder.testing import requires_megatron

pytestmark = requires_megatron

LOSS_TOLERANCE = 1e-6  # relative
GRAD_NORM_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-5  # of a parameter's gradient, in norm
STEPS = 5
SAMPLES = f"--train-samples {8 * STEPS}"


@dataclass(frozen=True)
class Mask:
    """Flags of ours, and what they mean."""

    flags: str
    windows: tuple[int, ...]  # tokens, of each step
    documents: bool = False
    sliding: bool = False
    local_layers: tuple[int, ...] = ()
    local_windows: tuple[int, ...] = ()  # what their queries see at most, of each step

    @property
    def dense(self) -> dict[str, object]:
        """For `recorded_training.train`."""
        eod = EOD if self.documents else None
        own = list(self.local_windows or (LOCAL,) * STEPS)
        local = {"layers": list(self.local_layers), "tokens": own} if self.local_layers else None
        return {"windows": list(self.windows), "eod": eod, "sliding": self.sliding, "local": local}


LOCAL = 12  # above the first window of GROWING and below the others
GROWING = (8, 19, 30, 41, 52)  # none divides 64
LINEAR = "--skyladder-start-window 8 --skyladder-alpha 11 --skyladder-allow-unfinished"
EXPONENTIAL = (
    "--skyladder-schedule exponential --skyladder-start-window 8 --skyladder-expand-fraction 0.6"
)
CONSTANT = "--skyladder-schedule constant"
OWN = f"--window-size {LOCAL - 1},0"  # Megatron's: tokens before a query, and after it
# A second ladder, from 3 to 12 tokens over four of five steps: 3 + 9 * step // 4. The first window
# of GROWING is longer than that, so it moves at every step.
SECOND = "--skyladder-local-start-window 3 --skyladder-local-expand-fraction 0.8"
HELD_BACK = (3, 5, 7, 9, 12)
DOCUMENTS, SLIDING = "--skyladder-intra-document", "--skyladder-mask sliding"
MASKS = {
    "dividing": Mask(EXPONENTIAL, (8, 16, 32, 64, 64)),
    "ragged": Mask(LINEAR, GROWING),
    "ragged+documents": Mask(f"{LINEAR} {DOCUMENTS}", GROWING, documents=True),
    "documents": Mask(f"{CONSTANT} {DOCUMENTS}", (SEQ_LENGTH,) * STEPS, documents=True),
    "sliding": Mask(f"{LINEAR} {SLIDING}", GROWING, sliding=True),
    "sliding+documents": Mask(
        f"{LINEAR} {SLIDING} {DOCUMENTS}", GROWING, documents=True, sliding=True
    ),
    "local+documents": Mask(
        f"{LINEAR} {DOCUMENTS} {OWN} --window-attn-skip-freq [1,1,0,1]",
        GROWING,
        documents=True,
        local_layers=(1, 2, 4),
    ),
    "local+sliding": Mask(
        f"{LINEAR} {SLIDING} {OWN} --window-attn-skip-freq 4",
        GROWING,
        sliding=True,
        local_layers=(1, 2, 3),
    ),
    "two-ladders+documents": Mask(
        f"{LINEAR} {DOCUMENTS} {OWN} {SECOND} --window-attn-skip-freq [1,1,0,1]",
        GROWING,
        documents=True,
        local_layers=(1, 2, 4),
        local_windows=HELD_BACK,
    ),
    "two-ladders+sliding": Mask(
        f"{LINEAR} {SLIDING} {OWN} {SECOND} --window-attn-skip-freq 4",
        GROWING,
        sliding=True,
        local_layers=(1, 2, 3),
        local_windows=HELD_BACK,
    ),
}
LAYOUTS = {
    "one": (1, ""),
    "tp2": (2, "--tensor-model-parallel-size 2"),
    "tp2-sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "pp4": (4, "--pipeline-model-parallel-size 4"),
    "pp2-vpp2": (2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
    "dp2": (2, ""),
    "dp2-overlap": (2, "--overlap-grad-reduce"),
    "dp2-distopt": (2, "--use-distributed-optimizer"),
    "dp2-distopt-overlap": (
        2,
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    ),
    "tp2-pp2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
    "tp2-dp2": (4, "--tensor-model-parallel-size 2"),
    "tp2-sp-dp2-distopt": (
        4,
        "--tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer",
    ),
    "ep2": (2, "--expert-model-parallel-size 2"),
    "tp2-sp-ep2": (
        4,
        "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2",
    ),
}
RECOMPUTE = {
    "none": "",
    "uniform": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "block": "--recompute-granularity full --recompute-method block --recompute-num-layers 1",
    "selective": "--recompute-granularity selective --recompute-modules core_attn",
}


@dataclass(frozen=True)
class Case:
    """One run; the values are keys of the tables above."""

    layout: str
    micro_batch_size: int
    recompute: str
    architecture: str  # llama: untied, grouped queries; gpt: tied, plain heads; moe: experts
    mask: str

    def __str__(self) -> str:
        return "-".join(map(str, astuple(self)))


CASES = (
    Case("one", 4, "uniform", "gpt", "sliding+documents"),
    Case("tp2", 1, "none", "llama", "ragged"),
    Case("tp2", 4, "block", "gpt", "ragged+documents"),
    Case("tp2-sp", 2, "uniform", "gpt", "documents"),
    Case("tp2-sp", 1, "selective", "llama", "sliding"),
    Case("pp2", 1, "block", "gpt", "sliding"),
    Case("pp2", 4, "none", "llama", "documents"),
    Case("pp4", 2, "uniform", "llama", "ragged+documents"),
    Case("pp4", 1, "selective", "llama", "dividing"),
    Case("pp2-vpp2", 2, "uniform", "llama", "ragged+documents"),
    Case("pp2-vpp2", 1, "selective", "gpt", "sliding+documents"),
    Case("dp2", 4, "selective", "gpt", "ragged"),
    Case("dp2-overlap", 4, "uniform", "llama", "sliding"),
    Case("dp2-distopt", 2, "none", "llama", "sliding+documents"),
    Case("dp2-distopt-overlap", 1, "block", "gpt", "ragged+documents"),
    Case("tp2-pp2", 2, "block", "llama", "ragged"),
    Case("tp2-pp2", 1, "uniform", "gpt", "documents"),
    Case("tp2-dp2", 4, "none", "gpt", "dividing"),
    Case("tp2-sp-dp2-distopt", 2, "selective", "gpt", "ragged+documents"),
    Case("ep2", 2, "none", "moe", "ragged+documents"),
    Case("tp2-sp-ep2", 1, "selective", "moe", "sliding+documents"),
    Case("tp2-sp", 1, "none", "llama", "local+documents"),
    Case("pp2-vpp2", 2, "uniform", "gpt", "local+documents"),
    Case("pp4", 1, "selective", "llama", "local+sliding"),
    Case("tp2", 2, "uniform", "gpt", "local+sliding"),
    Case("tp2-sp", 2, "uniform", "llama", "two-ladders+documents"),
    Case("pp2", 1, "none", "gpt", "two-ladders+documents"),
    Case("pp2-vpp2", 1, "selective", "llama", "two-ladders+sliding"),
    Case("tp2", 4, "block", "gpt", "two-ladders+sliding"),
)


def test_cases_mix_all_values() -> None:
    """Each value of the tables is tried, and together with at least two values of the others."""
    assert {case.mask for case in CASES} == set(MASKS)
    assert {case.layout for case in CASES} == set(LAYOUTS)
    assert {case.recompute for case in CASES} == set(RECOMPUTE)
    mixed = [field.name for field in fields(Case) if field.name != "layout"]
    for name in mixed:
        for value in {getattr(case, name) for case in CASES}:
            chosen = [case for case in CASES if getattr(case, name) == value]
            for other in {"layout", *mixed} - {name}:
                assert len({getattr(case, other) for case in chosen}) >= 2, (name, value, other)


def train(trainer: Trainer, case: Case, more_flags: str = "", **options: object) -> Run:
    """Run a case."""
    num_processes, layout = LAYOUTS[case.layout]
    flags = (
        f"{SAMPLES} --micro-batch-size {case.micro_batch_size} {layout} "
        f"{RECOMPUTE[case.recompute]} {MASKS[case.mask].flags} {more_flags}"
    )
    return trainer.train(
        flags, num_processes=num_processes, architecture=case.architecture, **options
    )


def assert_same_data(run: Run, other: Run) -> None:
    assert len(other.tokens) == 8 * STEPS
    assert run.tokens == other.tokens
    assert run.labels == other.labels


def loss_errors(run: Run, other: Run) -> list[float]:
    """Return the largest relative difference of a row's loss, of each step."""
    assert run.losses.keys() == other.losses.keys() == set(range(8 * STEPS))
    errors = [abs(run.losses[sample] - loss) / (loss or 1) for sample, loss in other.losses.items()]
    return [max(errors[step * 8 : step * 8 + 8]) for step in range(STEPS)]


def gradient_errors(run: Run, other: Run) -> dict[str, float]:
    """Return how far each parameter's first gradient is off, relative to its norm."""
    assert run.gradients.keys() == other.gradients.keys()
    return {
        name: float((run.gradients[name] - gradient).norm() / gradient.norm())
        for name, gradient in other.gradients.items()
    }


def assert_parity(run: Run, other: Run) -> None:
    assert_same_data(run, other)
    assert max(gradient_errors(run, other).values()) < GRADIENT_TOLERANCE
    assert max(loss_errors(run, other)) < LOSS_TOLERANCE
    assert run.steps("grad_norm") == pytest.approx(
        other.steps("grad_norm"), rel=GRAD_NORM_TOLERANCE
    )
    assert run.steps("learning_rate") == other.steps("learning_rate")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_one_process_with_a_dense_mask(trainer: Trainer, reference, case: Case) -> None:
    run = train(trainer, case, gradients=True)
    mask = MASKS[case.mask]
    assert tuple(run.windows.values()) == mask.windows
    assert_parity(run, reference(case.mask, case.architecture))


def test_the_mask_matters(reference) -> None:
    """The references differ by far more than the tolerance, so equality means something."""
    runs = [reference(mask, "llama") for mask in ("ragged", "sliding", "ragged+documents")]
    for run, other in ((runs[0], runs[1]), (runs[0], runs[2]), (runs[1], runs[2])):
        assert min(loss_errors(run, other)) > 1e3 * LOSS_TOLERANCE
        assert max(gradient_errors(run, other).values()) > 1e3 * GRADIENT_TOLERANCE


@pytest.mark.parametrize(
    ("broken", "mask"),
    [
        ("window_one_longer", "ragged+documents"),
        ("documents_end_before_eod", "ragged+documents"),
        ("own_window_one_longer", "local+documents"),
        ("second_ladder_ignored", "two-ladders+documents"),
        ("second_ladder_one_step_late", "two-ladders+documents"),
        ("own_window_left_out_of_keys", "two-ladders+documents"),
    ],
)
def test_parity_sees_a_wrong_mask(trainer: Trainer, reference, broken: str, mask: str) -> None:
    case = Case("one", 4, "none", "llama", mask)
    run = train(trainer, case, "--skyladder-no-probe", gradients=True, broken=broken)
    with pytest.raises(AssertionError):
        assert_parity(run, reference(case.mask, case.architecture))


def test_parity_sees_masks_that_are_looked_up(trainer: Trainer, reference) -> None:
    """Under recompute and pipeline parallelism a mask has to travel with its micro-batch.

    With the mask looked up instead, forward passes are right, so the first step's losses are; the
    recomputed ones take the mask of a later micro-batch.
    """
    case = Case("pp4", 2, "uniform", "llama", "ragged+documents")
    run = train(trainer, case, "--skyladder-no-probe", gradients=True, broken="look_up_documents")
    expected = reference(case.mask, case.architecture)
    assert loss_errors(run, expected)[0] < LOSS_TOLERANCE
    assert max(gradient_errors(run, expected).values()) > 1e3 * GRADIENT_TOLERANCE


@pytest.mark.parametrize("mask", ["ragged", "documents"])
@pytest.mark.parametrize("layout", ["pp4", "pp2-vpp2"])
def test_middle_stages_read_data_only_for_documents(
    trainer: Trainer, layout: str, mask: str
) -> None:
    run = train(trainer, Case(layout, 2, "none", "llama", mask))
    ranks, last = LAYOUTS[layout][0], LAYOUTS[layout][0] - 1
    ends = {(0, 0), (last, 1)} if layout == "pp2-vpp2" else {(0, None), (last, None)}
    seen = set()
    for batch in run.of("batch", training=True):
        stage = batch["rank"], batch["chunk"]
        seen.add(stage)
        assert (batch["reads"] or 0) == int(stage in ends or MASKS[mask].documents)
        assert batch["documents_masked"] == MASKS[mask].documents
    assert len(seen) == ranks * (2 if layout == "pp2-vpp2" else 1)


@pytest.mark.parametrize(
    ("layout", "more"),
    [
        ("one", f"{OWN} --window-attn-skip-freq 2"),
        *((layout, "") for layout in ("one", "tp2-sp", "pp2", "dp2-distopt-overlap")),
    ],
)
def test_a_full_window_equals_stock_megatron(trainer: Trainer, layout: str, more: str) -> None:
    num_processes, flags = LAYOUTS[layout]
    flags = f"{SAMPLES} --micro-batch-size 2 {flags} {more}"
    stock = trainer.train(flags, num_processes=num_processes, gradients=True)
    run = trainer.train(f"{flags} {CONSTANT}", num_processes=num_processes, gradients=True)
    assert set(run.windows.values()) == {SEQ_LENGTH}
    assert_parity(run, stock)


@pytest.mark.parametrize("mask", ["ragged", "sliding+documents"])
def test_bf16_is_as_exact_as_stock_megatron(trainer: Trainer, reference, mask: str) -> None:
    """The error against fp32 is at most twice that of Megatron's attention with a dense mask."""
    flags = f"{SAMPLES} --micro-batch-size 2 --bf16"
    stock = trainer.train(flags, gradients=True, dense=MASKS[mask].dense)
    run = trainer.train(f"{flags} {MASKS[mask].flags}", gradients=True)
    assert_as_exact(run, stock, reference(mask, "llama"))


def assert_as_exact(run: Run, stock: Run, exact: Run) -> None:
    """The run's error is at most twice that of stock Megatron in its precision."""
    assert_same_data(run, exact)
    assert 0 < _loss_error(run, exact) <= 2 * _loss_error(stock, exact)
    assert 0 < _gradient_error(run, exact) <= 2 * _gradient_error(stock, exact)


def _loss_error(run: Run, exact: Run) -> float:
    errors = [run.losses[sample] - loss for sample, loss in exact.losses.items()]
    return float(torch.tensor(errors).norm())


def _gradient_error(run: Run, exact: Run) -> float:
    errors = [run.gradients[name] - gradient for name, gradient in exact.gradients.items()]
    return float(torch.stack([error.norm() for error in errors]).norm())
