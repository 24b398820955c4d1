"""``python -m megatron_skyladder.megatron_bridge``: a real recipe, shrunk by overrides."""

from __future__ import annotations

import re
from typing import Any

import pytest
from bridge_bodies import NO_FUSIONS
from bridge_runs import BridgeRun, BridgeRuns

RECIPE = ["--recipe", "own_recipe:llama_without_te"]
SMALL = (
    "train.train_iters=4 train.global_batch_size=8 train.micro_batch_size=2 "
    "dataset.seq_length=128 model.seq_length=128 dataset.num_workers=0 "
    "dataset.persistent_workers=false tokenizer.vocab_size=128 validation.eval_iters=1 "
    "validation.eval_interval=2 logger.log_interval=1 logger.tensorboard_dir=null "
    "checkpoint.save=null checkpoint.load=null dist.distributed_backend=gloo "
    "dist.disable_jit_fuser=true ddp.overlap_grad_reduce=false ddp.overlap_param_gather=false "
    "scheduler.lr_warmup_iters=0 model.transformer_impl=local "
) + " ".join(f"model.{name}=false" for name in NO_FUSIONS)


def command(runs: BridgeRuns, *words: str, processes: int = 1, **options: Any) -> BridgeRun:
    return runs.start(
        "command",
        body_module="bridge_trials",
        num_processes=processes,
        environment={"SKYLADDER_DEVICE": "cpu", "SKYLADDER_TRACEBACK": ""},
        words=list(words),
        **options,
    )


@pytest.mark.parametrize(
    "layout",
    ["", "pipeline_model_parallel_size=2 pipeline_dtype=torch.bfloat16"],
    ids=["1 process", "PP2"],
)
def test_a_recipe_trains_in_bf16(layout: str, runs: BridgeRuns) -> None:
    run = command(
        runs,
        *RECIPE,
        *SMALL.split(),
        *(f"model.{word}" for word in layout.split()),
        "skyladder.start_window=8",
        "skyladder.intra_document=true",
        processes=2 if layout else 1,
    )
    assert "mask probe passed" in run.log()
    windows = re.findall(r"SkyLadder: iteration \d/4 \| skyladder/window: (\d+)", run.log())
    assert (windows[0], windows[-1], len(windows)) == ("8", "128", 4)
    assert re.search(r"iteration\s+4/\s+4 \|", run.log(1 if layout else 0))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*RECIPE, "+skyladder.start_window=8"], r"without \+"),
        ([*RECIPE, "skyladder.start_windw=8"], r"Did you mean skyladder.start_window\?"),
        ([*RECIPE, "skyladder.start_window=many"], "skyladder.start_window"),
        ([*RECIPE, "train.train_itres=4"], "train_itres"),
        (["--recipe", "llama32_1b_pretrain_confg"], "Did you mean llama32_1b_pretrain_config"),
        (["--recipe", "no_such_module:recipe"], "no_such_module"),
    ],
)
def test_what_is_misspelt_is_refused(words: list[str], message: str, runs: BridgeRuns) -> None:
    run = command(runs, *words, exit_codes=(2,))
    last = run.log().splitlines()[-1]
    assert "SkyLadder: error: " in run.log()
    assert re.search(message, run.log()), last
    assert "Traceback" not in run.log()


def test_variables_are_refused(runs: BridgeRuns) -> None:
    run = runs.start(
        "command",
        body_module="bridge_trials",
        exit_codes=(2,),
        environment={"SKYLADDER_START_WINDOW": "8", "SKYLADDER_TRACEBACK": ""},
        words=RECIPE,
    )
    assert "SKYLADDER_START_WINDOW is set, and Bridge does not read it" in run.log()
