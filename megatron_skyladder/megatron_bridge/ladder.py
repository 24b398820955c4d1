"""`apply`: SkyLadder switched on in a configuration of Bridge, before ``pretrain``."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_skyladder.ladder.config import SkyLadderConfig
from megatron_skyladder.ladder.continuation import Checkpoint
from megatron_skyladder.ladder.settings import SAME_ON_ALL_RANKS
from megatron_skyladder.megatron_bridge import refusals, releases, settings
from megatron_skyladder.megatron_bridge.adapter import MegatronBridge
from megatron_skyladder.megatron_bridge.console import open_console
from megatron_skyladder.runtime import trainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ladder:
    """What ``pretrain`` is to be given.

    Args:
        config: the checked configuration.
        forward_step: in the place of ``gpt_step.forward_step``.
        callbacks: before those of your own, which then see what they add.
    """

    config: SkyLadderConfig
    forward_step: Callable[..., Any]
    callbacks: list[Any]


def apply(cfg: Any, **given: Any) -> Ladder:
    """Switch SkyLadder on in a configuration of Bridge; call it last, after all overrides.

    Args:
        cfg: Bridge's ConfigContainer, of a recipe that pretrains a GPT model. Changed: its layer
            spec, and two entries of its ``env_vars``, which every checkpoint carries.
        given: settings by the names of the ``--skyladder-*`` flags, such as ``start_window=32``;
            True for a flag without a value; None is not given. Without any: the paper's defaults.

    Returns:
        The forward step and the callbacks to train with.

    Raises:
        UsageError: a setting is wrong, does not fit the run, or cannot be combined with something
            in the configuration; Bridge is not of a tested release.
    """
    open_console()
    releases.check(releases.installed())
    flags = settings.read(given)
    options = settings.options_of(cfg, flags)
    config = settings.config_of(options)
    refusals.check_stages(config)
    refusals.check_layout(options)
    refusals.check(cfg, finished=False)
    for text in refusals.noted(cfg):
        logger.warning("%s", text, extra=SAME_ON_ALL_RANKS)

    # Bridge may be slow to import, so only what fits comes this far
    from megatron_skyladder.megatron_bridge.callbacks import LadderCallback
    from megatron_skyladder.megatron_bridge.layers import with_ladder
    from megatron_skyladder.megatron_bridge.step import ForwardStep

    bridge = MegatronBridge(cfg)
    trainer.install(config, bridge)
    cfg.model.transformer_layer_spec = with_ladder(cfg.model.transformer_layer_spec)
    # so that every checkpoint's run_config.yaml carries them
    cfg.env_vars.update(Checkpoint(config.fingerprint, 0, options).variables())
    logger.info("%s", config.fingerprint)
    if cfg.model.context_parallel_size > 1 and config.context_parallel_layout == "balanced":
        logger.info(
            "context parallelism keeps Megatron's zigzag, because Bridge's forward step does not "
            "reorder sequences."
        )
    step = ForwardStep(bridge)
    return Ladder(config, step, [LadderCallback(config, flags, bridge, step)])
