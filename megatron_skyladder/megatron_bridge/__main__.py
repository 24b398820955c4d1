"""Pretrain a recipe of Megatron Bridge with SkyLadder, from the command line.

    torchrun --nproc-per-node 8 -m megatron_skyladder.megatron_bridge \\
        --recipe llama32_1b_pretrain_config skyladder.start_window=32 train.train_iters=1000 ...

Overrides are Bridge's own (Hydra syntax), and ``skyladder.NAME=VALUE`` for every flag of SkyLadder.
"""

from __future__ import annotations

import os
import sys

from megatron_skyladder.cpu import bridge as cpu_bridge
from megatron_skyladder.cpu import engine as cpu_engine
from megatron_skyladder.errors import UsageError
from megatron_skyladder.megatron_bridge import command_line, overrides, recipes, releases
from megatron_skyladder.megatron_bridge.command_line import CommandLine
from megatron_skyladder.megatron_bridge.console import open_console
from megatron_skyladder.runtime.ending import explained


def main() -> None:
    """Train."""
    open_console()
    with explained():
        line = command_line.read(sys.argv[1:])
        overrides.check_environment(os.environ)
        releases.check(releases.installed())
        cpu_engine.install_or_check_device()
        if cpu_engine.is_installed():
            cpu_bridge.install()
        _train(line)


def _train(line: CommandLine) -> None:
    from megatron.bridge.training.pretrain import pretrain
    from megatron.bridge.training.utils.omegaconf_utils import (
        OverridesError,
        process_config_with_overrides,
    )

    from megatron_skyladder.megatron_bridge.ladder import apply

    cfg = recipes.find(line.recipe)()
    try:
        cfg = process_config_with_overrides(
            cfg, config_filepath=line.config_file, cli_overrides=line.overrides or None
        )
    except (OverridesError, FileNotFoundError) as error:
        raise UsageError(str(error)) from None
    ladder = apply(cfg, **line.settings)
    pretrain(cfg, ladder.forward_step, callbacks=ladder.callbacks)


if __name__ == "__main__":
    main()
