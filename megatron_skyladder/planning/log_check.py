"""Whether a log is of the planned run's model: the seconds of another one say nothing about it."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from megatron_skyladder.ladder.config import SkyLadderConfig
from megatron_skyladder.ladder.costs import DecoderShape, grid_pairs
from megatron_skyladder.ladder.fragments import window_pairs
from megatron_skyladder.report.runlog import Iteration, RunLog

# Megatron's arguments, as logs print them. Sizes are compared where both have one: what is not
# given Megatron fills in.
SIZES = (
    *("seq_length", "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"),
    *("kv_channels", "moe_ffn_hidden_size", "vocab_size"),
)
# Where one of these is not given there is no such part.
PARTS = ("num_experts", "multi_latent_attention", "mtp_num_layers", "fp8", "fp4")
# On as many GPUs laid out in another way a step takes another time.
LAYOUT = (
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"),
    *("expert_model_parallel_size", "micro_batch_size"),
)
_FLAGS = {"fp8": "fp8_format", "fp4": "fp4_format"}  # called otherwise than the argument
# Of attention work and vocabulary: another length of sequences is further away, and a few rows more
# do not show in a step's time.
_TOLERANCE = 1.1


def check_log(
    run: RunLog,
    flags: argparse.Namespace,
    shape: DecoderShape | None,
    config: SkyLadderConfig,
    notes: list[str],
) -> None:
    """Make sure that a log is of the planned run's model, as far as it shows.

    Args:
        run: the log.
        flags: of the plan, completed.
        shape: the planned model, or None where it cannot be counted.
        config: of the plan.
        notes: gets what cannot be known, and another layout of the GPUs.

    Raises:
        ValueError: it is of another one.
    """
    differences = [*_of_model(run, flags, shape), *_of_windows(run, config)]
    if differences:
        raise ValueError(
            f"--calibrate={flags.calibrate} is of another run: {', '.join(differences)}. Give a "
            "log of this model and sequence length, or --device instead."
        )
    if "num_layers" not in run.settings:
        notes.append(
            "The log prints no arguments of Megatron's: nothing shows that it is of this model."
        )
    layout = list(_differences(LAYOUT, flags, run))
    if layout:
        notes.append(
            f"The log's GPUs are laid out otherwise: {', '.join(layout)}. Its times are taken as "
            "they are."
        )


def has_the_same_ranks(run: RunLog, flags: argparse.Namespace) -> bool:
    """Return whether as many context-parallel ranks share a sequence, as far as the log shows."""
    return not list(_differences(("context_parallel_size",), flags, run))


def _differences(names: Iterable[str], flags: argparse.Namespace, run: RunLog) -> Iterable[str]:
    """Yield, as text, the numbers that both the log and the plan have and that differ."""
    for name in names:
        logged, planned = run.number(name), getattr(flags, name, None)
        if logged is not None and planned is not None and logged != planned:
            yield f"{name} {logged:g} (planned: {planned})"


def _of_model(run: RunLog, flags: argparse.Namespace, shape: DecoderShape | None) -> Iterable[str]:
    yield from _differences(SIZES, flags, run)
    for name in PARTS:
        planned = getattr(flags, _FLAGS.get(name, name), None)
        if name in run.settings and _given(run.settings[name]) != _given(planned):
            yield f"{name} {run.settings[name]} (planned: {planned})"
    rows = run.padded_vocab_size
    if rows is None or shape is None or list(_differences(LAYOUT[:1], flags, run)):
        return  # tensor-parallel ranks pad the vocabulary
    if not 1 / _TOLERANCE <= rows / shape.vocab_size <= _TOLERANCE:
        yield f"vocabulary of {rows} rows (planned: {shape.vocab_size})"


def _given(value: Any) -> str:
    """Return a value as text that two ways of writing it share; empty: not given."""
    text = str(value)
    return "" if text in ("None", "False", "0", "") else text


def _of_windows(run: RunLog, config: SkyLadderConfig) -> Iterable[str]:
    """Yield what shows that sequences or masks are others, whatever arguments are printed."""
    lines = [line for line in run.iterations if line.window and line.attention_fraction]
    longest = max((line.window or 0 for line in lines), default=0)
    if longest > config.seq_length:
        yield f"windows of up to {longest} tokens (planned: {config.seq_length})"
    elif lines and f"{config.mask} mask" in (run.schedule or f"{config.mask} mask"):
        line = lines[-1]
        logged, planned = line.attention_fraction or 0.0, _fraction(line, config)
        # documents leave less work, but never more
        too_little = (
            "documents not masked" in (run.schedule or "") and logged * _TOLERANCE < planned
        )
        if too_little or logged > planned * _TOLERANCE:
            yield (
                f"attention work of {logged:.3g} at a window of {line.window} (planned: "
                f"{planned:.3g})"
            )


def _fraction(line: Iteration, config: SkyLadderConfig) -> float:
    """Return the attention work of a line's window under the plan's masks, documents left aside."""
    local_window = line.values.get("skyladder/local_window")
    own = None if local_window is None else int(local_window)
    causal = window_pairs(config.seq_length, config.seq_length)
    return float(grid_pairs(config)(line.window, own) / causal)
