"""``skyladder.NAME=VALUE`` among Bridge's overrides: taken out, so that none is lost.

Bridge's configuration has no such section: left in, ``skyladder.x=1`` ends in an error of Hydra's,
and ``+skyladder.x=1`` is accepted and has no effect. Standard library only.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_skyladder.errors import UsageError
from megatron_skyladder.megatron_bridge import settings, spelling

SECTION = "skyladder"
_KEY = re.compile(r"^(?P<sign>[+~]*)(?P<key>[^=]*)(?P<equals>=?)(?P<value>.*)$", re.DOTALL)
_CLOSE = 0.8


def split(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return our settings, and the overrides that are Bridge's.

    Args:
        words: of the command line, after ``--recipe NAME``.

    Raises:
        UsageError: a word that was meant for SkyLadder and would not reach it.
    """
    given: dict[str, Any] = {}
    others = []
    for word in words:
        name = _name(word)
        if name is None:
            others.append(word)
            continue
        if name in given:
            raise UsageError(f"skyladder.{name} is given twice. Give it once.")
        given[name] = _value(word.partition("=")[2])
    return given, others


def _name(word: str) -> str | None:
    """Return the setting that a word is about, or None where it is Bridge's."""
    if word.startswith("--skyladder"):
        flag, _, value = word[2:].partition("=")
        raise UsageError(
            f"{word}: Bridge takes overrides in the place of flags. Write "
            f"{spelling.field_of(flag)}{f'={value}' if value else ''}."
        )
    found = _KEY.match(word)
    assert found is not None
    key = found["key"].strip()
    section, dot, name = key.partition(".")
    if section == "env_vars" and name.startswith("SKYLADDER_"):
        raise UsageError(f"{word} would not reach SkyLadder. Write {_meant(name, found)} instead.")
    if section != SECTION:
        _refuse_misspelt(word, section, name, found)
        return None
    if found["sign"]:
        raise UsageError(f"{word}: write {_meant(name, found)}, without {found['sign']}.")
    if not dot or not name:
        raise UsageError(f"{word}: give one setting at a time, such as skyladder.start_window=32.")
    settings.check_name(name)
    if not found["equals"]:
        raise UsageError(f"{word} has no value. Write {word}=..., such as {word}=true.")
    return name


def _refuse_misspelt(word: str, section: str, name: str, found: re.Match[str]) -> None:
    """Refuse a section that looks like ours: with a plus Bridge would accept and lose it."""
    plain = section.lower().replace("_", "").replace("-", "")
    near = difflib.SequenceMatcher(None, plain, SECTION).ratio() >= _CLOSE
    if near or plain.startswith(SECTION):
        raise UsageError(f"{word}: did you mean {_meant(name or section, found)}?")


def _meant(name: str, found: re.Match[str]) -> str:
    plain = name.lower().replace("-", "_").removeprefix("skyladder_")
    return f"skyladder.{plain}{found['equals']}{found['value']}"


def _value(text: str) -> Any:
    """Read a value as Hydra would: true, false, null, quoted text, a list."""
    text = text.strip()
    words = {"true": True, "false": False, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    if text[:1] == "[" and text[-1:] == "]":
        return [str(_unquoted(each)) for each in re.split(r"[,\s]+", text[1:-1].strip()) if each]
    return _unquoted(text)


def _unquoted(text: str) -> str:
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text


def check_environment(environment: Mapping[str, str]) -> None:
    """Refuse flags that come as variables: that way leads to Megatron-LM's ``--spec``.

    Raises:
        UsageError: it names what to write instead.
    """
    known = {f"SKYLADDER_{name.upper()}": name for name in settings.names()}
    found = [variable for variable in environment if variable in known]
    if found:
        name = known[found[0]]
        raise UsageError(
            f"{found[0]} is set, and Bridge does not read it. Write "
            f"skyladder.{name}={environment[found[0]]}, and unset the variable."
        )
