"""The probe at start-up finds what is broken on purpose, passes what is right, leaves no trace."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import pytest
from runs import Trainer
from test_parity import CONSTANT, DOCUMENTS, LINEAR, OWN, SECOND, SLIDING

from megatron_skyladder.testing import requires_megatron

pytestmark = requires_megatron

NOT_APPLIED = "the attention mask is not applied as the schedule says"


@dataclass(frozen=True)
class Launch:
    """One launch in which many things are broken, one after the other.

    Args:
        num_processes: ranks.
        flags: beyond those of the small model.
        broken: functions of `breakages`, and what the probe has to say about each.
    """

    num_processes: int
    flags: str
    broken: dict[str, str]


WINDOW = {
    "window_one_longer": "by the schedule",
    "window_one_shorter": "by the schedule",
    "schedule_one_shorter": "by the schedule",
    "window_one_step_late": "by the schedule",
    "window_stays": "by the schedule",
    "evaluate_under_the_window": "in evaluation",
    "window_one_shorter_in_attention": "in training after 0 samples, with a window of 8 tokens: "
    "the query at position 7 of sequence 0 does not see the key at 0",
    "not_causal": "sees the key at 1, the one after itself",
}
IN_DOCUMENTS = {
    "documents_never_found": "the last before those that it may see",
    "documents_of_the_first_sequence": "of sequence 1",
    "documents_of_another_batch": "sees the key",
    "documents_end_before_eod": "does not see the key",
    "sequences_run_together": "of sequence 1",
    "mask_left_behind": "sees the key",
    "look_up_documents": "sees the key",
    "evaluate_in_documents": "in evaluation",
    "other_tokens_than_masked": "other tokens than",
}
# Right as long as windows are short: a ladder comes to these calls hours into a run.
LATER = {
    "windows_end_at_a_tile": "in training after 40 samples, with a window of 63 tokens",
    "whole_sequences_without_gradients_of_keys": "with a window of 64 tokens",
}
SLOW = "--skyladder-start-window 4 --skyladder-alpha 2 --skyladder-allow-unfinished"
EXCHANGED = {
    "keys_sent_one_off": "does not see the key",
    "first_fetched_key_wrong": "does not see the key",
    "gradients_of_keys_dropped": "another gradient to the value",
    "gradients_of_keys_alone_dropped": "another gradient to the key",
    "gradients_one_off": "another gradient to the value",
}
LAUNCHES = {
    "window": Launch(1, f"--micro-batch-size 2 {LINEAR}", WINDOW | LATER),
    "documents": Launch(
        1, f"--micro-batch-size 2 {LINEAR} {DOCUMENTS}", IN_DOCUMENTS | {"not_causal": "sees"}
    ),
    "local layers": Launch(
        1,
        f"--micro-batch-size 1 {LINEAR} {DOCUMENTS} {OWN} --window-attn-skip-freq 4",
        {"own_window_one_longer": "(it sees 12 tokens at most)"},
    ),
    "local layers, later": Launch(
        1,
        f"--micro-batch-size 1 {SLOW} {OWN} --window-attn-skip-freq 4",
        {"own_window_ignored_in_windows": "layer 1 (it sees 12 tokens at most)"},
    ),
    "local layers and documents, later": Launch(
        1,
        f"--micro-batch-size 1 {SLOW} {DOCUMENTS} {OWN} --window-attn-skip-freq 4",
        {"own_window_ignored_in_documents": "layer 1 (it sees 12 tokens at most)"},
    ),
    "two ladders": Launch(
        1,
        f"--micro-batch-size 1 {LINEAR} {DOCUMENTS} {OWN} {SECOND} --window-attn-skip-freq 4",
        {
            "own_window_one_longer": "layer 1 (it sees 3 tokens at most)",
            "second_ladder_ignored": "local layers see None tokens at most, but by their ladder",
            "second_ladder_one_step_late": "layer 1 (it sees 4 tokens at most)",
            "own_window_left_out_of_keys": "layer 4",
        },
    ),
    "sliding": Launch(
        1, f"--micro-batch-size 1 {LINEAR} {SLIDING}", {"sliding_window_one_longer": "sees the key"}
    ),
    "sliding, documents": Launch(
        1,
        f"--micro-batch-size 2 {LINEAR} {SLIDING} {DOCUMENTS}",
        {"documents_lost_in_the_full_window": "with a window of 64 tokens"},
    ),
    "cp2, later": Launch(  # windows of 8 and 16 tokens, which end with a rank's chunks, come first
        2,
        f"--micro-batch-size 2 {LINEAR} --skyladder-round-to 8 --context-parallel-size 2",
        EXCHANGED,
    ),
    "cp2, window": Launch(
        2,
        f"--micro-batch-size 2 {LINEAR} --skyladder-start-window 24 --context-parallel-size 2",
        EXCHANGED,
    ),
    "cp2, documents": Launch(
        2,
        f"--micro-batch-size 2 {LINEAR} {DOCUMENTS} {SLIDING} --context-parallel-size 2",
        EXCHANGED | {"documents_of_the_first_sequence": "of sequence 1"},
    ),
    "cp2, balanced documents": Launch(  # what a rank holds is found from what it has read
        2,
        f"--micro-batch-size 2 {LINEAR} {DOCUMENTS} --context-parallel-size 2",
        {"rank_1_reads_others": "the context-parallel ranks of one model read different sequences"},
    ),
    "tp2-pp2": Launch(
        4,
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --micro-batch-size 2 "
        f"{LINEAR} {DOCUMENTS}",
        {
            "window_one_step_late": "by the schedule",
            "documents_never_found": "sees the key",
            "documents_of_the_first_sequence": "of sequence 1",
            "look_up_documents": "sees the key",
        },
    ),
    "tp2-pp2-vpp2": Launch(
        4,
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --micro-batch-size 2 "
        f"--num-layers-per-virtual-pipeline-stage 1 {LINEAR} {DOCUMENTS}",
        {"second_chunk_reads_others": "the model chunks of this rank read different sequences"},
    ),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_breakages_are_found(trainer: Trainer, name: str) -> None:
    launch = LAUNCHES[name]
    run = trainer.train(
        f"--train-samples 80 {launch.flags}",
        num_processes=launch.num_processes,
        load=False,
        body="probe_bodies:probe_broken",
        names=list(launch.broken),
    )
    complaints = [json.loads(p.read_text()) for p in sorted(run.folder.glob("complaints.*.json"))]
    assert len(complaints) == launch.num_processes
    assert all(other == complaints[0] for other in complaints[1:])
    assert complaints[0].pop("nothing") is None
    assert complaints[0].keys() == launch.broken.keys()
    for broken, said in launch.broken.items():
        assert complaints[0][broken] is not None, broken
        assert NOT_APPLIED in complaints[0][broken]
        assert said in complaints[0][broken], broken


def test_a_wrong_mask_ends_the_run(trainer: Trainer) -> None:
    """A mask that is looked up is right until activations are recomputed: it is asked once more."""
    run = trainer.train(
        f"--train-samples 16 --micro-batch-size 2 {CONSTANT} {DOCUMENTS}",
        load=False,
        broken="look_up_documents",
        exit_codes=(1,),
    )
    assert (
        f"MaskProbeError: {NOT_APPLIED}. rank 0: layer 1, in training after 0 samples" in run.log()
    )
    assert "once more, after another micro-batch, as recomputation does" in run.log()
    assert not run.of("step")


def test_a_kernel_that_refuses_a_later_window_ends_the_run_at_its_start(trainer: Trainer) -> None:
    run = trainer.train(
        f"--train-samples 80 --micro-batch-size 2 {LINEAR}",
        load=False,
        broken="whole_sequences_refused_in_training",
        exit_codes=(1,),
    )
    assert "no backward kernel for the full window" in run.log()
    assert "the attention fails at the mask probe's questions to layer 1, in training" in run.log()
    assert not run.of("step")


def test_attention_of_megatron_is_named(trainer: Trainer) -> None:
    run = trainer.train(
        f"--train-samples 16 --micro-batch-size 2 {LINEAR}",
        load=False,
        broken="attention_of_megatron_in_a_layer",
        exit_codes=(1,),
    )
    assert NOT_APPLIED in run.log()
    assert (
        "the core attention of layer 2 is megatron.core.transformer.dot_product_attention."
        "DotProductAttention, which knows nothing of windows"
    ) in run.log()


@pytest.mark.parametrize("more", ["", "--skyladder-no-probe"])
def test_a_model_without_our_attention_is_refused(trainer: Trainer, more: str) -> None:
    """On every rank, with and without the probe: its log would show a window that nobody has."""
    run = trainer.train(
        f"--train-samples 16 --micro-batch-size 2 {LINEAR} {more} --pipeline-model-parallel-size 2",
        num_processes=2,
        load=False,
        broken="attention_of_megatron",
        exit_codes=(1, -9),  # the other is killed where one has ended
    )
    for rank in (rank for rank, code in enumerate(run.exit_codes) if code == 1):
        assert "a megatron.core.models.gpt.gpt_model.GPTModel, has SkyLadder's" in run.log(rank)
        assert "its own is megatron.core.transformer.dot_product_attention" in run.log(rank)
    assert not run.of("step")


def test_a_stage_without_our_attention_is_none_of_that(trainer: Trainer) -> None:
    """As in a hybrid model: what counts are all ranks."""
    run = trainer.train(
        f"--train-samples 16 --micro-batch-size 2 {LINEAR} --skyladder-no-probe "
        "--pipeline-model-parallel-size 2",
        num_processes=2,
        load=False,
        broken="attention_of_megatron_on_rank_1",
    )
    assert run.of("step")


def test_ranks_with_another_kernel_are_named(trainer: Trainer) -> None:
    """The loss is the same, so nothing but the time of every step would show it."""
    flags = f"--train-samples 16 --micro-batch-size 2 {LINEAR} --tensor-model-parallel-size 2"
    run = trainer.train(flags, num_processes=2, load=False, broken="another_kernel_on_rank_1")
    assert run.of("step")
    assert "on 1 of 2 ranks by another kernel, first on rank 1 (" in run.log()
    assert ") by flash: this node alone has it. Every step waits" in run.log()
    assert run.log().count("by another kernel") == 1
    assert "by another kernel" not in run.log(1)


def test_weights_that_are_not_finite_are_no_fault_of_the_mask(trainer: Trainer) -> None:
    """Megatron's own check, switched off here, would end the run at the first loss."""
    run = trainer.train(
        f"--train-samples 8 --micro-batch-size 2 {LINEAR} --no-check-for-nan-in-loss-and-grad",
        load=False,
        broken="weights_not_finite",
    )
    assert "the model's numbers are not finite" in run.log()
    assert "layer 1 makes of the first micro-batch hold NaN" in run.log()
    assert "mask probe passed" in run.log()


MOE = (
    "--num-experts 4 --moe-router-topk 2 --moe-aux-loss-coeff 0.01 "
    "--moe-expert-capacity-factor 1.0 --moe-input-jitter-eps 0.1"
)
OVERLAP = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
RIGHT = {
    "moe, dropout": (1, f"{MOE} --hidden-dropout 0.1 --micro-batch-size 2 {LINEAR} {DOCUMENTS}"),
    "moe, tp2": (
        2,
        f"{MOE} --tensor-model-parallel-size 2 --sequence-parallel --micro-batch-size 2 {LINEAR}",
    ),
    "moe, ep2": (
        2,
        f"{MOE} --expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall "
        f"--micro-batch-size 2 {LINEAR} {DOCUMENTS}",
    ),
    "overlap": (2, f"{OVERLAP} --hidden-dropout 0.1 --micro-batch-size 2 {LINEAR} {DOCUMENTS}"),
    "cp2, bf16": (
        2,
        f"--context-parallel-size 2 --bf16 --micro-batch-size 2 {LINEAR} {DOCUMENTS} {SLIDING}",
    ),
    "pp2 vpp2": (
        2,
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 "
        "--microbatch-group-size-per-virtual-pipeline-stage 4 "
        f"--micro-batch-size 2 {LINEAR} {DOCUMENTS} "
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_nothing_is_left_behind(trainer: Trainer, name: str) -> None:
    """What is right passes, and training is bit-identical to training without the probe.

    Dropout and jitter draw from the random states that a probe would have moved; the aggregated
    figures would count its sequences; the data would be one micro-batch further on.
    """
    num_processes, flags = RIGHT[name]
    flags = f"--train-samples 24 {flags}"
    probed, plain = (
        trainer.train(f"{flags} {more}", num_processes=num_processes, load=False)
        for more in ("", "--skyladder-no-probe")
    )
    assert "mask probe passed" in probed.log() and "mask probe passed" not in plain.log()
    assert probed.tokens == plain.tokens
    assert probed.losses == plain.losses
    assert probed.steps("grad_norm") == plain.steps("grad_norm")
    last = num_processes - 1
    figures = [re.findall(FIGURES, run.log(last)) for run in (probed, plain)]
    assert figures[0] == figures[1] != []


FIGURES = r"(?:window|fraction|context|fragments_per_row): [0-9.E+-]+|(?:loss|norm): [0-9.E+-]+"
