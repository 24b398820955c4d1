"""The flags that ``plan`` and ``compare`` read: the part of Megatron's that decides work and time.

Works where Megatron is not installed. A launch script's whole command line can be pasted: what
does not matter here is left aside and named (`pasted`).
"""

from __future__ import annotations

import argparse
from typing import Any

from megatron_skyladder.ladder.batch_sizes import batch_sizes
from megatron_skyladder.ladder.flags import add_arguments, batch_schedule
from megatron_skyladder.ladder.numbers import argument, whole
from megatron_skyladder.ladder.presets import PAPER_RUNS, PaperRun
from megatron_skyladder.ladder.schedules import SCHEDULES
from megatron_skyladder.ladder.sequence_layout import chunk_length_of
from megatron_skyladder.planning import model_flags, training_data
from megatron_skyladder.planning.time_model import add_time_flags

INTEGERS = {
    "--seq-length": "tokens in a sequence",
    "--tensor-model-parallel-size": "TP",
    "--pipeline-model-parallel-size": "PP",
    "--context-parallel-size": "CP",
    "--expert-model-parallel-size": "EP",
    "--expert-tensor-parallel-size": "TP of the experts",
    "--micro-batch-size": "sequences of a micro-batch",
    "--global-batch-size": "sequences of a batch, over all GPUs",
    "--train-samples": "sequences to train on",
    "--train-iters": "batches to train on",
}
_DEFAULTS = {  # Megatron's
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    **model_flags.DEFAULTS,
}


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps paragraphs that were laid out by hand, and wraps those of a single line."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text.strip():
            return super()._fill_text(text, width, indent)
        return argparse.HelpFormatter._fill_text(self, text, width, indent)


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``--preset``, Megatron's flags, ours, and those about time and money."""
    parser.allow_abbrev = False  # as in Megatron
    parser.add_argument(
        "--preset",
        choices=tuple(PAPER_RUNS),
        help="model, batch, length and schedule of a run of the paper; flags override its parts",
    )
    megatron = parser.add_argument_group(
        "Megatron's flags", "Those that decide work and time. All others are accepted and left out."
    )
    for flag, help_text in INTEGERS.items():
        megatron.add_argument(flag, type=argument(whole), metavar="N", help=help_text)
    megatron.add_argument(
        "--step-batch-size-schedule",
        metavar="TEXT",
        help="a batch that grows: TOKENS:SAMPLES ..., in place of --global-batch-size",
    )
    model_flags.add_model_flags(megatron)
    for flag in ("--fp8-format", "--fp4-format"):
        megatron.add_argument(flag, metavar="NAME", help="decides the peak rate of linear layers")
    training_data.add_arguments(megatron)
    add_time_flags(parser)
    add_arguments(parser)


def complete(args: argparse.Namespace, preset: str | None = None) -> argparse.Namespace:
    """Return the flags with the preset's and Megatron's defaults filled in, and checked.

    Args:
        args: the parsed flags.
        preset: a run of the paper, in place of ``args.preset``.

    Raises:
        ValueError: a flag is missing or does not fit another one.
    """
    filled = argparse.Namespace(**vars(args))
    preset = preset or args.preset
    if preset:
        for name, value in _preset_flags(preset, PAPER_RUNS[preset], args).items():
            if getattr(filled, name, None) is None:
                setattr(filled, name, value)
    for name, value in _DEFAULTS.items():
        if getattr(filled, name) is None:
            setattr(filled, name, value)
    if filled.use_rotary_position_embeddings:
        filled.position_embedding_type = "rope"
    _fill_batch(filled)
    _fill_stage_batches(filled)
    _check(filled)
    return filled


def _preset_flags(name: str, run: PaperRun, args: argparse.Namespace) -> dict[str, Any]:
    model = run.model
    flags = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "group_query_attention": True,
        "num_query_groups": model.num_query_groups,
        "vocab_size": model.vocab_size,
        "swiglu": True,
        "untie_embeddings_and_output_weights": True,
        "disable_bias_linear": True,
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "seq_length": run.seq_length,
        "max_position_embeddings": run.seq_length,
        "global_batch_size": run.global_batch_size,
        "skyladder_preset": name,
    }
    if args.train_samples is None:
        flags["train_iters"] = run.train_steps
    if args.step_batch_size_schedule is not None:
        del flags["global_batch_size"]
    return flags


def _fill_batch(flags: argparse.Namespace) -> None:
    """Set the global batch as Megatron does: from the micro-batch where it is not given."""
    if flags.step_batch_size_schedule is not None:
        if flags.global_batch_size is not None:
            raise ValueError(
                f"--global-batch-size={flags.global_batch_size} stands beside "
                "--step-batch-size-schedule, which Megatron refuses. Give only the schedule."
            )
        return
    if flags.global_batch_size is None and flags.micro_batch_size and flags.gpus:
        flags.global_batch_size = flags.micro_batch_size * (flags.gpus // _gpus_per_replica(flags))


def _fill_stage_batches(flags: argparse.Namespace) -> None:
    """Set the batches that stages ask for, where the launch has no schedule of them yet.

    ``stage_batches`` is then what has to be added to the launch.
    """
    flags.stage_batches = ""
    known = flags.global_batch_size or flags.step_batch_size_schedule
    lengths = flags.train_samples or flags.train_iters
    if not (flags.seq_length and lengths and (known or flags.skyladder_stages)):
        return  # what is missing is said later
    schedule = SCHEDULES.get(flags.skyladder_schedule)
    if flags.skyladder_schedule is not None and not (schedule and schedule.needs_run):
        return  # stages are what may set batches; an unknown schedule is refused later
    text = batch_schedule(flags)
    if text is not None and flags.step_batch_size_schedule is None:
        flags.step_batch_size_schedule = flags.stage_batches = text
        flags.global_batch_size = None


def _gpus_per_replica(flags: argparse.Namespace) -> int:
    return (
        flags.tensor_model_parallel_size
        * flags.pipeline_model_parallel_size
        * flags.context_parallel_size
    )


def _check(flags: argparse.Namespace) -> None:
    missing = [] if flags.seq_length is not None else ["--seq-length"]
    if flags.global_batch_size is None and flags.step_batch_size_schedule is None:
        missing.append("--global-batch-size")
    if flags.train_samples is None and flags.train_iters is None:
        missing.append("--train-iters")
    if missing:
        raise ValueError(
            f"not given: {', '.join(missing)}. A plan needs the length of sequences, the batch and "
            f"the length of the run. Give Megatron's own flags, or --preset {'|'.join(PAPER_RUNS)}."
        )
    for flag in (*INTEGERS, *model_flags.INTEGERS):
        value = getattr(flags, flag[2:].replace("-", "_"))
        if value is not None and value < 1:
            raise ValueError(f"{flag}={value}: give at least 1.")
    if flags.train_samples is not None and flags.train_iters is not None:
        raise ValueError("--train-samples and --train-iters are both given. Give only one of them.")
    if total_steps(flags) < 1:
        given = f"--train-samples={flags.train_samples}"
        if flags.train_samples is None:
            given = f"--train-iters={flags.train_iters}"
        raise ValueError(
            f"{given} is less than one batch of {batch_sizes(flags).final}. Train for longer, or "
            "with smaller batches."
        )
    if flags.context_parallel_size > 1:
        chunk_length_of(flags.context_parallel_size, flags.seq_length)
    _check_layout(flags)


def _check_layout(flags: argparse.Namespace) -> None:
    if flags.gpus is None:
        return
    replica = _gpus_per_replica(flags)
    if flags.gpus < 1 or flags.gpus % replica:
        raise ValueError(
            f"--gpus={flags.gpus} is no multiple of TP x PP x CP = {replica}. Give whole replicas."
        )
    _check_experts(flags)
    rows = (flags.micro_batch_size or 1) * (flags.gpus // replica)
    for _, size in batch_sizes(flags).stages:
        if size % rows:
            given = f"--global-batch-size={size}"
            if flags.step_batch_size_schedule is not None:
                given = f"{size} samples in --step-batch-size-schedule"
            raise ValueError(
                f"{given} is no multiple of micro-batch size x data-parallel size = {rows}. Change "
                "one of them, or --gpus."
            )


def _check_experts(flags: argparse.Namespace) -> None:
    """Experts are spread over ranks in another way: ETP x EP x PP has to fit as well."""
    tensor = flags.expert_tensor_parallel_size or flags.tensor_model_parallel_size
    group = tensor * flags.expert_model_parallel_size * flags.pipeline_model_parallel_size
    if flags.expert_model_parallel_size > 1 and flags.gpus % group:
        raise ValueError(
            f"--gpus={flags.gpus} is no multiple of expert TP x EP x PP = {group}. Change "
            "--expert-model-parallel-size or --expert-tensor-parallel-size."
        )


def total_steps(flags: argparse.Namespace) -> int:
    """Return the steps of the schedule: batches of the final size, as training counts them."""
    return total_samples(flags) // batch_sizes(flags).final


def total_samples(flags: argparse.Namespace) -> int:
    """Return the samples of the run."""
    if flags.train_samples is not None:
        return int(flags.train_samples)
    return int(batch_sizes(flags).samples_in(flags.train_iters))
