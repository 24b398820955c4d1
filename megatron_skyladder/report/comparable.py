"""What runs differ in besides their schedules, where their losses are set side by side.

By the arguments that their logs print; one that a log lacks (Megatron Bridge prints none, releases
have others) is not compared.
"""

from __future__ import annotations

import re

from megatron_skyladder.report.runlog import RunLog

# What a model is, how it learns and is measured: each of them moves losses by itself.
OTHERS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "num_experts",
    "data_path",
    "train_data_path",
    "global_batch_size",
    "train_iters",
    "train_samples",
    "optimizer",
    "lr",
    "min_lr",
    "lr_decay_style",
    "lr_decay_iters",
    "lr_decay_samples",
    "lr_warmup_iters",
    "lr_warmup_samples",
    "lr_warmup_fraction",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "clip_grad",
    "hidden_dropout",
    "attention_dropout",
    "init_method_std",
    "rotary_base",
    "bf16",
    "fp16",
    "fp8",
    "eval_iters",
)
_TOKENS = ("tokenizer_type", "tokenizer_model", "vocab_size", "vocab_file", "merge_file")
_DATA = ("data_path", "data_args_path", "per_split_data_args_path", "split")
_OWN_DATA = "valid_data_path"
_NOTHING = {"", "None"}

# Data that lies elsewhere is the same by its name; what is often called alike, by its folder's
# name too.
_OFTEN_CALLED_ALIKE = (".model", ".json", ".txt")
_PATH = re.compile(r"[^\s'\",\[\]]*/[^\s'\",\[\]]*")


def other_settings(log: RunLog, reference: RunLog) -> list[str]:
    """Return the arguments in which two runs learn, or are measured, differently."""
    return [name for name in OTHERS if _differs(log, reference, name)]


def other_validation(log: RunLog, reference: RunLog) -> list[str]:
    """Return the arguments by which two runs validate on something else, text or its length.

    Where these differ, the difference of two validation losses says nothing.
    """
    length = ["seq_length"] if _differs(log, reference, "seq_length") else []
    return length + other_text(log, reference)


def other_text(log: RunLog, reference: RunLog) -> list[str]:
    """Return those that make it another text; losses at a context length need no more."""
    has_own = any(run.settings.get(_OWN_DATA, "") not in _NOTHING for run in (log, reference))
    names = (*_TOKENS, _OWN_DATA) if has_own else (*_TOKENS, *_DATA)
    return [name for name in names if _differs(log, reference, name)]


def _differs(log: RunLog, reference: RunLog, name: str) -> bool:
    if name not in log.settings or name not in reference.settings:
        return False
    if None not in (numbers := (log.number(name), reference.number(name))):
        return numbers[0] != numbers[1]
    texts = {_PATH.sub(_place, run.settings[name]) for run in (log, reference)}
    return len(texts) > 1


def _place(path: re.Match[str]) -> str:
    parts = path[0].rstrip("/").split("/")
    return "/".join(parts[-2:]) if parts[-1].endswith(_OFTEN_CALLED_ALIKE) else parts[-1]
