"""Layers with a sliding window of their own, between layers that see all that the ladder shows.

Megatron's ``--window-size L,0`` lets a query see L tokens before itself, hence L + 1 with itself;
``--window-attn-skip-freq`` says which layers that holds for. Such a *local* layer keeps its window
under the ladder: it sees what is in the ladder's window and in its own. The others, *global*
layers, climb the ladder:

    ladder's window of 4, own window of 2 (--window-size 1,0), sequence of 8; keys that are seen

    query            0  1  2  3  4  5  6  7
    global layer     0  0  0  0  4  4  4  4   up to itself
    local layer      0  0  1  2  4  4  5  6   the same, but two of them at most

Standard library only; Megatron's arguments come as they are parsed, or as text.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder import layer_pattern

_MAX_LAYERS = 10_000  # nobody has more, and a list is multiplied out


@dataclass(frozen=True)
class LocalLayers:
    """The local layers among those with attention.

    Args:
        window: tokens that a query of a local layer sees at most, itself included.
        num_local: layers that have it, at least one.
        num_layers: layers with attention, local or not.
    """

    window: int
    num_local: int
    num_layers: int

    def mean(self, of_global: Any, of_local: Any) -> Any:
        """Return the mean over all layers with attention of a number that the two kinds have."""
        num_global = self.num_layers - self.num_local
        return (num_global * of_global + self.num_local * of_local) / self.num_layers


def trouble_with(window_size: Any) -> str:
    """Return why Megatron's ``--window-size`` is none of a causal local layer; empty where it is.

    Args:
        window_size: (left, right), or text such as ``128,0``; None or empty: not given.
    """
    if window_size in (None, "", ()):
        return ""
    try:
        left, right = _pair(window_size)
    except ValueError:
        return "it takes two whole numbers, such as 128,0"
    if right:
        return "a token would see what comes after it, and attention is causal"
    if left < 0:
        return "-1 tokens are the whole sequence, which the ladder leads to anyway"
    return ""


def layer_settings(settings: Any) -> tuple[Any, Any]:
    """Return ``window_size`` and ``window_attn_skip_freq``; None where a release has them not."""
    names = "window_size", "window_attn_skip_freq"
    window_size, skip_freq = (getattr(settings, name, None) for name in names)
    return window_size, skip_freq


def own_window(window_size: Any, skip_freq: Any, layer_number: int) -> int | None:
    """Return the tokens that a query of this layer sees at most, itself included; None: any number.

    Megatron's rule (``is_layer_window_attention``), restated for releases and machines without it.

    Args:
        window_size: Megatron's ``window_size``, one that `trouble_with` accepts.
        skip_freq: its ``window_attn_skip_freq``: None: every layer is local; N: every N-th is
            global; a list: 1 for each layer that is local and 0 for each that is global.
        layer_number: Megatron's, from 1.

    Raises:
        UsageError: ``skip_freq`` has no meaning.
    """
    if window_size in (None, "", ()):
        return None
    left, _ = _pair(window_size)
    rule = _frequency(skip_freq)
    if isinstance(rule, int):
        is_local = layer_number % rule != 0
    elif rule is None:
        is_local = True
    elif layer_number <= len(rule):
        is_local = bool(rule[layer_number - 1])
    else:
        raise UsageError(
            f"--window-attn-skip-freq={skip_freq} says for {len(rule)} layers whether they are "
            f"local, and there is a layer {layer_number}. Give as many entries as layers, such as "
            "[1,1,1,1,1,0]*4, or a number."
        )
    return left + 1 if is_local else None


def local_layers(settings: Any) -> LocalLayers | None:
    """Return the local layers of a model; None where it has none, or how many is not known.

    Args:
        settings: Megatron's arguments, parsed or as text: ``window_size``,
            ``window_attn_skip_freq``, and ``num_layers`` or a hybrid model's pattern.

    Raises:
        UsageError: a setting has no meaning.
    """
    window_size, skip_freq = layer_settings(settings)
    numbers = _attention_layers(settings)
    if not numbers or window_size in (None, "", ()) or trouble_with(window_size):
        return None  # trouble is the table of flags' to tell
    windows = [own_window(window_size, skip_freq, number) for number in numbers]
    local = [window for window in windows if window is not None]
    return LocalLayers(local[0], len(local), len(windows)) if local else None


def _attention_layers(settings: Any) -> Sequence[int]:
    """Return the numbers of the layers with attention, from 1."""
    for name in ("hybrid_layer_pattern", "hybrid_override_pattern"):
        if pattern := getattr(settings, name, None):
            symbols = layer_pattern.layers(str(pattern))
            return [i + 1 for i, each in enumerate(symbols) if each == layer_pattern.ATTENTION]
    return range(1, 1 + int(getattr(settings, "num_layers", None) or 0))


def _pair(window_size: Any) -> tuple[int, int]:
    parts = window_size
    if isinstance(window_size, str):
        parts = window_size.strip("() ").split(",")
    left, right = (int(part) for part in parts)
    return left, right


def _frequency(skip_freq: Any) -> int | list[int] | None:
    if isinstance(skip_freq, str):
        try:
            skip_freq = layer_list(skip_freq)
        except ValueError:
            skip_freq = 0
    if isinstance(skip_freq, (list, tuple)):
        return list(skip_freq)
    if skip_freq is not None and (not isinstance(skip_freq, int) or skip_freq < 1):
        raise UsageError(
            f"--window-attn-skip-freq={skip_freq} is neither a number of layers above 0 nor a list "
            "such as [1,1,1,1,1,0]*4."
        )
    return skip_freq


def layer_list(text: str) -> int | list[int]:
    """Read what Megatron takes where layers differ: 6, or lists of 0 and 1 under + and *.

    Raises:
        ValueError: anything else.
    """
    try:
        found = _evaluated(ast.parse(text.strip(), mode="eval").body)
    except SyntaxError:
        raise ValueError("not a list of layers") from None
    assert isinstance(found, (int, list))
    return found


def _evaluated(node: ast.AST) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.List):
        values = [_evaluated(element) for element in node.elts]
        if all(value in (0, 1) for value in values):
            return values
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mult):
        left, right = _evaluated(node.left), _evaluated(node.right)
        if isinstance(node.op, ast.Add) and type(left) is type(right) is list:
            return left + right
        if isinstance(node.op, ast.Mult) and {type(left), type(right)} == {list, int}:
            values, times = (left, right) if isinstance(left, list) else (right, left)
            if len(values) * times <= _MAX_LAYERS:
                return values * times
    raise ValueError("not a list of layers")
