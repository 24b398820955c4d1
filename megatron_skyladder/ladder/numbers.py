"""Numbers as people type them: exact, and bounded before anything is computed with them.

``Fraction("1e99999999")`` does not return, and ``float(Fraction("1e-400") ** -1)`` overflows. So
whatever comes from a flag, a file or a Python caller passes through here first.
"""

from __future__ import annotations

import argparse
import operator
import re
from collections.abc import Callable
from fractions import Fraction
from typing import TypeVar

T = TypeVar("T")

LARGEST = 10**15  # far above any count of tokens, samples or steps, far below what a float holds
_MAX_CHARACTERS = 64
_MAX_EXPONENT = 30
_EXPONENT = re.compile(r"[eE][+-]?0*(\d+)\s*$")


def exact(value: Fraction | float | int | str) -> Fraction:
    """Return the number the user wrote: 0.1 and "1/8" are tenths and eighths, not binary floats.

    Raises:
        ValueError: it is no number, or it is neither 0 nor between 1e-15 and 1e15 in size.
    """
    number = _fraction(str(value)) if isinstance(value, float | str) else Fraction(value)
    if number and not 1 <= abs(number) * LARGEST <= LARGEST**2:
        raise ValueError(_too_far(value))
    return number


def _fraction(text: str) -> Fraction:
    exponent = _EXPONENT.search(text)
    if len(text) > _MAX_CHARACTERS:
        raise ValueError(f"{text[:16]!r}... has {len(text)} characters")
    if exponent and (len(exponent[1]) > 2 or int(exponent[1]) > _MAX_EXPONENT):
        raise ValueError(_too_far(text))
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{text!r} is not a number such as 0.125 or 1/8") from None


def _too_far(value: object) -> str:
    return f"{str(value)[:_MAX_CHARACTERS]!r} is out of bounds: sizes lie between 1e-15 and 1e15"


def whole(value: int | str) -> int:
    """Return a whole number: a count of tokens, samples, steps.

    Raises:
        ValueError: it is not whole, or larger than 1e15 in size.
    """
    try:
        short = not isinstance(value, str) or len(value) <= _MAX_CHARACTERS
        number = int(value) if isinstance(value, str) and short else operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ValueError(f"{str(value)[:_MAX_CHARACTERS]!r} is not a whole number") from None
    if abs(number) > LARGEST:
        raise ValueError(_too_far(value))
    return number


def real(value: float | str) -> float:
    """Return a finite number: a rate, a price, hours.

    Raises:
        ValueError: it is no number, or it is neither 0 nor between 1e-15 and 1e15 in size.
    """
    return float(exact(value))


def argument(read: Callable[[str], T]) -> Callable[[str], T]:
    """Return an argparse type that reads this way and says what `read` says of a wrong text."""

    def read_argument(text: str) -> T:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read_argument


def written(number: Fraction) -> str:
    """Write a number as people do: 16/25 as 0.64, but 1/3 as 1/3."""
    return str(float(number)) if exact(float(number)) == number else str(number)
