"""What cannot be combined is refused by name, early; mistakes are found before a step is taken."""

from __future__ import annotations

import inspect
import re

import bridge_changes
import pytest
from bridge_runs import LADDER, BridgeRun, BridgeRuns

REFUSED = {
    "local_attention_backend": "model.attention_backend=local cannot be combined",
    "local_attention_backend_as_text": "model.attention_backend=local cannot be combined",
    "own_model": "model=GemmaModelProvider cannot be combined",
    "spec_object": "model.transformer_layer_spec, a ModuleSpec object, cannot be combined",
    "peft": "peft=LoRA cannot be combined",
    "finetuning_data": "dataset=GPTSFTDatasetConfig cannot be combined",
    "offline_packing": "dataset.enable_offline_packing=true cannot be combined",
    "in_batch_packing": "dataset.enable_in_batch_packing=true cannot be combined",
    "batch_loader": "dataset.dataloader_type=batch cannot be combined",
    "dense_masks": "dataset.skip_getting_attention_mask_from_dataset=false cannot be combined",
    "reset_attention_mask": "dataset.reset_attention_mask=true cannot be combined",
    "other_eval_cp": "dist.eval_context_parallel_size=2 cannot be combined",
    "decentralized_groups": "dist.use_decentralized_pg=true cannot be combined",
    "in_process_restart": "inprocess_restart.enabled=true cannot be combined",
    "rampup": r"train.rampup_batch_size=\[2, 2, 16\] cannot be combined",
    "filling_in_the_middle": "dataset=GPTFIMDatasetConfig cannot be combined",
    "cuda_graphs": "model.cuda_graph_impl=local cannot be combined",
    "attention_dropout": r"model.attention_dropout=0.1 \(Megatron.s default\) cannot be combined",
    "prediction_of_more_tokens": "model.mtp_num_layers=1 cannot be combined",
    "latent_attention": "model.multi_latent_attention=true cannot be combined",
}
TAKEN = (
    *(
        "nothing",
        "partial_spec",
        "masked_losses",
        "local_layers",
        "evaluation_alone",
        "fully_reshardable",
        "interim_checkpoints",
    ),
    *("experts", "default_weights"),
)
LATER = ("own_core_attention", "short_pipeline")  # refused in a run, below
OF_RESUMING = (  # see test_bridge_resume.py
    *("checkpoints_that_cannot_be_found", "checkpoints_that_rank_1_cannot_find"),
)


@pytest.fixture(scope="module")
def answers(runs: BridgeRuns) -> BridgeRun:
    """What apply says to each change, in one job."""
    return runs.start("apply_each", body_module="bridge_trials", changes=[*REFUSED, *TAKEN])


@pytest.mark.parametrize("change", REFUSED)
def test_refused_by_apply(change: str, answers: BridgeRun) -> None:
    said = answers.facts()[change]
    assert said is not None, "it was taken"
    assert re.search(REFUSED[change], said), said
    assert "--" not in said


@pytest.mark.parametrize("change", TAKEN)
def test_taken_by_apply(change: str, answers: BridgeRun) -> None:
    assert answers.facts()[change] is None


def test_every_change_is_tried() -> None:
    functions = {name for name, _ in inspect.getmembers(bridge_changes, inspect.isfunction)}
    assert functions == {*REFUSED, *TAKEN, *LATER, *OF_RESUMING}


def refused(
    runs: BridgeRuns,
    wrong: str,
    num_processes: int = 1,
    exit_codes: tuple[int, ...] = (1, -9, -6),
    **options: object,
) -> BridgeRun:
    run = runs.start(
        "train_wrongly",
        body_module="bridge_trials",
        num_processes=num_processes,
        exit_codes=exit_codes,
        wrong=wrong,
        ladder=LADDER,
        weights=str(runs.weights),
        **options,
    )
    assert not (run.folder / "optimizer.jsonl").exists(), "a step was taken"
    return run


@pytest.mark.parametrize("layout", [{}, {"pp": 2}], ids=["1 process", "PP2"])
def test_another_forward_step_is_found_before_a_step_is_taken(
    layout: dict[str, int], runs: BridgeRuns
) -> None:
    run = refused(runs, "step", num_processes=layout.get("pp", 1), **layout)
    assert "the model is called by another forward step than SkyLadder's" in run.log()


def test_a_run_without_the_callbacks_is_refused(runs: BridgeRuns) -> None:
    assert "SkyLadder's callbacks were not called" in refused(runs, "callbacks").log()


def test_a_change_after_apply_is_refused(runs: BridgeRuns) -> None:
    log = refused(runs, "later").log()
    assert "the configuration was changed after SkyLadder was applied to it" in log


def test_apply_twice_is_refused(runs: BridgeRuns) -> None:
    assert "apply was called twice" in refused(runs, "twice").log()


def test_an_attention_of_its_own_is_refused(runs: BridgeRuns) -> None:
    run = runs.bridge(ladder=LADDER, change="own_core_attention", exit_codes=(1,))
    assert re.search(r"attend with megatron\.\S+\.Gemma2DotProductAttention, which", run.log())


def test_a_short_pipeline_without_overlapped_messages_is_refused(runs: BridgeRuns) -> None:
    run = runs.bridge(2, ladder=LADDER, change="short_pipeline", pp=2, vpp=2, exit_codes=(1, -9))
    assert "Set model.overlap_p2p_comm=true and model.batch_p2p_comm=false" in run.log() + run.log(
        1
    )


def test_context_parallel_ranks_that_read_others_are_found_before_they_exchange_keys(
    runs: BridgeRuns,
) -> None:
    """Each would send the keys that its own documents ask for."""
    run = refused(runs, "data", num_processes=2, exit_codes=(1, -9), cp=2)
    said = "".join(run.log(rank) for rank, code in enumerate(run.exit_codes) if code == 1)
    assert "the context-parallel ranks of one model read different sequences first" in said


def test_ranks_with_other_settings_are_refused(runs: BridgeRuns) -> None:
    """Each process applies its own: a file or a variable may differ from node to node."""
    run = refused(runs, "on one rank", num_processes=2, exit_codes=(1, -9))
    said = "".join(run.log(rank) for rank, code in enumerate(run.exit_codes) if code == 1)
    assert (
        "UsageError: this run cannot begin: the ranks disagree on probe: 'True' on rank 0 (" in said
    )
