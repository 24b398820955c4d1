"""What `apply` is given, as checked values: read and refused by the very parser of the flags."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping
from typing import Any, NoReturn

from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder.config import DEFAULT_SCHEDULE, SkyLadderConfig
from megatron_skyladder.ladder.flags import (
    PREFIX,
    add_arguments,
    config_from_args,
    is_requested,
)
from megatron_skyladder.megatron_bridge.spelling import translated

_END_LADDER = "end_ladder"
_OF_LAYERS = ("num_layers", "window_size", "window_attn_skip_freq")
_NOT_HERE = {"recurrent_state"}  # of HybridModel, which Bridge's recipes of attention do not build


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix("argument "))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="SkyLadder", allow_abbrev=False, add_help=False)
    return add_arguments(parser)


def _actions() -> dict[str, argparse.Action]:
    """Return what stands behind each setting, by its name."""
    actions = {action.dest: action for action in _parser()._actions}
    return {
        name.removeprefix(PREFIX): action
        for name, action in actions.items()
        if name.startswith(PREFIX) and name.removeprefix(PREFIX) not in _NOT_HERE
    }


def names() -> list[str]:
    """Return the names of all settings."""
    return list(_actions())


def check_name(name: str) -> None:
    """Refuse what is no setting.

    Raises:
        UsageError: it names the setting that was probably meant.
    """
    known = _actions()
    if name in known:
        return
    plain = name.replace("-", "_").removeprefix(PREFIX)
    close = [plain] if plain in known else difflib.get_close_matches(plain, known, 1)
    meant = f"Did you mean skyladder.{close[0]}? " if close else ""
    raise UsageError(
        f"skyladder.{name} is no setting. {meant}There are: {', '.join(known)} (skyladder flags "
        "says what they do)."
    )


def read(settings: Mapping[str, Any]) -> argparse.Namespace:
    """Return the settings as flags would have set them: ``skyladder_*``, text and plain numbers.

    Args:
        settings: by name; None is not given. Values as in Python or as the text of a flag.

    Raises:
        UsageError: an unknown name, or a value that its flag does not take.
    """
    actions = _actions()
    words: list[str] = []
    for name, value in settings.items():
        check_name(name)
        if value is not None:
            words += _words(name, actions[name], value)
    with translated():
        return _parser().parse_args(words)


def _words(name: str, action: argparse.Action, value: Any) -> list[str]:
    """Return a setting as it would stand on a command line."""
    flag = action.option_strings[0]
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UsageError(f"skyladder.{name}={value!r}: give true, or leave it out.")
        return [flag] if value else []
    if isinstance(value, bool):
        raise UsageError(f"skyladder.{name}={value}: it takes a value, {action.metavar}.")
    if action.nargs == "+":
        each = value if isinstance(value, (list, tuple)) else str(value).split()
        return [flag, *map(str, each)]
    if isinstance(value, (list, tuple)):
        value = ",".join(map(str, value))
    return [f"{flag}={value}"]


def options_of(cfg: Any, flags: argparse.Namespace) -> argparse.Namespace:
    """Return what the ladder has to know of a run, by Megatron's names, beside the flags.

    Args:
        cfg: Bridge's ConfigContainer; ``train_iters`` may still be None where samples are given.
        flags: of `read`.
    """
    return argparse.Namespace(
        seq_length=cfg.model.seq_length,
        global_batch_size=cfg.train.global_batch_size,
        micro_batch_size=cfg.train.micro_batch_size,
        train_samples=cfg.train.train_samples,
        train_iters=cfg.train.train_iters,
        context_parallel_size=cfg.model.context_parallel_size,
        log_interval=cfg.logger.log_interval,
        **{name: getattr(cfg.model, name, None) for name in _OF_LAYERS},
        **vars(flags),
    )


def config_of(options: argparse.Namespace) -> SkyLadderConfig:
    """Return the checked configuration.

    Raises:
        UsageError: in Bridge's words.
    """
    if getattr(options, PREFIX + _END_LADDER, None):
        raise UsageError(
            "skyladder.end_ladder=true has no use in Bridge. To go on at the full window, leave "
            "SkyLadder out: pretrain(cfg, gpt_step.forward_step), without its callbacks."
        )
    if not is_requested(options):
        options = argparse.Namespace(**vars(options))
        options.skyladder_schedule = DEFAULT_SCHEDULE  # calling apply asks for it
    with translated():
        config = config_from_args(options)
    assert config is not None
    return config
