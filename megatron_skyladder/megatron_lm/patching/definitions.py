"""Patches as data: the ``.ini`` files in ``patches/``, one for each release line of Megatron."""

from __future__ import annotations

import configparser
from dataclasses import dataclass
from pathlib import Path

from megatron_skyladder.errors import UsageError

_PREFIX = "megatron-"
_KEYS = {"reason", "file", "function", "insert"}
_SIDES = ("before", "after")


class PatchError(UsageError):
    """The checkout does not have what the patch needs, or the patch is not well-formed."""


@dataclass(frozen=True)
class Place:
    """Where lines are inserted, and which.

    Args:
        name: for messages.
        reason: why these lines.
        file: path from the root of the checkout.
        function: its name; it has to be the only one in the file.
        side: whether the lines go ``before`` or ``after`` the anchor.
        anchor: a simple statement of the function as ``ast.unparse`` prints it, where ``*`` stands
            for anything; it has to match exactly one.
        lines: what is inserted, without indentation.
    """

    name: str
    reason: str
    file: str
    function: str
    side: str
    anchor: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Patch:
    """What is inserted into the checkouts of one release line, in the order of the file."""

    line: str
    places: tuple[Place, ...]

    @property
    def files(self) -> tuple[str, ...]:
        """The files it touches, each once."""
        return tuple(dict.fromkeys(place.file for place in self.places))


def patches_folder() -> Path:
    """Return the folder with the patches: installed with the package, or beside it."""
    package = Path(__file__).parents[2]
    installed = package / "patches"
    return installed if installed.is_dir() else package.parent / "patches"


def known_lines() -> list[str]:
    """Return the release lines that have a patch, such as 0.19, oldest first."""
    names = [path.stem.removeprefix(_PREFIX) for path in patches_folder().glob(f"{_PREFIX}*.ini")]
    return sorted(names, key=lambda line: [int(number) for number in line.split(".")])


def load(line: str) -> Patch:
    """Read the patch of a release line.

    Raises:
        PatchError: there is none, or its file is not well-formed.
    """
    if line not in known_lines():
        raise PatchError(
            f"there is no patch for Megatron {line}. Known: {', '.join(known_lines())}. Choose the "
            "nearest with --patch; places are found by function and anchor, so it may well fit."
        )
    return parse(line, (patches_folder() / f"{_PREFIX}{line}.ini").read_text(encoding="utf-8"))


def parse(line: str, text: str) -> Patch:
    """Read a patch from the text of its file.

    Raises:
        PatchError: a key is missing or unknown.
    """
    parser = configparser.ConfigParser(interpolation=None)
    parser.read_string(text)
    return Patch(line, tuple(_place(name, dict(parser[name])) for name in parser.sections()))


def _place(name: str, values: dict[str, str]) -> Place:
    sides = [side for side in _SIDES if side in values]
    if len(sides) != 1 or set(values) != _KEYS | set(sides):
        raise PatchError(
            f"[{name}] in the patch has the keys {', '.join(sorted(values))}; needed are "
            f"{', '.join(sorted(_KEYS))} and one of {', '.join(_SIDES)}."
        )
    lines = tuple(line for line in values["insert"].splitlines() if line)
    return Place(
        name,
        values["reason"],
        values["file"],
        values["function"],
        sides[0],
        values[sides[0]],
        lines,
    )
