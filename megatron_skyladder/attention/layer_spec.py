"""How the attention module enters a model: through Megatron's layer specs.

A layer spec is a tree of dataclasses that names the class of every part. `with_skyladder` returns a
copy in which each self-attention's ``core_attention`` is ours and everything else is as it was.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from megatron_skyladder.attention.core_attention import SkyLadderAttention
from megatron_skyladder.errors import UsageError


def with_skyladder(spec: Any) -> Any:
    """Return a copy of a layer or block spec with SkyLadder's core attention.

    Args:
        spec: what Megatron's ``get_gpt_layer_*_spec`` functions return, or a function that
            returns such a spec when called as Megatron's model builder does.

    Raises:
        UsageError: the spec has no core attention to replace.
    """
    if not dataclasses.is_dataclass(spec) and callable(spec):

        @functools.wraps(spec)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return with_skyladder(spec(*args, **kwargs))

        return wrapped
    replaced, found = _replace(spec)
    if not found:
        raise UsageError(
            f"no core_attention was found in the layer spec {spec!r}, so SkyLadder cannot be "
            "applied. Use a spec of Megatron's GPT layers (local or Transformer Engine)."
        )
    return replaced


def core_attentions(spec: Any) -> list[Any]:
    """Return every ``core_attention`` in a layer or block spec, as it stands there."""
    return _replace(spec)[1]


def _replace(node: Any) -> tuple[Any, list[Any]]:
    """Return a copy of ``node`` with core attentions replaced, and those that were replaced."""
    if isinstance(node, (list, tuple)):
        return _replace_in(node, list(enumerate(node)), lambda parts: type(node)(parts.values()))
    if isinstance(node, dict):
        return _replace_in(node, list(node.items()), dict)
    if isinstance(node, functools.partial):
        keywords, found = _replace(node.keywords)
        return (functools.partial(node.func, *node.args, **keywords) if found else node), found
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        names = [field.name for field in dataclasses.fields(node)]
        return _replace_in(
            node, [(name, getattr(node, name)) for name in names], lambda parts: _copy(node, parts)
        )
    return node, []


def _replace_in(
    node: Any, items: list[tuple[Any, Any]], rebuild: Callable[[dict[Any, Any]], Any]
) -> tuple[Any, list[Any]]:
    parts: dict[Any, Any] = {}
    found: list[Any] = []
    for name, part in items:
        if name == "core_attention":
            parts[name], inside = SkyLadderAttention, [part]
        else:
            parts[name], inside = _replace(part)
        found += inside
    return (rebuild(parts) if found else node), found


def _copy(node: Any, parts: dict[str, Any]) -> Any:
    duplicate = copy.copy(node)
    for name, part in parts.items():
        setattr(duplicate, name, part)
    return duplicate
