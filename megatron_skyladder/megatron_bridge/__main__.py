"""Pretrain a recipe of Megatron Bridge with SkyLadder, from the command line.

    torchrun --nproc-per-node 8 -m megatron_skyladder.megatron_bridge \\
        --recipe llama32_1b_pretrain_config skyladder.start_window=32 train.train_iters=1000 ...

Overrides are Bridge's own (Hydra syntax), and ``skyladder.NAME=VALUE`` for every flag of SkyLadder.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from megatron_skyladder.cpu import bridge as cpu_bridge
from megatron_skyladder.cpu import engine as cpu_engine
from megatron_skyladder.errors import UsageError
from megatron_skyladder.megatron_bridge import overrides, recipes, releases, settings
from megatron_skyladder.megatron_bridge.console import open_console
from megatron_skyladder.runtime.ending import explained


def main() -> None:
    """Train."""
    open_console()
    arguments, words = _parser().parse_known_args()
    with explained():
        given, others = overrides.split(words)
        overrides.check_environment(os.environ)
        settings.read(given)
        releases.check(releases.installed())
        cpu_engine.install_or_check_device()
        if cpu_engine.is_installed():
            cpu_bridge.install()
        _train(arguments, given, others)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchrun ... -m megatron_skyladder.megatron_bridge",
        description="Pretrain a recipe of Megatron Bridge with SkyLadder.",
        epilog="Then overrides: Bridge's own, such as train.train_iters=1000, and "
        f"skyladder.NAME=VALUE, NAME one of {', '.join(settings.names())}. skyladder flags says "
        "what they do.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--recipe",
        required=True,
        metavar="NAME",
        help="of megatron.bridge.recipes, such as llama32_1b_pretrain_config; or module:function "
        "for one of your own.",
    )
    parser.add_argument(
        "--config-file", metavar="YAML", help="of Bridge's, merged before the overrides."
    )
    return parser


def _train(arguments: argparse.Namespace, given: dict[str, Any], others: list[str]) -> None:
    from megatron.bridge.training.pretrain import pretrain
    from megatron.bridge.training.utils.omegaconf_utils import (
        OverridesError,
        process_config_with_overrides,
    )

    from megatron_skyladder.megatron_bridge.ladder import apply

    cfg = recipes.find(arguments.recipe)()
    try:
        cfg = process_config_with_overrides(
            cfg, config_filepath=arguments.config_file, cli_overrides=others or None
        )
    except (OverridesError, FileNotFoundError) as error:
        raise UsageError(str(error)) from None
    ladder = apply(cfg, **given)
    pretrain(cfg, ladder.forward_step, callbacks=ladder.callbacks)


if __name__ == "__main__":
    main()
