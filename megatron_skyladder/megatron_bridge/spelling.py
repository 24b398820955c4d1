"""The names of settings: SkyLadder speaks of Megatron-LM's flags, users of Bridge of its fields.

    --skyladder-start-window 32  ->  skyladder.start_window=32
    --seq-length=8192            ->  model.seq_length=8192

Standard library only.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_skyladder.errors import UsageError

_FIELDS = {
    "global-batch-size": "train.global_batch_size",
    "micro-batch-size": "train.micro_batch_size",
    "train-samples": "train.train_samples",
    "train-iters": "train.train_iters",
    "log-interval": "logger.log_interval",
    "eval-iters": "validation.eval_iters",
    "load": "checkpoint.load",
    "finetune": "checkpoint.finetune",
    "reset-attention-mask": "dataset.reset_attention_mask",
    "no-create-attention-mask-in-dataloader": (
        "dataset.skip_getting_attention_mask_from_dataset=true"
    ),
}
_WITHOUT_VALUE = (  # of our flags: true or left out
    *("intra-document", "allow-unfinished", "allow-schedule-change", "end-ladder"),
    *("require-documents", "no-probe"),
)
_FLAG = re.compile(r"--([a-z][a-z0-9-]*[a-z0-9])(?:([= ])(?=[\d'\"]|final\b))?")
_COMMAND = re.compile(r"skyladder (?:inspect|plan|prepare|flags)\b[^\n(]*")


def field_of(flag: str) -> str:
    """Return what Bridge's users set in the place of a flag, given without its dashes."""
    if flag.startswith("skyladder-"):
        name = flag.removeprefix("skyladder-")
        value = "=true" if name in _WITHOUT_VALUE else ""
        return f"skyladder.{name.replace('-', '_')}{value}"
    return _FIELDS.get(flag) or f"model.{flag.replace('-', '_')}"


def in_bridges_words(text: str) -> str:
    """Return a message with the names of fields in the place of flags.

    Commands that a message tells to type keep their flags.
    """
    parts, end = [], 0
    for command in _COMMAND.finditer(text):
        parts += [_translated(text[end : command.start()]), command.group()]
        end = command.end()
    return "".join([*parts, _translated(text[end:])])


def _translated(text: str) -> str:
    return _FLAG.sub(lambda found: field_of(found[1]) + ("=" if found[2] else ""), text)


@contextmanager
def translated() -> Iterator[None]:
    """Let what the block refuses be said in Bridge's words; a decorator, too."""
    try:
        yield
    except UsageError as error:
        raise type(error)(in_bridges_words(str(error))) from None


class Translation(logging.Filter):
    """Makes a handler show messages in Bridge's words."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Translate, and let every record pass."""
        record.msg, record.args = in_bridges_words(record.getMessage()), ()
        return True
