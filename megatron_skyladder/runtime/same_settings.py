"""All ranks of a run have the same settings, or none of them trains.

Each process reads its settings itself: from flags, from variables, from files that flags name. A
file or a variable that differs between nodes would let data-parallel ranks train under different
windows in silence, and let others wait for each other: some settings decide which messages ranks
exchange.
"""

from __future__ import annotations

import socket
from collections import Counter
from dataclasses import fields
from typing import Any

import torch

from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder.config import SkyLadderConfig
from megatron_skyladder.ladder.schedules import WindowSchedule

_agreed: SkyLadderConfig | None = None  # the latest that all ranks were found to have


def check(config: SkyLadderConfig) -> None:
    """Refuse a run whose ranks have different settings; all ranks have to call this.

    It comes before anything that depends on the settings; settings that were compared already are
    not compared again.

    Args:
        config: this rank's settings.

    Raises:
        UsageError: on all ranks.
    """
    global _agreed
    if config is _agreed:
        return
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, (socket.gethostname(), _texts(config)))
    faults = differences(everyone)
    if faults:
        raise UsageError(
            f"the ranks of this run have different settings. {'; '.join(faults)}. All have to have "
            "the same. Give every node the same flags, the same SKYLADDER_* variables and the same "
            "files (such as the one of --skyladder-points or --skyladder-stages)."
        )
    _agreed = config


def differences(everyone: list[tuple[str, dict[str, str]]]) -> list[str]:
    """Return a sentence for each setting that ranks differ in.

    Args:
        everyone: for each rank its host and its settings, by name.

    Example: "eval_lengths: (16,) on rank 0 (a), but () on rank 3 (b); 1 of 4 ranks differ from the
    most frequent".
    """
    found = []
    for name in everyone[0][1]:
        values = [settings[name] for _, settings in everyone]
        (usual, count), *others = Counter(values).most_common()
        if not others:
            continue
        odd = next(rank for rank, value in enumerate(values) if value != usual)
        first = values.index(usual)
        found.append(
            f"{name}: {usual} on rank {first} ({everyone[first][0]}), but {values[odd]} on rank "
            f"{odd} ({everyone[odd][0]}); {len(values) - count} of {len(values)} ranks differ from "
            "the most frequent"
        )
    return found


def _texts(config: SkyLadderConfig) -> dict[str, str]:
    """Return each setting as text, which other processes can compare and show."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return {
        name: value.describe() if isinstance(value, WindowSchedule) else repr(value)
        for name, value in values.items()
    }
