"""The kernels that can run windowed attention, each behind the calls of `base.Backend`.

`ladder.kernels` describes them, `choose` picks one for each kind of call.
"""

from __future__ import annotations

from megatron_skyladder.attention.backends.base import Backend, from_thd, to_thd
from megatron_skyladder.attention.backends.choose import (
    BACKENDS,
    Choice,
    Heads,
    choose_backends,
    make_backend,
)

__all__ = [
    "BACKENDS",
    "Backend",
    "Choice",
    "Heads",
    "choose_backends",
    "from_thd",
    "make_backend",
    "to_thd",
]
