"""Weights drawn as the paper's code draws them: ``--skyladder-init reference``.

Every matrix, embedding and output layer included, is normal with std sqrt(2 / (5 hidden)); the
output projections of attention and MLP are normal with std 1 / sqrt(hidden) / layers (both after
GPT-NeoX, arXiv:2204.06745). Megatron's own are 0.02 and 0.02 / sqrt(2 layers).

A std depends on the whole model and not on a rank's part of a matrix, so the distribution is the
same under every layout; the numbers drawn are not, as Megatron seeds each tensor-parallel rank
differently.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron_skyladder.ladder import clock


class _Normal(partial):
    """Fills a tensor; a type of its own, to be known again in a copied configuration."""


def reference_stds(hidden_size: int, num_layers: int) -> tuple[float, float]:
    """Return the std of all matrices, and that of the output projections."""
    return math.sqrt(2 / (5 * hidden_size)), 1 / math.sqrt(hidden_size) / num_layers


def with_reference_weights(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``TransformerConfig.__post_init__``, where Megatron chooses how weights are drawn.

    Raises:
        ValueError: when a configuration is made that sets another way to draw them.
    """

    def __post_init__(self: Any) -> None:
        if clock.current().config.init == "reference":
            from torch.nn.init import normal_

            _check_nothing_else_is_asked_for(self)
            std, output_std = reference_stds(self.hidden_size, self.num_layers)
            self.init_method = _Normal(normal_, mean=0.0, std=std)
            self.output_layer_init_method = _Normal(normal_, mean=0.0, std=output_std)
        original(self)

    return __post_init__


def _check_nothing_else_is_asked_for(config: Any) -> None:
    other = [
        flag
        for flag, given in {
            "--init-method-std": config.init_method_std != type(config).init_method_std,
            "--init-method-xavier-uniform": not isinstance(
                config.init_method, (_Normal, type(None))
            ),
            "--use-mup": getattr(config, "use_mup", False),
        }.items()
        if given
    ]
    if other:
        raise ValueError(
            f"--skyladder-init=reference and {', '.join(other)} both say how weights are drawn. "
            "Give only one of them."
        )
