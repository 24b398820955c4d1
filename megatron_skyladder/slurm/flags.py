"""Words of a command line as flags with their values."""

from __future__ import annotations

from collections.abc import Sequence


def by_flag(words: Sequence[str]) -> dict[str, str]:
    """Return flags with their values as text; where one is given twice, the last."""
    flags: dict[str, str] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, _, value = word.partition("=")
            flags[name] = value
        else:
            flags[name] = f"{flags.get(name, '')} {word}".strip()
    return flags
