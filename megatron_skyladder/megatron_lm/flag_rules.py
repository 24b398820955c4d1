"""The one table of Megatron's flags that matter to SkyLadder: training, doctor, plan and slurm.

Each row says when a flag matters, what it does to the run and what to do about it. A flag that is
absent from a release costs nothing there. Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron_skyladder.attention import limits
from megatron_skyladder.attention.limits import Effect, Finding, FlagRule

_USE_DOCUMENTS = "To keep documents apart, use --skyladder-intra-document instead."
_PACKS = "it packs sequences of several lengths and brings masks of its own"

RULES = (
    *limits.RULES,
    # --- sequences or masks that are not those of a plain pretraining run ---
    FlagRule("--sft", Effect.CHANGES_MASKS, "it packs conversations into sequences itself"),
    FlagRule("--fim-data", Effect.CHANGES_MASKS, "it reorders the tokens of a document"),
    FlagRule(
        "--dataloader-inter-document-masking",
        Effect.CHANGES_MASKS,
        "it is Megatron's own mask of documents",
        _USE_DOCUMENTS,
    ),
    FlagRule(
        "--reset-attention-mask",
        Effect.CHANGES_MASKS,
        "it is Megatron's dense mask of documents",
        _USE_DOCUMENTS,
    ),
    FlagRule("--hybrid-context-parallel", Effect.CHANGES_MASKS, _PACKS, _USE_DOCUMENTS),
    FlagRule("--dynamic-context-parallel", Effect.CHANGES_MASKS, _PACKS, _USE_DOCUMENTS),
    FlagRule("--sequence-packing-scheduler", Effect.CHANGES_MASKS, _PACKS, _USE_DOCUMENTS),
    FlagRule("--max-seqlen-per-dp-cp-rank", Effect.CHANGES_MASKS, _PACKS, _USE_DOCUMENTS),
    FlagRule("--use-varlen-dataset", Effect.CHANGES_MASKS, _PACKS, _USE_DOCUMENTS),
    # --- models whose attention is not the one that SkyLadder replaces ---
    FlagRule("--mtp-num-layers", Effect.REFUSED, "multi-token prediction is not supported"),
    FlagRule("--multi-latent-attention", Effect.REFUSED, "latent attention is not supported"),
    # --- accepted ---
    FlagRule(
        "--fp8-format",
        Effect.NOTED,
        "runs the linear layers in FP8; SkyLadder's attention stays in 16 bits",
        attribute="fp8",
    ),
)


def given_values(words: Sequence[str]) -> dict[str, Any]:
    """Return the flags of a launch that are in the table, by their names in Megatron's arguments.

    What Megatron's own parser would make of them is not needed: a rule takes text as well.

    Args:
        words: of a command line, ours and what does not belong to Megatron included.
    """
    names = {rule.flag: rule.name for rule in RULES}
    values: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            name = names.get(flag, "")
            if name:
                values[name] = [value] if equals else []
        elif name:
            values[name].append(word)
    return {name: " ".join(parts) if parts else True for name, parts in values.items()}


def findings(settings: Any) -> Iterator[Finding]:
    """Yield all rules that a run with SkyLadder meets.

    Args:
        settings: Megatron's arguments, parsed; or a mapping of the flags that were given.
    """
    return limits.find(RULES, settings)


def check(options: Any) -> None:
    """Refuse what cannot be combined with SkyLadder.

    Args:
        options: Megatron's arguments, parsed.

    Raises:
        UsageError: all rules that stop training and are met, one on a line.
    """
    limits.refuse(findings(options))


def check_entry_point(options: Any) -> None:
    """Refuse, with SkyLadder or without, what only Megatron's own script would act on.

    Raises:
        UsageError: all such flags, one on a line.
    """
    limits.refuse(limits.find((rule for rule in RULES if rule.entry_point_always), options))
