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
from functools import partial
from typing import Any

from megatron_skyladder.errors import UsageError


def reference_stds(hidden_size: int, num_layers: int) -> tuple[float, float]:
    """Return the std of all matrices, and that of the output projections.

    Args:
        hidden_size: width of the model.
        num_layers: pairs of attention and MLP.
    """
    return math.sqrt(2 / (5 * hidden_size)), 1 / math.sqrt(hidden_size) / num_layers


def draw_as_reference(config: Any, num_layers: int) -> None:
    """Let a model draw its weights as the paper's code does.

    At the model, and not where its configuration is made: a script may make that long before
    SkyLadder is switched on.

    Args:
        config: Megatron's TransformerConfig, complete, before a model is built with it; doing it
            twice (each model chunk has the same configuration) does no harm.
        num_layers: pairs of attention and MLP in the whole model; a hybrid model's configuration
            counts both.

    Raises:
        UsageError: the configuration sets another way to draw weights.
    """
    from megatron.core.utils import init_method_normal

    std, output_std = reference_stds(config.hidden_size, num_layers)
    output_method = config.output_layer_init_method
    # both: the first alone is Megatron's default at a hidden size of 1000
    if _is_normal(config.init_method, std) and _is_normal(output_method, output_std):
        return
    _check_nothing_else_is_asked_for(config)
    config.init_method = config.embedding_init_method = init_method_normal(std)
    config.output_layer_init_method = init_method_normal(output_std)


def _is_normal(init_method: Any, std: float) -> bool:
    """Return whether a method is Megatron's ``init_method_normal(std)``."""
    from torch.nn.init import normal_

    return (
        isinstance(init_method, partial)
        and init_method.func is normal_
        and init_method.keywords == {"mean": 0.0, "std": std}
    )


def _check_nothing_else_is_asked_for(config: Any) -> None:
    embedding_std = config.embedding_init_method_std
    other = [
        setting
        for setting, given in {
            "--init-method-std": config.init_method_std != type(config).init_method_std,
            "--embedding-init-method-std": embedding_std not in (None, config.init_method_std),
            "--use-mup": getattr(config, "use_mup", False),
            "--init-method-xavier-uniform": not (
                getattr(config, "use_mup", False)
                or _is_normal(config.init_method, config.init_method_std)
            ),
            "perform_initialization=False": not config.perform_initialization,
        }.items()
        if given
    ]
    if other:
        raise UsageError(
            f"--skyladder-init=reference and {', '.join(other)} both say how weights are drawn. "
            "Give only one of them."
        )
