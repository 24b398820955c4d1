"""Which releases of Megatron Bridge are known. Standard library only; Bridge is not imported."""

from __future__ import annotations

import importlib.metadata
import logging
import os
from dataclasses import dataclass

from megatron_skyladder.ladder.settings import SAME_ON_A_NODE
from megatron_skyladder.megatron_lm.releases import ALLOW_VARIABLE, MegatronMismatchError

logger = logging.getLogger(__name__)

DISTRIBUTION = "megatron-bridge"


@dataclass(frozen=True)
class Release:
    """One release line of Bridge.

    Args:
        line: major and minor version.
        tested: the release that was tested.
        megatron_core: the Megatron beside it.
    """

    line: str
    tested: str
    megatron_core: str


RELEASES = {"0.6": Release("0.6", "0.6.2", "0.19.2")}


def installed() -> str | None:
    """Return the version of Bridge that is installed, or None."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None


def check(version: str | None) -> None:
    """Refuse a Bridge that is missing or not among the tested releases.

    Raises:
        MegatronMismatchError: it says which are, and how to try another.
    """
    if version is None:
        raise MegatronMismatchError(
            "Megatron Bridge is not installed for this Python. Install it (pip install "
            "'megatron-bridge>=0.6,<0.7', Python 3.12), or use NVIDIA's NeMo Framework container."
        )
    if ".".join(version.split(".")[:2]) in RELEASES:
        return
    known = ", ".join(f"{line}.x" for line in RELEASES)
    if os.environ.get(ALLOW_VARIABLE):
        text = "Megatron Bridge %s is untested; treating it as %s, as %s says."
        logger.warning(text, version, known, ALLOW_VARIABLE, extra=SAME_ON_A_NODE)
        return
    raise MegatronMismatchError(
        f"Megatron Bridge {version} is not among the tested releases: needed is {known}. Use it, "
        f"or set {ALLOW_VARIABLE}=1 to try this one; the start-up probe still tells whether the "
        "mask is applied."
    )
