"""Megatron's HybridModel with attention alone trains like the GPT that has the same layers.

A layer of a GPT is two of a hybrid model's, so the weights of a GPT's checkpoint are its own too
(Megatron renames them while it loads), and losses have to be the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
from histories import LADDER, RESHARDABLE, STEPS, History
from runs import Run, Trainer

from megatron_skyladder.report.runlog import parse
from megatron_skyladder.testing import read_checkpoint, requires_megatron

pytestmark = requires_megatron

LOSS_TOLERANCE = 1e-6  # relative; of other layouts, one process is exact
FLAGS = (
    "--train-samples 40 --micro-batch-size 2 --no-load-optim --skyladder-start-window 8 "
    "--skyladder-alpha 11 --skyladder-allow-unfinished"
)
WINDOWS = (8, 19, 30, 41, 52)
DOCUMENTS = "--skyladder-intra-document"
SLIDING = f"{DOCUMENTS} --skyladder-mask sliding"
PATTERN = "*-*-*-*-"
LAYOUTS = {  # processes, flags, pattern
    "tp2-sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel", PATTERN),
    "tp2-sp-recompute": (
        2,
        "--tensor-model-parallel-size 2 --sequence-parallel --recompute-granularity full "
        "--recompute-method uniform --recompute-num-layers 1",
        PATTERN,
    ),
    "pp2-last-has-no-attention": (2, "--pipeline-model-parallel-size 2", "*-*-*-*|-"),
    "pp2-cut-evenly": (2, "--pipeline-model-parallel-size 2", PATTERN),
    "pp2-vpp2": (2, "--pipeline-model-parallel-size 2", "*-|*-|*-|*-"),
    "pp4-last-has-no-attention": (4, "--pipeline-model-parallel-size 4", "*-*|-*|-*|-"),
    "cp2": (2, "--context-parallel-size 2", PATTERN),
}


@pytest.fixture(scope="module")
def gpt(trainer: Trainer) -> Callable[..., Run]:
    """The GPT's runs, one process."""

    @cache
    def run(mask: str, architecture: str = "llama") -> Run:
        return trainer.train(f"{FLAGS} {mask}", architecture=architecture)

    return run


def of_pattern(pattern: str) -> str:
    return f"--hybrid-layer-pattern {pattern}"


@pytest.mark.parametrize("mask", ["", DOCUMENTS, SLIDING], ids=["window", "documents", "sliding"])
def test_one_process_is_the_gpts(trainer: Trainer, gpt: Callable[..., Run], mask: str) -> None:
    run, expected = trainer.train(f"{FLAGS} {mask} {of_pattern(PATTERN)}"), gpt(mask)
    assert tuple(run.windows.values()) == tuple(expected.windows.values()) == WINDOWS
    for name in ("tokens", "labels", "losses"):
        assert getattr(run, name) == getattr(expected, name)
    for name in ("learning_rate", "grad_norm"):
        assert run.steps(name) == expected.steps(name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_the_gpts(trainer: Trainer, gpt: Callable[..., Run], layout: str) -> None:
    processes, flags, pattern = LAYOUTS[layout]
    # the last stage logs; with documents masked it would look up the window for their sake
    mask = "" if layout == "pp2-last-has-no-attention" else DOCUMENTS
    run = trainer.train(f"{FLAGS} {mask} {flags} {of_pattern(pattern)}", num_processes=processes)
    expected = gpt(mask)
    assert run.tokens == expected.tokens
    assert run.losses == pytest.approx(expected.losses, rel=LOSS_TOLERANCE)
    assert run.steps("grad_norm") == pytest.approx(expected.steps("grad_norm"), rel=1e-5)
    logs = parse(run.log(processes - 1)).iterations, parse(expected.log()).iterations
    for found, wanted in zip(*logs, strict=True):
        for name in ("window", "attention_fraction", "visible_context"):
            name = f"skyladder/{name}"
            assert found.values[name] == pytest.approx(wanted.values[name], rel=1e-5), layout


def test_the_mask_matters(gpt: Callable[..., Run]) -> None:
    losses = [list(gpt(mask).losses.values()) for mask in ("", DOCUMENTS, SLIDING)]
    for one, other in ((losses[0], losses[1]), (losses[1], losses[2])):
        errors = (abs(a - b) / b for a, b in zip(one, other, strict=True))
        assert max(errors) > 1e3 * LOSS_TOLERANCE


def test_experts_are_the_gpts(trainer: Trainer, gpt: Callable[..., Run]) -> None:
    run = trainer.train(f"{FLAGS} {DOCUMENTS} {of_pattern('*E*E*E*E')}", architecture="moe")
    assert run.losses == gpt(DOCUMENTS, "moe").losses


def test_attention_statistics_are_the_gpts(trainer: Trainer) -> None:
    """They are there, though every second layer has no attention to measure."""
    flags = f"{FLAGS} --skyladder-attention-stats-interval 1"
    runs = [trainer.train(f"{flags} {more}") for more in ("", of_pattern(PATTERN))]
    logs = [parse(run.log()).iterations for run in runs]
    for one, other in zip(*logs, strict=True):
        for name in ("max_attention_logit", "attention_entropy"):
            name = f"skyladder/{name}"
            assert one.values[name] == other.values[name] > 0


def test_rates_and_work_are_the_gpts(trainer: Trainer) -> None:
    """Megatron counts a hybrid model's operations by another function than a GPT's."""
    runs = [
        trainer.train(f"{FLAGS} {DOCUMENTS} {more} --log-throughput", stop_time=True)
        for more in ("", of_pattern(PATTERN))
    ]
    one, other = ([entry.values for entry in parse(run.log()).iterations] for run in runs)
    assert one == other and {"skyladder/tflops_per_gpu", "skyladder/hours_left"} <= {*one[-1]}


def test_attention_that_knows_nothing_of_windows_is_noticed(trainer: Trainer) -> None:
    run = trainer.train(
        f"{FLAGS} {of_pattern(PATTERN)}", broken="hybrid_models_stay_stock", exit_codes=(1,)
    )
    assert "which knows nothing of windows" in run.log()
    assert not run.of("step")


def test_weights_are_drawn_for_blocks_not_for_symbols(trainer: Trainer) -> None:
    """Output projections have the std 1 / sqrt(32) / 4: the model has four layers of a GPT."""
    folder = trainer.new_folder("drawn")
    trainer.train(
        f"--train-samples 8 --micro-batch-size 8 --lr 1e-9 --min-lr 0 --skyladder-init reference "
        f"--init-method-std 0.02 {of_pattern(PATTERN)} --skyladder-start-window 8 "
        f"--skyladder-allow-unfinished --save {folder} --save-interval 1",
        load=False,
    )
    weights = read_checkpoint(folder / "iter_0000001")
    for name in ("0.self_attention.linear_proj", "7.mlp.linear_fc2"):
        std = float(weights[f"decoder.layers.{name}.weight"].std())
        assert std == pytest.approx(32**-0.5 / 4, rel=0.1)


# --- from a GPT to a hybrid model, in the middle of the ladder ------------------------------------


def test_a_gpt_goes_on_as_a_hybrid_model(
    trainer: Trainer, uninterrupted: Callable[..., History]
) -> None:
    """With its optimizer, its clock and its schedule: another is refused."""
    flags = f"{LADDER} --micro-batch-size 2 {DOCUMENTS} --use-distributed-optimizer"
    whole = uninterrupted(flags)
    history = History(trainer, f"{flags} {RESHARDABLE}")
    history.go_on("--exit-interval 4")
    history.flags += f" {of_pattern(PATTERN)}"
    refused = history.go_on("--skyladder-alpha 11", exit_codes=(1,))
    assert "trained under another schedule" in refused.log() and not refused.of("step")
    hybrid = history.go_on()
    assert min(hybrid.losses) == 32 and len(history.merged("losses")) == 8 * STEPS
    for name in ("tokens", "windows", "learning_rate", "losses", "grad_norm"):
        assert history.merged(name) == whole.merged(name), name
