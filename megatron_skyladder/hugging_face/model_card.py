"""What an exported model's README.md says: where it comes from, and how far its window got."""

from __future__ import annotations

import logging
from argparse import Namespace
from dataclasses import dataclass

from megatron_skyladder.hugging_face.architecture import Architecture
from megatron_skyladder.hugging_face.checkpoints import Checkpoint
from megatron_skyladder.ladder import flags

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ladder:
    """Where a checkpoint stands on its schedule.

    Args:
        schedule: in words, None where the run had none.
        window: tokens, of the next step; None where it is not known.
        seq_length: tokens in a sequence.
    """

    schedule: str | None
    window: int | None
    seq_length: int

    @property
    def is_finished(self) -> bool | None:
        """Whether attention had reached whole sequences; None where it is not known."""
        if self.schedule is None:
            return True
        return None if self.window is None else self.window >= self.seq_length


def ladder_of(checkpoint: Checkpoint) -> Ladder:
    """Work out the window at which a checkpoint stands."""
    args = checkpoint.args
    schedule = getattr(args, "skyladder_fingerprint", None)
    window = None
    if schedule is not None and flags.is_requested(_options(args)):
        window = _window(args, checkpoint.consumed_samples)
    return Ladder(schedule, window, args.seq_length)


def _options(args: Namespace) -> Namespace:
    """Leave out what is no flag."""
    return Namespace(**{k: v for k, v in vars(args).items() if k != "skyladder_fingerprint"})


def _window(args: Namespace, consumed_samples: int | None) -> int | None:
    if consumed_samples is None:
        return None
    try:
        ladder = flags.config_from_args(_options(args))
    except (ValueError, TypeError, AttributeError) as error:
        logger.warning("the window of this checkpoint cannot be worked out: %s", error)
        return None
    return None if ladder is None else ladder.window_at_samples(consumed_samples)


def warnings_about(ladder: Ladder) -> list[str]:
    """Return what a user has to know before the model is used."""
    if ladder.is_finished is False:
        return [
            f"the checkpoint stands at a window of {ladder.window:,} of {ladder.seq_length:,} "
            "tokens: this model has not been trained on longer contexts yet. Export a later "
            "iteration for the finished model."
        ]
    if ladder.is_finished is None:
        return ["how far the window had grown is not known; see the schedule in the model card."]
    return []


def model_card(checkpoint: Checkpoint, model: Architecture, dtype: str) -> str:
    """Return the README.md of an exported model."""
    ladder = ladder_of(checkpoint)
    rows = {
        "architecture": f"{model.family}, {model.num_layers} layers, hidden size "
        f"{model.hidden_size}, {model.num_heads} heads, {model.num_groups} key-value heads",
        "context": f"{model.max_positions:,} tokens, rotary base {model.rope.base:,}"
        + ("" if model.rope.kind == "default" else f", {model.rope.kind} scaling"),
        "weights": dtype,
        "checkpoint": f"iteration {checkpoint.iteration:,} ({checkpoint.kind})",
        "training tokens": _tokens(checkpoint),
        "schedule": ladder.schedule or "attention over whole sequences throughout",
        "window at this checkpoint": "unknown"
        if ladder.window is None and ladder.schedule
        else f"{ladder.window or ladder.seq_length:,} of {ladder.seq_length:,} tokens",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    notes = "".join(f"\n**Note:** {text}\n" for text in warnings_about(ladder))
    return f"""\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- megatron-skyladder
---

# {checkpoint.folder.resolve().parent.name or "model"}

Pretrained with Megatron and exported by megatron-skyladder, which schedules the attention window
(SkyLadder, [arXiv:2503.15450](https://arxiv.org/abs/2503.15450)).

| | |
|---|---|
{table}
{notes}
No token was put in front of training documents unless the tokenizer here does so by itself.
"""


def _tokens(checkpoint: Checkpoint) -> str:
    if checkpoint.consumed_samples is None:
        return "unknown"
    tokens = checkpoint.consumed_samples * checkpoint.args.seq_length
    return f"{tokens:,}"
