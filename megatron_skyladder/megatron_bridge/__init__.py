"""SkyLadder in Megatron Bridge, through Bridge's own interface: nothing of Bridge is wrapped.

    from megatron_skyladder import megatron_bridge as skyladder

    cfg = llama32_1b_pretrain_config()          # any GPT recipe; all overrides first
    ladder = skyladder.apply(cfg, start_window=32, expand_fraction=0.64, intra_document=True)
    pretrain(cfg, ladder.forward_step, callbacks=ladder.callbacks)

Settings are those of the ``--skyladder-*`` flags, without the prefix (``skyladder flags`` lists
them). Importing this loads neither torch nor Bridge; `apply` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_skyladder.megatron_bridge.ladder import Ladder, apply

__all__ = ["Ladder", "apply"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from megatron_skyladder.megatron_bridge import ladder

    value = getattr(ladder, name)
    globals()[name] = value
    return value
