"""Settings that describe themselves: how a field is read from text, its help, and its errors.

A schedule declares its parameters as dataclass fields whose metadata is a `setting`; the flags,
``compare`` and the tables of the documentation follow from that.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import Field, dataclass, fields
from typing import Any

from megatron_skyladder.errors import UsageError

_NAME = re.compile(r"\$(\$|\w+)")

# `extra` of a log record that follows from the settings alone: the first rank speaks for all
SAME_ON_ALL_RANKS = {"same_on_all_ranks": True}
# of one that follows from what a node has, packages or files: its first rank speaks for the node
SAME_ON_A_NODE = {"same_on_a_node": True}

Naming = Callable[[str], str]  # a field's name -> what whoever set it calls it


class SettingError(UsageError):
    """A setting that cannot be.

    Args:
        template: the message, with a ``$`` before the name of each field: Python callers read
            ``alpha=0``, and the flag layer has `renamed` make ``--skyladder-alpha=0`` of it.
    """

    def __init__(self, template: str) -> None:
        self.template = template
        super().__init__(rename(template, str))

    def __reduce__(self) -> tuple[type[SettingError], tuple[str]]:
        return SettingError, (self.template,)

    def renamed(self, naming: Naming) -> str:
        """Return the message with the fields under other names."""
        return rename(self.template, naming)


def rename(template: str, naming: Naming) -> str:
    """Return the text with each ``$field`` under its name; ``$$`` is a dollar sign."""
    return _NAME.sub(lambda match: "$" if match[1] == "$" else naming(match[1]), template)


def shown(value: object) -> str:
    """Return a value that somebody typed, for a template."""
    return str(value).replace("$", "$$")


@dataclass(frozen=True)
class Setting:
    """What is known of a field beside its default.

    Args:
        read: text, or a value that a Python caller gives, -> the value; raises ValueError.
        metavar: what stands for the value in the help.
        help: what it does, and its default.
        flag: the flag's name where it is not the field's: ``cycles`` for ``num_cycles``.
        several: whether it takes one or more words; ``read`` then returns a tuple for each word,
            and the value is all of them one after the other.
    """

    read: Callable[[Any], Any]
    metavar: str
    help: str
    flag: str | None = None
    several: bool = False

    def value(self, given: Any) -> Any:
        """Return the value of what was given: text, a list of texts, or the value itself.

        Raises:
            ValueError: it cannot be read.
        """
        if not self.several:
            return self.read(given)
        words = given.split() if isinstance(given, str) else given
        return tuple(item for word in words for item in self.read(word))


def setting(**description: Any) -> dict[str, Setting]:
    """Return the metadata of a dataclass field that describes itself, see `Setting`."""
    return {"setting": Setting(**description)}


def setting_of(of: Field[Any]) -> Setting | None:
    """Return a field's description, or None where it cannot be set by hand."""
    found: Setting | None = of.metadata.get("setting")
    return found


def read_settings(instance: Any) -> None:
    """Turn the text in a frozen dataclass's settings into values, and check that they are such.

    Raises:
        SettingError: one cannot be read.
    """
    for each in fields(instance):
        described, given = setting_of(each), getattr(instance, each.name)
        if described is None or given is None:
            continue
        try:
            value = described.value(given)
        except (TypeError, ValueError) as error:
            raise SettingError(f"${each.name}: {shown(error)}.") from None
        object.__setattr__(instance, each.name, value)  # frozen, and still being built
