"""A second ladder, for local layers: their own window grows, too, up to the model's L + 1 tokens.

A local layer sees what is in the ladder's window and in its own (`local_layers`), so its own ladder
can hold it back and never let it see further:

    ladder from 2 by 4 tokens a step; own window from 4 to 16 over half of 8 steps; tokens seen

    step                     0   1   2   3   4   5
    the ladder's window      2   6  10  14  18  22   what a global layer sees
    the local layers' own    4   7  10  13  16  16
    a local layer sees       2   6  10  13  16  16   the smaller of both

It is the schedule ``linear``, over a share of the run, with its rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from megatron_skyladder.ladder.local_layers import LocalLayers
from megatron_skyladder.ladder.numbers import whole
from megatron_skyladder.ladder.schedules import DEFAULT_EXPAND_FRACTION, Linear, WindowSchedule
from megatron_skyladder.ladder.settings import (
    SAME_ON_ALL_RANKS,
    Naming,
    SettingError,
    rename,
    shown,
)

START, SHARE = "local_start_window", "local_expand_fraction"
SETTINGS = (START, SHARE)
_OURS = {"start_window": START, "expand_fraction": SHARE, "final_window": "window_size"}

logger = logging.getLogger(__name__)


def local_ladder(
    given: Mapping[str, Any],
    local_layers: LocalLayers | None,
    *,
    total_steps: int,
    round_to: int | str | None = None,
    naming: Naming = str,
) -> WindowSchedule | None:
    """Return the own window of local layers as a function of the step; None: it is constant.

    Args:
        given: `SETTINGS` that were given, as values or as the text of their flags.
        local_layers: of the model; None: it has none, or how many is not known.
        total_steps: of the run, from where the ladder begins.
        round_to: what the ladder's growing windows are rounded down to; so are these.
        naming: what log lines call a setting.

    Raises:
        SettingError: there is no local layer, or a setting is out of range.
    """
    if not given.keys() & set(SETTINGS):
        return None
    final = _final_window(given, local_layers)
    try:
        ladder = Linear(
            start_window=given[START],
            final_window=final,
            expand_fraction=given.get(SHARE, DEFAULT_EXPAND_FRACTION),
            total_steps=total_steps,
            round_to=round_to,
        )
    except SettingError as error:
        escaped = error.template.replace("$$", "$$$$")
        ours = rename(escaped, lambda name: f"${_OURS.get(name, name)}")
        raise SettingError(ours) from None
    if ladder.multiple >= final > ladder.start_window:
        stays = (
            f"$round_to={round_to} is not below the local layers' window of {final} tokens: it "
            f"stays at {ladder.start_window} until it grows to all of them at once."
        )
        logger.warning("%s", rename(stays, naming), extra=SAME_ON_ALL_RANKS)
    return ladder


def _final_window(given: Mapping[str, Any], local_layers: LocalLayers | None) -> int:
    """Return what the window grows to, and refuse what does not fit it."""
    if START not in given:
        raise SettingError(
            f"$local_expand_fraction={shown(given[SHARE])} is the share of the run over which the "
            "window of local layers grows, and where it starts is not said. Give "
            "$local_start_window too, such as 8."
        )
    if local_layers is None:
        raise SettingError(
            f"$local_start_window={shown(given[START])} is about layers with a sliding window of "
            "their own, and this model has none, as far as its flags say. Give $window_size (such "
            "as 127,0), and to a plan the number of layers; or leave out $local_start_window and "
            "$local_expand_fraction."
        )
    final = local_layers.window
    try:
        start = whole(given[START])
    except ValueError as error:
        raise SettingError(f"$local_start_window: {shown(error)}.") from None
    if start > final:
        raise SettingError(
            f"$local_start_window={start} is above the {final} tokens that a local layer sees at "
            f"most, to which its window grows ($window_size={final - 1},0). Give {final} or less."
        )
    return final
