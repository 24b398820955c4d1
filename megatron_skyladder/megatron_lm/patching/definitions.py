"""The patch as data: ``patches/megatron.ini``, read and checked."""

from __future__ import annotations

import configparser
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from megatron_skyladder.errors import UsageError

FILE_NAME = "megatron.ini"
_KEYS = {"reason", "file", "at", "insert"}
_ALSO = "also"  # the one key that may be missing
START, FIRST_RETURN = "start", "first return"
_SIDES = ("before", "after")


class PatchError(UsageError):
    """The checkout does not have what the patch needs, or the patch is not well-formed."""


@dataclass(frozen=True)
class Anchor:
    """Where lines go, by the structure of a file.

    Args:
        function: its name; it has to be the only one in the file.
        side: whether the lines go ``before`` or ``after`` the statement.
        statement: a simple statement of the function as ``ast.unparse`` prints it, where ``*``
            stands for anything and which has to match exactly one; or ``START``, the first one
            after the docstring; or ``FIRST_RETURN``.
    """

    function: str
    side: str
    statement: str

    def __str__(self) -> str:
        if self.statement == START:
            return f"at the start of {self.function}()"
        statement = self.statement
        if statement == FIRST_RETURN:
            return f"{self.side} the first return of {self.function}()"
        return f"{self.side} the statement {statement!r} of {self.function}()"


@dataclass(frozen=True)
class Place:
    """Where lines are inserted, and which.

    Args:
        name: for messages.
        reason: why these lines.
        file: path from the root of the checkout.
        anchors: alternatives in order; the first that fits is taken.
        lines: what is inserted, without indentation.
        optional: whether a checkout may lack the file.
    """

    name: str
    reason: str
    file: str
    anchors: tuple[Anchor, ...]
    lines: tuple[str, ...]
    optional: bool = False


@dataclass(frozen=True)
class Patch:
    """What is inserted into a checkout, in the order of the file."""

    places: tuple[Place, ...]

    @property
    def files(self) -> tuple[str, ...]:
        """The files it touches, each once."""
        return tuple(dict.fromkeys(place.file for place in self.places))


def patch_file() -> Path:
    """Return the file that describes the patch: installed with the package, or beside it."""
    package = Path(__file__).parents[2]
    installed = package / "patches" / FILE_NAME
    return installed if installed.is_file() else package.parent / "patches" / FILE_NAME


@lru_cache(maxsize=1)
def load() -> Patch:
    """Read the patch."""
    return parse(patch_file().read_text(encoding="utf-8"))


def parse(text: str) -> Patch:
    """Read a patch from the text of its file.

    Raises:
        PatchError: a key is missing or unknown, or an anchor cannot be read.
    """
    parser = configparser.ConfigParser(interpolation=None)
    parser.read_string(text)
    sections = ((name, dict(parser[name])) for name in parser.sections())
    return Patch(tuple(place for name, values in sections for place in _places(name, values)))


def _places(name: str, values: dict[str, str]) -> Iterator[Place]:
    if set(values) - {_ALSO} != _KEYS:
        raise PatchError(
            f"[{name}] in the patch has the keys {', '.join(sorted(values))}; needed are "
            f"{', '.join(sorted(_KEYS))}."
        )
    place = Place(
        name,
        values["reason"],
        values["file"],
        tuple(_anchor(name, line) for line in values["at"].splitlines() if line),
        tuple(line for line in values["insert"].splitlines() if line),
    )
    yield place
    if _ALSO in values:
        yield replace(place, file=values[_ALSO], optional=True)


def _anchor(name: str, text: str) -> Anchor:
    function, _, where = text.partition(": ")
    if where == START:
        return Anchor(function, "before", START)
    side, _, statement = where.partition(" ")
    if side not in _SIDES or not statement:
        raise PatchError(
            f"[{name}] in the patch has the anchor {text!r}; needed is 'FUNCTION: start', or "
            "'FUNCTION: before STATEMENT' or 'FUNCTION: after STATEMENT'."
        )
    return Anchor(function, side, statement)
