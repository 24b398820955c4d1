"""SkyLadder's attention in the layers of a provider, under Bridge's own names."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from megatron_skyladder.attention.layer_spec import core_attentions, with_skyladder
from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder import clock
from megatron_skyladder.megatron_bridge.console import show_warnings
from megatron_skyladder.megatron_bridge.spelling import translated
from megatron_skyladder.runtime.weights import draw_as_reference

_REPLACED = (  # by module and name: neither Transformer Engine nor its classes need be there
    "megatron.core.transformer.dot_product_attention.DotProductAttention",
    "megatron.core.extensions.transformer_engine.TEDotProductAttention",
)


def with_ladder(spec: Callable[..., Any]) -> Callable[..., Any]:
    """Return a provider's ``transformer_layer_spec`` with SkyLadder's core attention.

    ``functools.wraps`` is no decoration here: Bridge writes the function into run_config.yaml by
    its module and name, and export and inference then build stock attention again. A partial is
    written by its function, so that is what is wrapped.
    """
    if isinstance(spec, functools.partial):
        return functools.partial(with_ladder(spec.func), *spec.args, **spec.keywords)

    @functools.wraps(spec)
    @translated()
    def layer_spec(config: Any, *args: Any, **kwargs: Any) -> Any:
        show_warnings()  # the first code of ours after Bridge has set up its logging
        if clock.current().config.init == "reference":
            draw_as_reference(config, config.num_layers)
        stock = spec(config, *args, **kwargs)
        check_core_attention(stock)
        return with_skyladder(stock)

    return layer_spec


def check_core_attention(spec: Any) -> None:
    """Refuse layers whose attention is more than Megatron's dot product.

    Raises:
        UsageError: replacing it would lose its scaling or its windows, or it is ours already.
    """
    for found in core_attentions(spec):
        kind = getattr(found, "module", found)
        name = f"{getattr(kind, '__module__', '')}.{getattr(kind, '__qualname__', kind)}"
        if name.endswith(".SkyLadderAttention"):
            raise UsageError(
                "the layers have SkyLadder's attention already: apply was called twice on one "
                "configuration. Call it once, after all overrides."
            )
        if name not in _REPLACED:
            raise UsageError(
                f"the layers of this model attend with {name}, which cannot be combined with "
                "SkyLadder: replacing it would lose what it does beside the dot product, such as "
                "its scaling or its windows. Use a model with Megatron's DotProductAttention or "
                "TEDotProductAttention, such as Llama or Qwen."
            )
