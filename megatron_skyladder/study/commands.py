"""The flags of a run's command: what each is given, and in which of them two commands differ."""

from __future__ import annotations

from collections.abc import Collection, Sequence

FOLDER = frozenset(("--save", "--load", "--data-cache-path"))  # named after the run
LENGTH = frozenset(("--train-iters", "--save-retain-interval"))
RATE = frozenset(("--lr", "--min-lr"))


def values(words: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return what each flag is given, by the last word on it; ``""``: words before all flags."""
    found: dict[str, list[str]] = {}
    flag = ""
    for word in words:
        if word.startswith("--"):
            flag = word
            found[flag] = []
        else:
            found.setdefault(flag, []).append(word)
    return {flag: tuple(given) for flag, given in found.items()}


def differences(
    command: Sequence[str], other: Sequence[str], but: Collection[str] = ()
) -> list[str]:
    """Return the flags that two commands give other values, in their order.

    Args:
        command: words.
        other: words.
        but: flags that may differ.
    """
    mine, theirs = values(command), values(other)
    return [
        flag or "the program"
        for flag in dict.fromkeys((*mine, *theirs))
        if flag not in but and mine.get(flag) != theirs.get(flag)
    ]
