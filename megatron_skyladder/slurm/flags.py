"""Words of a command line: Megatron's flags, or Bridge's overrides, with their values."""

from __future__ import annotations

from collections.abc import Collection, Sequence


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


def overrides(words: Sequence[str]) -> dict[str, str]:
    """Return Bridge's overrides (``section.name=value``) with their values; the last one counts."""
    pairs = (_override(word) for word in words)
    return dict(pair for pair in pairs if pair[0])


def without(words: Sequence[str], names: Collection[str]) -> tuple[list[str], list[str]]:
    """Return words without some flags or overrides, and those that were left out with their values.

    Args:
        words: of a command line.
        names: of flags, with their dashes, or of overrides.
    """
    kept: list[str] = []
    left_out: list[str] = []
    into = kept
    for word in words:
        if word.startswith("--"):
            into = left_out if word.partition("=")[0] in names else kept
        elif (name := _override(word)[0]) and name in names:
            left_out.append(word)
            continue
        into.append(word)
    return kept, left_out


def _override(word: str) -> tuple[str, str]:
    """Return name and value of an override; an empty name: it is none."""
    name, equals, value = word.partition("=")
    if not equals or word.startswith(("-", "~")):
        return "", ""
    return name.lstrip("+"), value.strip("'\"")
