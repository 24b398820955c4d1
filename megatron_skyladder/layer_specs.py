"""How the attention module enters a model: through Megatron's layer specs.

A layer spec is a tree of dataclasses that names the class of every part. `with_skyladder` returns a
copy in which each self-attention's ``core_attention`` is ours and everything else is as it was.

Megatron's ``--spec megatron_skyladder.layer_specs skyladder`` takes the spec from here, in any
script that has the flag; see `from_environment` for the settings.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from megatron_skyladder.attention.core_attention import SkyLadderAttention

SPEC_NAME = "skyladder"
# Megatron's import_module looks into vars() of this module and calls no __getattr__; but where a
# module has a __path__, Python's own import of a name from it does so first.
__path__: list[str] = []


def __getattr__(name: str) -> Any:
    """Make the spec for ``--spec`` when Megatron asks for it: then its arguments are known."""
    if name != SPEC_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    spec = globals()[SPEC_NAME] = _spec_from_environment()
    return spec


def with_skyladder(spec: Any) -> Any:
    """Return a copy of a layer or block spec with SkyLadder's core attention.

    Args:
        spec: what Megatron's ``get_gpt_layer_*_spec`` functions return, or a function that
            returns such a spec when called as Megatron's model builder does.

    Raises:
        ValueError: the spec has no core attention to replace.
    """
    if not dataclasses.is_dataclass(spec) and callable(spec):

        @functools.wraps(spec)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return with_skyladder(spec(*args, **kwargs))

        return wrapped
    replaced, count = _replace(spec)
    if count == 0:
        raise ValueError(
            f"no core_attention was found in the layer spec {spec!r}, so SkyLadder cannot be "
            "applied. Use a spec of Megatron's GPT layers (local or Transformer Engine)."
        )
    return replaced


def gpt_layer_spec(options: Any, config: Any, vp_stage: int | None = None) -> Any:
    """Return the spec of a stock GPT's layers, as Megatron's own builders choose it.

    Args:
        options: Megatron's arguments.
        config: the TransformerConfig made of them.
        vp_stage: the virtual pipeline stage, where there are several.

    Returns:
        One layer's spec for a dense model, this stage's block of specs for a mixture of experts.

    Raises:
        ValueError: the arguments ask for a kind of layers that is not built here.
    """
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer.spec_utils import import_module

    if options.spec is not None:
        return import_module(options.spec)
    for flag in ("heterogeneous_layers_config_path", "experimental_attention_variant"):
        if getattr(options, flag, None):
            raise ValueError(
                f"--{flag.replace('_', '-')} is not built by SkyLadder's entry point on this "
                "release of Megatron. Patch your checkout instead (skyladder patch apply)."
            )
    build = gpt_layer_specs.get_gpt_decoder_layer_specs
    if options.num_experts:
        build = gpt_layer_specs.get_gpt_decoder_block_spec
    spec = build(
        config,
        use_transformer_engine=options.transformer_impl == "transformer_engine",
        normalization=options.normalization,
        qk_l2_norm=options.qk_l2_norm,
        vp_stage=vp_stage,
    )
    return spec if options.num_experts else spec[0]


def _spec_from_environment() -> Any:
    """Return the spec for ``--spec``, and switch SkyLadder on.

    Raises:
        ValueError: what the environment says, or a model whose layers differ from each other.
    """
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args

    from megatron_skyladder.megatron_lm import from_environment

    options = get_args()
    if options.num_experts:  # Megatron wants one stage's block here, and does not say which
        raise ValueError(
            "--spec megatron_skyladder.layer_specs builds dense models, not --num-experts="
            f"{options.num_experts}. Patch the checkout instead (skyladder patch apply DIR)."
        )
    from_environment.switch_on(options)
    dense = copy.copy(options)
    dense.spec = None
    return gpt_layer_spec(dense, core_transformer_config_from_args(options))


def _replace(node: Any) -> tuple[Any, int]:
    """Return a copy of ``node`` with core attentions replaced, and how many there were."""
    if isinstance(node, (list, tuple)):
        return _replace_in(node, list(enumerate(node)), lambda parts: type(node)(parts.values()))
    if isinstance(node, dict):
        return _replace_in(node, list(node.items()), dict)
    if isinstance(node, functools.partial):
        keywords, count = _replace(node.keywords)
        return (functools.partial(node.func, *node.args, **keywords) if count else node), count
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        names = [field.name for field in dataclasses.fields(node)]
        return _replace_in(
            node, [(name, getattr(node, name)) for name in names], lambda parts: _copy(node, parts)
        )
    return node, 0


def _replace_in(
    node: Any, items: list[tuple[Any, Any]], rebuild: Callable[[dict[Any, Any]], Any]
) -> tuple[Any, int]:
    parts: dict[Any, Any] = {}
    total = 0
    for name, part in items:
        if name == "core_attention":
            parts[name], count = SkyLadderAttention, 1
        else:
            parts[name], count = _replace(part)
        total += count
    return (rebuild(parts) if total else node), total


def _copy(node: Any, parts: dict[str, Any]) -> Any:
    duplicate = copy.copy(node)
    for name, part in parts.items():
        setattr(duplicate, name, part)
    return duplicate
