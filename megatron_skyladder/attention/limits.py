"""What the attention cannot do, in the words of Megatron's flags; the shape of every such rule.

Standard library only. `megatron_lm.flag_rules` adds what a launch may not ask for; both are one
table to training, ``doctor``, ``plan`` and ``slurm``. What stands here is asked of a model's
configuration as well, because models are also built without a command line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder import local_layers

_NOTHING = ("", "none", "null", "false", "no", "off", "0")  # as text, on a command line or in YAML


class Effect(Enum):
    """What a flag means for a run with SkyLadder."""

    REFUSED = "refused: it asks for what SkyLadder cannot do"
    NEEDS_CHANGE = "needs another value"
    CHANGES_MASKS = "refused: it lays out sequences or masks itself, so ours would not be applied"
    NOTED = "accepted, with something to know"
    HARMLESS = "accepted, and means the same as without SkyLadder"

    @property
    def stops(self) -> bool:
        """Whether training does not start."""
        return self in (Effect.REFUSED, Effect.NEEDS_CHANGE, Effect.CHANGES_MASKS)


Lookup = Callable[..., Any]  # (name, default=None): a value by its name in Megatron's arguments


def is_given(value: Any) -> bool:
    """Return whether a value asks for something, as parsed by Megatron or as text."""
    if isinstance(value, str):
        return value.strip().lower() not in _NOTHING
    return bool(value)


def is_above_zero(value: Any) -> bool:
    """Return whether a rate is on; text that is no number is left to Megatron's own parser."""
    try:
        return float(value or 0) > 0
    except (TypeError, ValueError):
        return False


def is_above_one(value: Any) -> bool:
    """Return whether a size is more than one; text that is no number is left to Megatron."""
    try:
        return int(value or 1) > 1
    except (TypeError, ValueError):
        return False


def other_than(name: str) -> Callable[[Any], bool]:
    """Return a test for a choice, or a list of choices, that is not just this one."""

    def differs(value: Any) -> bool:
        parts = value if isinstance(value, (list, tuple)) else [value]
        return any(is_given(part) and getattr(part, "name", part) != name for part in parts)

    return differs


@dataclass(frozen=True)
class FlagRule:
    """One row of the table.

    Args:
        flag: as on Megatron's command line.
        effect: what it means for a run with SkyLadder.
        why: the reason, as the second half of a sentence.
        do: what to do instead, as a sentence; empty where nothing is to be done.
        set_to: the flag with the value that fits, where another value does.
        when: the values that it is about.
        default: Megatron's value where the flag is not given.
        attribute: its name in Megatron's arguments, where it is not the flag's.
        of_model: whether the attention asks a model's configuration too.
        not_counted: whether the model or its work is one that ``plan`` cannot count.
        only_with: a name and a value that the run has to have as well, such as a flag of ours.
        entry_point_always: whether our entry point refuses it without SkyLadder as well, because
            only Megatron's own script reads it.
        explain: in place of ``when`` and ``why``, where both depend on the value or on other
            flags: returns the reason, or nothing where the rule is not met.
    """

    flag: str
    effect: Effect
    why: str
    do: str = ""
    set_to: str = ""
    when: Callable[[Any], bool] = is_given
    default: Any = None
    attribute: str = ""
    of_model: bool = False
    not_counted: bool = False
    only_with: tuple[str, str] | None = None
    entry_point_always: bool = False
    explain: Callable[[Any, Lookup], str] | None = None

    @property
    def name(self) -> str:
        """Its name in Megatron's arguments and configurations."""
        return self.attribute or self.flag.removeprefix("--").replace("-", "_")

    @property
    def advice(self) -> str:
        """What to do, as a sentence; empty where nothing is to be done."""
        return self.do or (f"Set {self.set_to}." if self.set_to else "")


@dataclass(frozen=True)
class Finding:
    """A rule that a run meets.

    Args:
        rule: the row of the table.
        value: what the run has.
        why: the reason, as the second half of a sentence.
    """

    rule: FlagRule
    value: Any
    why: str

    def __str__(self) -> str:
        """Return what was given, why it matters, and what to do."""
        head = "cannot be combined with SkyLadder: " if self.rule.effect.stops else ""
        return f"{self.given} {head}{self.why}. {self.rule.advice}".rstrip()

    @property
    def given(self) -> str:
        """The flag with its value."""
        if self.value is True:
            return self.rule.flag
        value = self.value
        if isinstance(value, (list, tuple)):
            value = ",".join(str(part) for part in value)
        default = " (Megatron's default)" if value == self.rule.default else ""
        return f"{self.rule.flag}={getattr(value, 'name', value)}{default}"


def find(rules: Iterable[FlagRule], settings: Any) -> Iterator[Finding]:
    """Yield the rules that a run meets.

    Args:
        rules: rows of the table.
        settings: Megatron's arguments or a TransformerConfig, or a mapping; what it lacks has
            Megatron's default only where that is a mapping of the flags that were given.
    """

    def value_of(name: str, default: Any = None) -> Any:
        if isinstance(settings, Mapping):
            return settings.get(name, default)
        return getattr(settings, name, None)

    for rule in rules:
        value = value_of(rule.name, rule.default)
        applies = rule.only_with is None or value_of(rule.only_with[0], None) == rule.only_with[1]
        if not applies:
            continue
        if rule.explain is None:
            why = rule.why if rule.when(value) else ""
        else:
            why = rule.explain(value, value_of)
        if why:
            yield Finding(rule, value, why)


def refuse(findings: Iterable[Finding]) -> None:
    """Raise what stops training, all of it at once.

    Raises:
        UsageError: at least one of them does.
    """
    lines = [str(finding) for finding in findings if finding.rule.effect.stops]
    if lines:
        raise UsageError("\n".join(dict.fromkeys(lines)))


_IN_16_BITS = "its attention runs in 16 bits"
_NO_GRAPH = "a CUDA graph of attention would replay the window that it was captured with"
_NO_GRAPH_DO = (
    "Name modules without attention, such as --cuda-graph-modules mlp (--cuda-graph-scope up to "
    "0.17), or drop --cuda-graph-impl (or --enable-cuda-graph, --external-cuda-graph)."
)
# Megatron's settings for the same thing, by release; the last while its arguments are parsed
GRAPHED_MODULES = ("cuda_graph_modules", "cuda_graph_scope", "cuda_graph_scope_deprecated")
_WITHOUT_ATTENTION = {"mlp", "moe", "moe_router", "moe_preprocess", "mamba"}


def leaves_attention_out(modules: Any) -> bool:
    """Return whether CUDA graphs of these modules have no attention in them.

    Args:
        modules: Megatron's list of names or of its enumeration, or text; empty is the whole layer.
    """
    parts = modules if isinstance(modules, (list, tuple)) else [modules]
    names = [
        name for part in parts for name in re.split(r"[\s,]+", getattr(part, "name", str(part)))
    ]
    return bool(is_given(modules)) and set(filter(None, names)) <= _WITHOUT_ATTENTION


def _graphs_attention(asks: Callable[[Any], bool]) -> Callable[[Any, Lookup], str]:
    """Return the `FlagRule.explain` of a flag that asks for graphs where ``asks`` holds."""

    def explain(value: Any, setting: Lookup) -> str:
        left_out = any(leaves_attention_out(setting(name)) for name in GRAPHED_MODULES)
        return _NO_GRAPH if asks(value) and not left_out else ""

    return explain


RULES = (
    FlagRule(
        "--attention-dropout",
        Effect.NEEDS_CHANGE,
        "its kernels have no dropout",
        set_to="--attention-dropout 0",
        when=is_above_zero,
        default=0.1,
        of_model=True,
    ),
    FlagRule(
        "--window-size",
        Effect.REFUSED,
        "local layers see so many tokens before themselves, whole numbers, and none after them "
        "(L,0 with L of 0 or more is accepted)",
        "Give --window-size L,0, or drop it: SkyLadder sets the window of the other layers.",
        of_model=True,
        explain=lambda value, _: local_layers.trouble_with(value),
    ),
    FlagRule(
        "--softmax-type",
        Effect.NOTED,
        "attends with a sink, which te, fa4, flash, varlen and sdpa have, each on some devices; "
        "sdpa has it without a fused kernel",
        when=other_than("vanilla"),
        default="vanilla",
    ),
    FlagRule(
        "--qk-clip",
        Effect.REFUSED,
        "clipping needs an attention that reports its largest logit",
        "Drop --qk-clip.",
        of_model=True,
    ),
    FlagRule(
        "--log-max-attention-logit",
        Effect.REFUSED,
        "Megatron's own attention would have to report it",
        "Use --skyladder-attention-stats-interval instead.",
        of_model=True,
    ),
    FlagRule(
        "--fp8-dot-product-attention",
        Effect.REFUSED,
        _IN_16_BITS,
        "Drop it; --fp8-format for the linear layers can stay.",
        of_model=True,
    ),
    FlagRule(
        "--fp8-multi-head-attention",
        Effect.REFUSED,
        _IN_16_BITS,
        "Drop it; --fp8-format for the linear layers can stay.",
        of_model=True,
    ),
    FlagRule(
        "--use-kitchen-attention",
        Effect.REFUSED,
        "its attention takes the place of Kitchen's",
        "Drop --use-kitchen-attention.",
        of_model=True,
    ),
    FlagRule(
        "--cuda-graph-impl",
        Effect.REFUSED,
        _NO_GRAPH,
        _NO_GRAPH_DO,
        of_model=True,
        explain=_graphs_attention(other_than("none")),
    ),
    *(
        FlagRule(
            flag,
            Effect.REFUSED,
            _NO_GRAPH,
            _NO_GRAPH_DO,
            of_model=True,
            explain=_graphs_attention(is_given),
        )
        for flag in ("--enable-cuda-graph", "--external-cuda-graph")
    ),
)


def check_model(config: Any, attention_dropout: float | None = None) -> None:
    """Refuse what the attention of a model cannot do.

    Args:
        config: Megatron's TransformerConfig.
        attention_dropout: of one layer, in place of the configuration's.

    Raises:
        UsageError: it asks for what a rule of the model refuses.
    """
    names = [rule.name for rule in RULES if rule.of_model]
    values = {name: getattr(config, name, None) for name in (*names, *GRAPHED_MODULES)}
    if attention_dropout is not None:
        values["attention_dropout"] = attention_dropout
    refuse(find((rule for rule in RULES if rule.of_model), values))
