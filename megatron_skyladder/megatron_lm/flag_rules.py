"""The one table of Megatron's flags that matter to SkyLadder: training, doctor, plan and slurm.

Each row says when a flag matters, what it does to the run and what to do about it. A flag that is
absent from a release costs nothing there. Standard library only.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_skyladder.attention import limits
from megatron_skyladder.attention.limits import Effect, Finding, FlagRule, other_than
from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder import layer_pattern
from megatron_skyladder.ladder.settings import SAME_ON_ALL_RANKS

logger = logging.getLogger(__name__)

_USE_DOCUMENTS = "To keep documents apart, use --skyladder-intra-document instead."
_PACKS = "it packs sequences of several lengths and brings masks of its own"
_LOOKED_UP = ("context_parallel_size", "calculate_per_token_loss")  # by rules of other flags
RECURRENT_STATE = "skyladder_recurrent_state"  # our flag, by its name in Megatron's arguments
_CARRIES = (
    "its state carries what a window hides, so say where it starts anew: "
    "--skyladder-recurrent-state fragments, documents or free"
)
_SYMBOLS = {  # of --hybrid-layer-pattern: what a layer does that windows cannot be combined with
    layer_pattern.LATENT_ATTENTION: "+ is multi-latent attention, which SkyLadder knows in a GPT "
    "only",
    layer_pattern.SPARSE_ATTENTION: "D is sparse attention: its indexer chooses what is seen",
    layer_pattern.MAMBA: f"M is a Mamba layer: {_CARRIES}",
    layer_pattern.GATED_DELTA_NET: f"G is a gated delta net layer: {_CARRIES}",
    layer_pattern.PREDICTION_HEADS: "after / are heads of multi-token prediction, which SkyLadder "
    "knows in a GPT only",
}
_SET_BY_SYMBOLS = {  # flags that Megatron sets itself, for a pattern that has one of these
    "--multi-latent-attention": layer_pattern.LATENT_ATTENTION + layer_pattern.SPARSE_ATTENTION,
    "--mtp-num-layers": layer_pattern.PREDICTION_HEADS,
}
_PATTERN_FLAGS = ("--hybrid-layer-pattern", "--hybrid-override-pattern")
_HYBRID_DO = "What fits: * for attention, - for an MLP, E for experts, and M and G with the flag."


def _of_symbols(pattern: Any, lookup: limits.Lookup) -> str:
    """Return why a pattern cannot be combined with windows, symbol by symbol."""
    if not limits.is_given(pattern):
        return ""
    answered = layer_pattern.RECURRENT if lookup(RECURRENT_STATE) else ""
    symbols = (symbol for symbol in _SYMBOLS if symbol in pattern and symbol not in answered)
    reasons = [_SYMBOLS[symbol] for symbol in symbols]
    if layer_pattern.ATTENTION not in layer_pattern.layers(pattern):
        reasons.append("it has no attention (*) whose window could grow")
    return "; ".join(reasons)


def _of_symbols_once(pattern: Any, lookup: limits.Lookup) -> str:
    """The same, unless the old flag was given, of which Megatron makes the new one."""
    return "" if lookup("hybrid_override_pattern") else _of_symbols(pattern, lookup)


def _parts_heads_from_batch(value: Any, lookup: limits.Lookup) -> str:
    """Return why heads of multi-token prediction do not know the fragments; nothing without."""
    if not (limits.is_given(value) and limits.is_above_zero(lookup("mtp_num_layers"))):
        return ""
    return (
        "with --mtp-num-layers, whose heads would run apart from the batch whose fragments they "
        "have to keep to"
    )


def _weighs_heads_by_part(value: Any, lookup: limits.Lookup) -> str:
    """Return why the loss of such a head would depend on the layout; nothing where it does not."""
    heads = limits.is_above_zero(lookup("mtp_num_layers"))
    per_token = limits.is_given(lookup("calculate_per_token_loss"))
    parts = limits.is_above_one(lookup("context_parallel_size"))
    if not (limits.is_given(value) and heads and per_token and parts):
        return ""
    return (
        "with --mtp-num-layers, --context-parallel-size and --calculate-per-token-loss, where "
        "Megatron weighs each rank's part of a head's loss by the part's own count of tokens"
    )


def _packing(flag: str) -> FlagRule:
    return FlagRule(flag, Effect.CHANGES_MASKS, _PACKS, _USE_DOCUMENTS, entry_point_always=True)


_REFERENCE = ("skyladder_init", "reference")
_MEGATRONS_STD = 0.02


def _draws(flag: str, **more: Any) -> FlagRule:
    return FlagRule(
        flag,
        Effect.REFUSED,
        "--skyladder-init reference says how weights are drawn, too",
        "Give only one of them.",
        only_with=_REFERENCE,
        **more,
    )


def _other_std(value: Any) -> bool:
    """Return whether a std is given and is not Megatron's; text that is no number is not ours."""
    try:
        return value is not None and float(value) != _MEGATRONS_STD
    except (TypeError, ValueError):
        return False


RULES = (
    *limits.RULES,
    # --- sequences or masks that are not those of a plain pretraining run ---
    FlagRule(
        "--sft",
        Effect.CHANGES_MASKS,
        "it packs conversations into sequences itself",
        entry_point_always=True,
    ),
    FlagRule(
        "--fim-data",
        Effect.CHANGES_MASKS,
        "it reorders the tokens of a document",
        entry_point_always=True,
    ),
    FlagRule(
        "--dataloader-inter-document-masking",
        Effect.CHANGES_MASKS,
        "it is Megatron's own mask of documents",
        _USE_DOCUMENTS,
        entry_point_always=True,
    ),
    FlagRule(
        "--reset-attention-mask",
        Effect.CHANGES_MASKS,
        "it is Megatron's dense mask of documents",
        _USE_DOCUMENTS,
    ),
    _packing("--hybrid-context-parallel"),
    _packing("--dynamic-context-parallel"),
    _packing("--sequence-packing-scheduler"),
    _packing("--max-seqlen-per-dp-cp-rank"),
    _packing("--use-varlen-dataset"),
    FlagRule(
        "--cp-partition-mode",
        Effect.CHANGES_MASKS,
        "it gives context-parallel ranks other tokens than SkyLadder expects",
        "Drop --cp-partition-mode.",
        when=other_than("zigzag"),
        default="zigzag",
    ),
    # --- models and trainers whose attention is not the one that SkyLadder replaces ---
    FlagRule(
        "--overlap-moe-expert-parallel-comm",
        Effect.REFUSED,
        "with heads of multi-token prediction",
        "Drop one of the two.",
        explain=_parts_heads_from_batch,
    ),
    FlagRule(
        "--eod-mask-loss",
        Effect.REFUSED,
        "with heads of multi-token prediction, and losses per token of parts of sequences",
        "Drop --calculate-per-token-loss.",
        explain=_weighs_heads_by_part,
    ),
    FlagRule(
        "--mtp-num-layers",
        Effect.HARMLESS,
        "adds heads under the same window and documents; none is shown a token beyond a fragment",
    ),
    FlagRule(
        "--multi-latent-attention",
        Effect.HARMLESS,
        "has keys that are wider than values, which the kernels take or get padded",
    ),
    FlagRule(
        "--cache-mla-latents",
        Effect.REFUSED,
        "it is for generating text, which needs a model without windows",
        "Drop --cache-mla-latents.",
    ),
    FlagRule(
        "--experimental-attention-variant",
        Effect.CHANGES_MASKS,
        "its layers choose what they see themselves",
        not_counted=True,
    ),
    FlagRule(
        "--hybrid-layer-pattern",
        Effect.REFUSED,
        f"some symbols cannot: {'; '.join(_SYMBOLS.values())}",
        _HYBRID_DO,
        explain=_of_symbols_once,
    ),
    FlagRule(
        "--hybrid-override-pattern",
        Effect.REFUSED,
        "it is the old name of --hybrid-layer-pattern, and the same holds",
        _HYBRID_DO,
        explain=_of_symbols,
    ),
    FlagRule(
        "--use-legacy-models",
        Effect.CHANGES_MASKS,
        "it builds models that do not come from megatron.core",
        "Drop --use-legacy-models.",
        not_counted=True,
        entry_point_always=True,
    ),
    FlagRule(
        "--yaml-cfg",
        Effect.REFUSED,
        "Megatron then reads no flag from the command line, SkyLadder's included",
        "Give the settings as flags.",
        not_counted=True,
    ),
    FlagRule(
        "--perform-rl-step",
        Effect.REFUSED,
        "its rollouts generate text, which needs a model without windows",
    ),
    FlagRule(
        "--inprocess-restart",
        Effect.REFUSED,
        "what it restarts within the process would go on with process groups that are gone",
        "Drop it: the launcher restarts the job, which goes on at its last checkpoint.",
    ),
    # --- weights drawn in two ways ---
    _draws("--init-method-std", when=_other_std, default=_MEGATRONS_STD),
    _draws("--embedding-init-method-std", when=_other_std),
    _draws("--init-method-xavier-uniform"),
    _draws("--use-mup"),
    # --- accepted, with something to know ---
    FlagRule(
        "--rampup-batch-size",
        Effect.NOTED,
        "is ignored by Megatron 0.18 and later, whose batch does not grow, and by skyladder plan; "
        "earlier ones let it grow, and the window follows the samples: a step of its schedule is "
        "--global-batch-size of them",
        'From 0.18 on use --step-batch-size-schedule "0:SAMPLES TOKENS:SAMPLES ...", without '
        "--global-batch-size.",
    ),
    FlagRule(
        "--logits-load-dir",
        Effect.NOTED,
        "takes the loss from a teacher's logits",
        "That needs Megatron's own script, patched (skyladder patch apply DIR).",
        entry_point_always=True,
    ),
    FlagRule(
        "--logits-save-dir",
        Effect.NOTED,
        "saves what the model says from within the window of each step, not from whole sequences",
        "For a student of whole sequences, save without --skyladder-*.",
    ),
    FlagRule(
        "--fp8-format",
        Effect.NOTED,
        "runs the linear layers in FP8; SkyLadder's attention stays in 16 bits",
        attribute="fp8",
    ),
    FlagRule(
        "--fp4-format",
        Effect.NOTED,
        "runs the linear layers in FP4; SkyLadder's attention stays in 16 bits",
        attribute="fp4",
    ),
    FlagRule(
        "--heterogeneous-layers-config-path",
        Effect.NOTED,
        "gives layers that differ: plan cannot count them",
        not_counted=True,
    ),
    FlagRule(
        "--attention-backend",
        Effect.NOTED,
        "chooses among Transformer Engine's kernels, which only SkyLadder's backend te runs",
        "SkyLadder's own choice is --skyladder-attention-backend.",
        when=other_than("auto"),
        default="auto",
    ),
    # --- accepted, and nothing to do ---
    FlagRule(
        "--cp-comm-type",
        Effect.HARMLESS,
        "has no effect: the exchange between context-parallel ranks is SkyLadder's own",
        when=other_than("p2p"),
        default="p2p",
    ),
    FlagRule(
        "--window-attn-skip-freq",
        Effect.HARMLESS,
        "has no effect without --window-size, and says with it which layers are local",
        explain=lambda value, lookup: (
            "has no effect without --window-size"
            if limits.is_given(value) and not limits.is_given(lookup("window_size"))
            else ""
        ),
    ),
    FlagRule(
        "--apply-query-key-layer-scaling",
        Effect.HARMLESS,
        "divides logits and multiplies them again: the result is the same without it",
    ),
    FlagRule(
        "--optimizer-cuda-graph",
        Effect.HARMLESS,
        "captures the optimizer alone, which has no window",
    ),
    *(
        FlagRule(
            flag,
            Effect.HARMLESS,
            "leaves attention out of the CUDA graphs, so that windows may grow",
            when=limits.leaves_attention_out,
        )
        for flag in ("--cuda-graph-modules", "--cuda-graph-scope")
    ),
    FlagRule(
        "--num-experts",
        Effect.HARMLESS,
        "adds experts behind attention, which alone has windows",
    ),
    FlagRule(
        "--moe-expert-capacity-factor",
        Effect.NOTED,
        "drops tokens among those that a rank holds, so another context-parallel layout drops "
        "other ones",
        "Megatron's shards are --skyladder-context-parallel-layout zigzag.",
        when=limits.is_above_zero,
    ),
    FlagRule(
        "--moe-pad-expert-input-to-capacity",
        Effect.HARMLESS,
        "pads what experts get behind attention, as without SkyLadder",
    ),
    FlagRule(
        "--moe-token-drop-policy",
        Effect.HARMLESS,
        "goes by the order in which a rank holds its tokens, which is ascending in every layout",
        when=other_than("probs"),
        default="probs",
    ),
    FlagRule(
        "--moe-input-jitter-eps",
        Effect.HARMLESS,
        "draws the same noise as without SkyLadder, which draws none",
        when=limits.is_above_zero,
    ),
    FlagRule(
        "--tp-comm-overlap",
        Effect.HARMLESS,
        "overlaps the linear layers' communication, whose sizes no window changes",
    ),
    FlagRule(
        "--use-megatron-fsdp",
        Effect.HARMLESS,
        "shards parameters; attention has none but a learnable sink, sharded like others",
    ),
    FlagRule(
        "--use-torch-fsdp2",
        Effect.NOTED,
        "was never run with SkyLadder: the CPU engine cannot shard for it",
        "Compare the first steps with --use-megatron-fsdp or --use-distributed-optimizer.",
    ),
    FlagRule(
        "--fp8-recipe",
        Effect.HARMLESS,
        "is about the linear layers, MXFP8 too: attention stays in 16 bits",
        when=other_than("delayed"),
        default="delayed",
    ),
    FlagRule(
        "--reset-position-ids",
        Effect.HARMLESS,
        "is honoured as without SkyLadder",
    ),
)


def given_values(words: Sequence[str]) -> dict[str, Any]:
    """Return the flags of a launch that are in the table, by their names in Megatron's arguments.

    What Megatron's own parser would make of them is not needed: a rule takes text as well.

    Args:
        words: of a command line, ours and what does not belong to Megatron included.
    """
    names = {rule.flag: rule.name for rule in RULES}
    ours = {rule.only_with[0] for rule in RULES if rule.only_with}
    others = (*ours, RECURRENT_STATE, *_LOOKED_UP)
    names |= {f"--{name.replace('_', '-')}": name for name in others}
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
    found = list(limits.find(RULES, settings))
    patterns = [str(each.value) for each in found if each.rule.flag in _PATTERN_FLAGS]
    for finding in found:  # a flag that nobody gave is not named: its symbol is
        if not set(_SET_BY_SYMBOLS.get(finding.rule.flag, "")) & set("".join(patterns)):
            yield finding


def check(options: Any) -> None:
    """Refuse what cannot be combined with SkyLadder; log what has to be known.

    Args:
        options: Megatron's arguments, parsed.

    Raises:
        UsageError: all rules that stop training and are met, one on a line.
    """
    found = list(findings(options))
    limits.refuse(found)
    for finding in found:
        if finding.rule.effect is Effect.NOTED:
            logger.warning("%s", finding, extra=SAME_ON_ALL_RANKS)


def check_arrival(options: Any, words: Sequence[str]) -> None:
    """Refuse a run whose SkyLadder flags did not arrive: it would be stock Megatron's, silently.

    Args:
        options: Megatron's arguments, parsed.
        words: of the command line.

    Raises:
        UsageError: they hold ``--skyladder-*`` flags, and the arguments have no such names.
    """
    given = [word.partition("=")[0] for word in words if word.startswith("--skyladder-")]
    lost = [flag for flag in given if not hasattr(options, flag[2:].replace("-", "_"))]
    if lost:
        reasons = [str(each) for each in findings(options) if each.rule.effect.stops]
        why = " ".join(reasons) or "Something else made these arguments."
        raise UsageError(f"{lost[0]} is not among the arguments that Megatron has read. {why}")


def check_entry_point(options: Any) -> None:
    """Refuse, with SkyLadder or without, what only Megatron's own script acts on.

    Raises:
        UsageError: all such flags, one on a line.
    """
    lines = []
    for finding in limits.find((rule for rule in RULES if rule.entry_point_always), options):
        stops, flag = finding.rule.effect.stops, finding.rule.flag
        also = "without SkyLadder" if stops else "patched for SkyLadder (skyladder patch apply DIR)"
        lines.append(
            f"{flag} has no effect in megatron_skyladder.pretrain_gpt: only Megatron's own "
            f"pretrain_gpt.py acts on it. Run that script of a checkout, {also}. Otherwise: "
            f"{finding.rule.do if stops and finding.rule.do else f'Drop {flag}.'}"
        )
    if lines:
        raise UsageError("\n".join(lines))
