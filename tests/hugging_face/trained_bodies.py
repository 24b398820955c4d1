"""What ranks of `megatron_skyladder.testing.ProcessPool` do for the tests of this folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def train(flags: list[str], losses: str | None = None) -> None:
    """Train through our entry point.

    Args:
        flags: the command line.
        losses: a file for the loss of every step, written by the ranks that have it.
    """
    from megatron.training import training

    from megatron_skyladder import pretrain_gpt

    found: list[float] = []
    train_step = training.train_step

    def recorded(*args, **kwargs):
        result = train_step(*args, **kwargs)
        if result[0]:
            found.append(float(result[0]["lm loss"]))
            if losses is not None:
                Path(losses).write_text(json.dumps(found))
        return result

    training.train_step = recorded
    sys.argv = ["pretrain_gpt", *flags]
    pretrain_gpt.main()


def logits(iteration: str, folder: str, tokens: str, out: str) -> None:
    """Save the logits of Megatron's own model, as --check does in a process of its own."""
    from megatron_skyladder.hugging_face.checking import megatron_logits

    megatron_logits(iteration, folder, tokens, out)


def parse(flags: list[str], out: str) -> None:
    """Parse flags with Megatron's parser and ours, and write what they set."""
    from megatron.training.arguments import parse_args

    from megatron_skyladder.ladder.flags import add_arguments

    sys.argv = ["pretrain_gpt", *flags]
    args = parse_args(extra_args_provider=add_arguments)
    plain = {k: v for k, v in vars(args).items() if isinstance(v, str | int | float | bool)}
    Path(out).write_text(json.dumps(plain))
