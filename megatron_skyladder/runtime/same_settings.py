"""All ranks of a run have the same settings, or none of them trains.

Each process reads its settings itself: from flags, from variables, from files that flags name. A
file or a variable that differs between nodes would let data-parallel ranks train under different
windows in silence, and let others wait for each other: some settings decide which messages ranks
exchange.
"""

from __future__ import annotations

import socket
from dataclasses import fields
from typing import Any

from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder.config import SkyLadderConfig
from megatron_skyladder.ladder.schedules import WindowSchedule

_OFF = {"SKYLADDER_END_LADDER": "set"}  # what a rank has that trains without SkyLadder
_agreed: list[SkyLadderConfig | None] = []  # the latest that all ranks were found to have


def check(config: SkyLadderConfig | None) -> None:
    """Refuse a run whose ranks have different settings; all ranks have to call this.

    It comes before anything that depends on the settings; settings that were compared already are
    not compared again.

    Args:
        config: this rank's settings; None where SKYLADDER_END_LADDER switches SkyLadder off.

    Raises:
        UsageError: on all ranks.
    """
    if _agreed and config is _agreed[0]:
        return
    import torch  # which doctor, whose ranks are compared in the same words, can do without

    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, (socket.gethostname(), _texts(config)))
    if any(facts == _OFF for _, facts in everyone):  # beside it, nothing else compares
        everyone = [(host, {name: facts[name] for name in _OFF}) for host, facts in everyone]
    faults = disagreements(everyone)
    if faults:
        raise UsageError(
            f"this run cannot begin: {' '.join(faults)} Give every node the same flags, the same "
            "SKYLADDER_* variables and the same files (such as the one of --skyladder-points or "
            "--skyladder-stages)."
        )
    _agreed[:] = [config]


def disagreements(ranks: list[tuple[str, dict[str, str]]]) -> list[str]:
    """Return a sentence for everything that is not the same on all ranks.

    Args:
        ranks: each rank's host name and what it has, by name, in order.
    """
    names = dict.fromkeys(name for _, facts in ranks for name in facts)
    complaints = []
    for name in names:
        holders: dict[str, list[str]] = {}
        for rank, (host, facts) in enumerate(ranks):
            holders.setdefault(facts.get(name, "unset"), []).append(f"{rank} ({host})")
        if len(holders) > 1:
            values = "; ".join(
                f"{value!r} on rank {', '.join(who[:4])}{' and more' if len(who) > 4 else ''}"
                for value, who in holders.items()
            )
            complaints.append(f"the ranks disagree on {name}: {values}. Make them the same.")
    return complaints


def _texts(config: SkyLadderConfig | None) -> dict[str, str]:
    """Return each setting as text, which other processes can compare and show."""
    if config is None:
        return _OFF
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return dict.fromkeys(_OFF, "unset") | {
        name: value.describe() if isinstance(value, WindowSchedule) else str(value)
        for name, value in values.items()
    }
