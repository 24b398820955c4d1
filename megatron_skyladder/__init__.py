"""SkyLadder context-window scheduling for Megatron. Importing this changes nothing.

The public names below are imported when they are first used, so that neither torch nor Megatron is
loaded, or even needed, for what is arithmetic.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from megatron_skyladder.attention.core_attention import SkyLadderAttention
    from megatron_skyladder.attention.layer_spec import with_skyladder
    from megatron_skyladder.ladder.config import SkyLadderConfig
    from megatron_skyladder.ladder.fragments import fragment_cu_seqlens
    from megatron_skyladder.ladder.schedules import WindowSchedule

__all__ = [
    "SkyLadderAttention",
    "SkyLadderConfig",
    "WindowSchedule",
    "fragment_cu_seqlens",
    "with_skyladder",
]

_HOMES = {
    "SkyLadderAttention": "attention.core_attention",
    "SkyLadderConfig": "ladder.config",
    "WindowSchedule": "ladder.schedules",
    "fragment_cu_seqlens": "ladder.fragments",
    "with_skyladder": "attention.layer_spec",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
