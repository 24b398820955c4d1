"""Which flags Megatron has, so that a misspelt one is found before anything is launched.

Names only, from a table that works without Megatron (``flag_names.txt``, written by
``tools/list_megatron_flags.py``). A flag that the table lacks may be a fork's: where a Megatron can
be imported that is not one of the tested wheels, its own parser decides, in a process of its own.
Standard library only.
"""

from __future__ import annotations

import difflib
import functools
import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_skyladder.attention.limits import Effect, Finding, FlagRule, is_given
from megatron_skyladder.megatron_lm import flag_rules, releases

logger = logging.getLogger(__name__)

TABLE = Path(__file__).with_name("flag_names.txt")
_SECONDS = 120  # importing torch and Megatron from a slow file system
_CLOSE = 0.75  # of difflib's ratio: --hiden-size is 0.97 of --hidden-size
_OURS = "--skyladder-"
_OTHER_MASK = (
    "it seems to be this Megatron's own mask of documents, and --skyladder-intra-document is "
    "SkyLadder's: only one of them would be applied"
)
# --intra-doc-masking, --document-attention-mask, --isolate-docs, ...: by whole words
_DOCUMENTS = re.compile(r"(intra|inter|cross)?doc(ument)?s?")
_MASKED = re.compile(r"mask(s|ed|ing)?|attn|attention|intra|inter|cross|isolat(e|ed|ing|ion)")
_SWITCHES_OFF = ("no", "disable", "without")
# prints the flags that a Megatron's parser has; run with that Megatron first on the path
PRINT_FLAGS = """
import argparse, json, sys
from megatron.training import arguments
def show(parser):
    print(json.dumps([flag for flag in parser._option_string_actions if flag.startswith("--")]))
    sys.exit()
if not hasattr(arguments, "add_megatron_arguments"):  # 0.11 makes its parser in parse_args
    sys.argv[1:] = []
    arguments.parse_args(show)
show(arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
"""


@dataclass(frozen=True)
class Unknown:
    """A flag that nobody has.

    Args:
        flag: as it was given.
        meant: the flag that looks most like it, or None where none does.
        asked: whose flags were searched.
    """

    flag: str
    meant: str | None
    asked: str

    @property
    def is_ours(self) -> bool:
        """Whether it was meant to be one of SkyLadder's flags."""
        return self.flag.startswith(_OURS)

    def __str__(self) -> str:
        """Return a sentence or two for the user."""
        meant = f" Did you mean {self.meant}?" if self.meant else ""
        return f"{self.flag} is no flag of {self.asked}.{meant}"


@functools.cache
def names_by_release() -> dict[str, frozenset[str]]:
    """Return flag -> the releases that have it: 0.16 to 0.20, and dev, Megatron's branch."""
    names = {}
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            flag, _, lines = line.partition(" ")
            names[flag] = frozenset(lines.split())
    return names


def unknown(flags: Iterable[str], ours: Iterable[str] = (), *, here: bool = False) -> list[Unknown]:
    """Return the flags that neither Megatron has nor ourselves.

    Args:
        flags: names as on a command line, without values.
        ours: names that are not Megatron's: ``--skyladder-*`` and those of a command.
        here: whether the run starts with the Megatron that is installed; else a flag of any
            release will do.
    """
    ours = set(ours)
    suspects = [flag for flag in dict.fromkeys(flags) if flag not in ours]
    if not suspects:
        return []
    found = _installed()
    known, asked = _known_names(found.line if found and here else None)
    if found is not None and here:
        asked = f"Megatron {found.version} (in {found.folder})"
    suspects = [flag for flag in suspects if flag not in known]
    if any(not flag.startswith(_OURS) for flag in suspects) and _may_have_others(found):
        own = flags_of_installed()
        known = own if own and here else own | known
        suspects = [flag for flag in suspects if flag not in known]
    return [
        Unknown(flag, closest(flag, known | ours), "SkyLadder" if flag.startswith(_OURS) else asked)
        for flag in suspects
    ]


def other_masks(words: Iterable[str]) -> list[Finding]:
    """Return a fork's own masks of documents: beside ours only one of them can be applied.

    They are known by their names alone, so what a fork's other flags do stays its own affair.

    Args:
        words: of the command line of a run that masks documents.

    Returns:
        Of each flag that no release of Megatron has and that speaks of a mask between documents.
    """
    given: dict[str, str] = {}
    words = list(words)
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            given[flag] = value if equals or following.startswith("-") else following
    return [
        Finding(FlagRule(flag, Effect.REFUSED, _OTHER_MASK, "Give one of them."), True, _OTHER_MASK)
        for flag, value in given.items()
        if flag not in names_by_release() and not flag.startswith(_OURS)
        if _masks_documents(flag) and (not value or is_given(value))
    ]


def _masks_documents(flag: str) -> bool:
    """Return whether a flag's name says that attention does not cross documents."""
    parts = re.split("[-_]", flag[2:].lower())
    if parts[0] in _SWITCHES_OFF or "loss" in parts:
        return False
    documents = [part for part in parts if _DOCUMENTS.fullmatch(part)]
    joined = any(not part.startswith("doc") for part in documents)  # --intradoc
    return bool(documents) and (joined or any(map(_MASKED.fullmatch, parts)))


def _may_have_others(found: releases.Megatron | None) -> bool:
    """Return whether an installed Megatron's flags may differ from the table: a fork's do."""
    if found is None:
        return False
    release = releases.RELEASES.get(found.line)
    return found.is_checkout or release is None or found.version != release.wheel


def _known_names(line: str | None) -> tuple[frozenset[str], str]:
    """Return the flags of a release line, or of all where it is not in the table, and its name."""
    names = names_by_release()
    of_line = frozenset(flag for flag, lines in names.items() if line in lines)
    if of_line:
        return of_line, f"Megatron {line}"
    of_rules = frozenset(rule.flag for rule in flag_rules.RULES)
    first, *_, last = releases.RELEASES
    return frozenset(names) | of_rules, f"Megatron {first} to {last}"


def closest(flag: str, known: Iterable[str]) -> str | None:
    """Return the known flag that looks most like one that is not known."""
    matches = difflib.get_close_matches(flag, list(known), n=1, cutoff=_CLOSE)
    return matches[0] if matches else None


def _installed() -> releases.Megatron | None:
    """Return the Megatron that can be imported, or None; what is wrong with it is doctor's part."""
    try:
        return releases.installed()
    except releases.MegatronMismatchError:
        return None


@functools.cache
def flags_of_installed() -> frozenset[str]:
    """Return the flags of the parser of the Megatron that is installed; empty: it does not load."""
    done = subprocess.run(
        [sys.executable, "-c", PRINT_FLAGS], capture_output=True, text=True, timeout=_SECONDS
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        logger.warning("Megatron's own parser could not be asked for its flags: %s", reason)
        return frozenset()
    return frozenset(json.loads(done.stdout.splitlines()[-1]))
