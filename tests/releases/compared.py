"""What was compared in a session, for the table at its end."""

from __future__ import annotations

from collections.abc import Sequence

ROWS: list[tuple[str, str, str, str]] = []
HEAD = ("release or fork", "integration", "what ran", "largest difference")


def note(release: str, integration: str, what: str, difference: float = 0.0) -> None:
    """Add a row, once what it says has been asserted.

    Args:
        release: the checkout's name.
        integration: what started SkyLadder.
        what: ran, and against what.
        difference: of losses, relative; 0: every figure that was compared is equal.
    """
    ROWS.append((release, integration, what, f"{difference:.1e}" if difference else "none"))


def largest(found: Sequence[Sequence[float]], wanted: Sequence[Sequence[float]]) -> float:
    """Return the largest relative difference of the losses, the first figures of each step."""
    return max(abs(a[0] - b[0]) / abs(b[0]) for a, b in zip(found, wanted, strict=True))


def lines() -> list[str]:
    """Return the table, rows of one kind once."""
    rows = [HEAD, *dict.fromkeys(ROWS)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
