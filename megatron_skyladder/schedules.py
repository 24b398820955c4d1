"""A path that old checkpoints name; nothing else uses it.

Up to November 2026 the parsed stages of ``--skyladder-stages`` went into Megatron's arguments, and
so into checkpoints, under this module's name. A loader looks the class up here.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Stage:
    """One window held for a share of the run, as it was then."""

    window: int
    share: Fraction
