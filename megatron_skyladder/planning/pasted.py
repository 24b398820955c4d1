"""The flags of a launch for a command that knows only some of them: plan, compare, doctor, slurm.

A whole command line can be pasted, or a script named. What a command does not know is left aside
and named; what Megatron does not know is asked about; what has no value in a script is asked for.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_skyladder.attention.limits import Finding
from megatron_skyladder.megatron_lm import flag_names, flag_rules
from megatron_skyladder.megatron_lm.flag_names import Unknown
from megatron_skyladder.planning import launch as launches
from megatron_skyladder.planning.launch import Launch
from megatron_skyladder.planning.shell import Word

_INTRA_DOCUMENT = "--skyladder-intra-document"


@dataclass
class Pasted:
    """What was pasted.

    Args:
        launch: taken apart.
        left_out: flags that the command has no use for, by name.
        unknown: flags that neither Megatron nor SkyLadder has.
        notes: what the reader has to know about what was read.
    """

    launch: Launch = field(default_factory=Launch)
    left_out: list[str] = field(default_factory=list)
    unknown: list[Unknown] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def is_launch(self) -> bool:
        """Whether it is a training run of the user's own, not a run of the paper with changes."""
        given = {word.partition("=")[0] for word in self.launch.words}
        own = "--preset" not in given and given & flag_names.names_by_release().keys()
        return bool(self.launch.entry or own)

    @property
    def findings(self) -> list[Finding]:
        """The rules that the launch meets; Megatron's defaults count for a launch only."""
        values = flag_rules.given_values(self.launch.words)
        found = flag_rules.findings(values)
        of_rules = [each for each in found if each.rule.name in values or self.is_launch]
        words = self.launch.words
        masks_documents = any(word.startswith(_INTRA_DOCUMENT) for word in words)
        return [*of_rules, *(flag_names.other_masks(words) if masks_documents else ())]


@dataclass
class _Group:
    """A flag with its values; ``flag`` is empty for what stands before the first one."""

    flag: str
    values: list[Word]
    line: int
    is_joined: bool = False  # --flag=value

    def words(self) -> list[str]:
        """Return it as on a command line."""
        texts = [word.text for word in self.values]
        if self.is_joined:
            return ["=".join((self.flag, *texts))]
        return [self.flag, *texts] if self.flag else texts


def add_source_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name a script in place of a pasted launch."""
    parser.add_argument(
        "--from-script",
        metavar="FILE",
        help="read the launch from a shell script; nothing in it is run",
    )
    parser.add_argument(
        "--set",
        action="append",
        metavar="NAME=VALUE",
        help="a variable that the script does not set, or another value for one that it sets",
    )


def take(
    parser: argparse.ArgumentParser, words: Sequence[str], *, here: bool = False
) -> tuple[list[str], Pasted]:
    """Take a launch out of a command's words.

    Args:
        parser: of the command; it tells which flags it knows.
        words: behind the command's name.
        here: whether the launch is to start with the Megatron that is installed here; what that
            does not know is then the caller's to report.

    Returns:
        What is left for the parser, and the launch.

    Raises:
        ValueError: the script cannot be read, a value that is needed is not in it, or a flag
            looks like a misspelt one.
    """
    path, values, words = _source(words)
    actions = parser._option_string_actions
    if path is None:
        switches = [flag for flag, action in actions.items() if action.nargs == 0]
        launch = launches.from_words(words, switches)
    else:
        launch = launches.from_script(path, values)
        typed = tuple(Word(word, 0) for word in words)
        launch = replace(launch, flags=(*launch.flags, *typed))
    for word in words:
        if word.endswith((".sh", ".sbatch", ".slurm")) and Path(word).is_file():
            raise ValueError(f"{word} is a script: name it as --from-script {word}.")
    pasted = Pasted(launch, notes=list(launch.notes))
    known: list[_Group] = []
    for group in _groups(launch.flags, actions):
        is_ours = group.flag.startswith("--skyladder-")  # a misspelt one must not go unnoticed
        if not group.flag or group.flag in actions or is_ours:
            known.append(_without_unknown_rest(group, actions.get(group.flag), pasted))
        else:
            _without_unknown_rest(group, None, pasted)
            pasted.left_out.append(group.flag)
    pasted.unknown = flag_names.unknown(
        (*pasted.left_out, *(group.flag for group in known if group.flag.startswith("--"))),
        parser._option_string_actions,
        here=here,
    )
    if not here:
        _check_names(pasted)
    kept = _without_overridden(known)
    _ask_for_values(kept, launch)
    return [word for group in kept for word in group.words()], pasted


def _source(words: Sequence[str]) -> tuple[str | None, dict[str, str], list[str]]:
    """Take ``--from-script`` and ``--set`` out of the words."""
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_source_flags(reader)
    found, rest = reader.parse_known_args(list(words))
    values = {}
    for text in found.set or ():
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ValueError(f"--set {text}: give a variable and its value, such as --set NODES=4.")
        values[name] = value
    if values and found.from_script is None:
        raise ValueError("--set gives values to a script's variables. Name it: --from-script FILE.")
    return found.from_script, values, rest


def _groups(words: Iterable[Word], actions: dict[str, argparse.Action]) -> list[_Group]:
    """Put each flag together with its values."""
    groups = [_Group("", [], 0)]
    for word in words:
        name, equals, value = word.text.partition("=")
        if word.text.startswith("--") or word.text in actions:
            groups.append(_Group(name, [], word.line, bool(equals)))
            if equals:
                groups[-1].values.append(Word(value, word.line, word.missing))
        else:
            groups[-1].values.append(word)
    return groups if groups[0].values else groups[1:]


def _without_unknown_rest(group: _Group, action: argparse.Action | None, pasted: Pasted) -> _Group:
    """Leave out words without a value that cannot belong to the flag, such as ``$EXTRA_ARGS``."""
    takes = 1
    if not group.flag:
        takes = 0
    elif action is not None and action.nargs is not None:
        takes = action.nargs if isinstance(action.nargs, int) else len(group.values)
    for word in group.values[takes:]:
        for missing in word.missing:
            pasted.notes.append(
                f"{pasted.launch.source}, {missing.reason}: what {missing.shown} would add is left "
                f"out. Give it with --set {missing.name}='...' if it matters."
            )
    kept = [*group.values[:takes], *(w for w in group.values[takes:] if not w.missing)]
    return replace(group, values=kept)


def _without_overridden(groups: list[_Group]) -> list[_Group]:
    """Drop a flag of the script that is given again; the last one counts, as in Megatron."""
    last = {group.flag: index for index, group in enumerate(groups)}
    return [
        group
        for index, group in enumerate(groups)
        if not group.line or last[group.flag] == index or not group.flag
    ]


def _check_names(pasted: Pasted) -> None:
    """Refuse a flag that looks like another one that exists; note one that is nobody's.

    Raises:
        ValueError: at least one looks like a misspelt one.
    """
    lines = []
    for each in pasted.unknown:
        if each.meant or each.is_ours:
            lines.append(pasted.launch.at(each.flag) + str(each))
        else:
            pasted.notes.append(f"{each} It is left out.")
    if lines:
        raise ValueError("\n".join(lines))


def _ask_for_values(groups: list[_Group], launch: Launch) -> None:
    """Raise where a flag that is needed has no value in the script.

    Raises:
        ValueError: it has none; all such flags are named.
    """
    lines = []
    for group in groups:
        for missing in (each for word in group.values for each in word.missing):
            lines.append(f"{group.flag} has no value: {launch.source}, {missing.reason}.")
            if missing.name:
                lines[-1] += f" Give it: --set {missing.name}=VALUE, or {group.flag} VALUE."
            else:
                lines[-1] += f" Give it: {group.flag} VALUE."
    if lines:
        raise ValueError("\n".join(dict.fromkeys(lines)))
