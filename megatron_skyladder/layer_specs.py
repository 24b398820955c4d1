"""``--spec megatron_skyladder.layer_specs skyladder``: SkyLadder in any script that has the flag.

Launch scripts name this module, so it stays here. `with_skyladder` changes a spec of one's own; the
settings of ``--spec`` are those of `megatron_lm.from_environment`.
"""

from __future__ import annotations

from typing import Any

from megatron_skyladder.attention.layer_spec import with_skyladder
from megatron_skyladder.megatron_lm.spec import spec_from_environment

__all__ = ["with_skyladder"]

SPEC_NAME = "skyladder"
# Megatron's import_module looks into vars() of this module and calls no __getattr__; but where a
# module has a __path__, Python's own import of a name from it does so first.
__path__: list[str] = []


def __getattr__(name: str) -> Any:
    """Make the spec for ``--spec`` when Megatron asks for it: then its arguments are known."""
    if name != SPEC_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    spec = globals()[SPEC_NAME] = spec_from_environment()
    return spec
