"""Which files are the log of a run, and in which order: one text for each start.

Megatron's ranks print different things: the first one its arguments, the last one the training
lines. Where each rank has a file of its own, what belongs to one start is put together:

    RUN/attempts/001/rank.0000.log ... rank.0007.log     `skyladder slurm`
    logs/RUN_ID/attempt_0/0/stdout.log ... 7/stdout.log  torchrun --log-dir logs --redirects 3
    logs/17_0.out ... logs/17_7.out                      srun --output logs/%j_%t.out
"""

from __future__ import annotations

import heapq
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timedelta
from pathlib import Path

SUFFIXES = (".log", ".out", ".txt", ".err")
ATTEMPTS = "attempts"
_RANK_FILE = re.compile(r"rank\.\d+\.log$")
_TORCHRUN_ATTEMPT = re.compile(r"attempt_\d+$")
_NUMBERS = re.compile(r"\d+")
_LAST_NUMBER = re.compile(r"\d+(?=\D*$)")
_CLOCKS_APART = timedelta(days=1)  # more than clocks of two time zones differ by
Finder = Callable[[str], object]  # a pattern's search


def texts_of_starts(path: Path, training: Finder, arguments: Finder) -> list[str]:
    """Return what each start of a run printed, in the order of the starts.

    Files whose names differ in numbers alone are in the order of these: the times in them are local
    ones, set back when summer time ends or where a container has another zone. Files of other names
    are put between them by time.

    Args:
        path: a log file, or a run's folder.
        training: tells whether a text has a training line; returns its match, whose first group is
            the time or None.
        arguments: tells whether a text has the head of Megatron's arguments.
    """
    reader = _Reader(training, arguments)
    if not path.is_dir():
        return [reader.of_file(path)]
    families: dict[object, list[str]] = {}
    groups = _groups([*path.glob("*"), *path.glob("logs/**/*")])
    for files in sorted(groups, key=lambda files: _numbers(_attempt_of(files[0]) or files[0])):
        found = reader.of_start(files) if _are_ranks(files) else reader.of_family(files)
        families.setdefault(_family_of(files[0]), []).extend(filter(training, found))
    ordered = map(reader.in_order, families.values())
    texts = list(heapq.merge(*ordered, key=reader.first_time))
    below = "*" if path.name == ATTEMPTS else f"{ATTEMPTS}/*"
    for folder in sorted(path.glob(below), key=_numbers):
        # one that ended before its first training line was a start as well
        texts += reader.of_start(rank_logs(folder))
    return texts


def rank_logs(attempt: Path) -> list[Path]:
    """Return the logs of an attempt's ranks, the first rank's first."""
    return sorted(attempt.glob("rank.*.log"), key=_numbers)


class _Reader:
    """Reads files of ranks and puts those of a start together."""

    def __init__(self, training: Finder, arguments: Finder) -> None:
        self._training, self._arguments = training, arguments

    def read(self, path: Path) -> str:
        return path.read_text(encoding="utf-8", errors="replace")

    def of_file(self, path: Path) -> str:
        """Return the text of a file; of a rank's file, also what the other ranks printed."""
        text = self.read(path)
        if self._training(text) and self._arguments(text):
            return text
        ranks = _files_beside(path)
        if ranks and _are_ranks(ranks):
            return "\n".join(self.of_start(ranks))
        return self.head_of(ranks) + text if self._training(text) else text

    def of_start(self, files: list[Path]) -> list[str]:
        """Return the text of the ranks of one start: the first one's head, the last one's lines."""
        texts = (self.read(path) for path in reversed(files))  # one may do, of thousands
        lines = next(filter(self._training, texts), "")
        text = lines if self._arguments(lines) else self.head_of(files) + lines
        return [text] if text else []

    def of_family(self, files: list[Path]) -> list[str]:
        """Return the texts of files whose names differ in a number: of a rank, or of a start."""
        texts = [self.read(path) for path in files]
        trained = [text for text in texts if self._training(text)]
        lines = [text for text in trained if not self._arguments(text)]
        head = self.head_of(files) if lines else ""
        if not head:
            return trained
        last = [head + text if text is lines[-1] else text for text in trained]
        return [text for text in last if self._arguments(text)]

    def head_of(self, files: Sequence[Path]) -> str:
        """Return what the first rank printed that knows the arguments; nothing where none does."""
        for path in files:
            text = self.read(path)
            if self._arguments(text) and not self._training(text):
                # torchrun keeps what a rank prints and what it logs apart
                other = path.with_name("stderr.log")
                logged = self.read(other) if path.name == "stdout.log" and other.exists() else ""
                return f"{text}\n{logged}\n"
        return ""

    def in_order(self, texts: list[str]) -> list[str]:
        """Return texts of numbered files in the order of the starts.

        Numbers that times contradict by more than clocks can differ are of nodes, or the like.
        """
        given = [time for text in texts if (time := _read_time(self.first_time(text)))]
        pairs = itertools.pairwise(given)
        is_order = all(before - after <= _CLOCKS_APART for before, after in pairs)
        return texts if is_order else sorted(texts, key=self.first_time)

    def first_time(self, text: str) -> str:
        match = self._training(text)
        return (match[1] or "") if isinstance(match, re.Match) else ""


def _groups(paths: Iterable[Path]) -> list[list[Path]]:
    """Return the log files among paths, those of the ranks of one start together."""
    groups: dict[object, list[Path]] = {}
    for path in sorted(paths, key=_numbers):
        if path.suffix in SUFFIXES and path.is_file():
            groups.setdefault(_group_of(path), []).append(path)
    return list(groups.values())


def _are_ranks(files: list[Path]) -> bool:
    return bool(_RANK_FILE.match(files[0].name)) or _attempt_of(files[0]) is not None


def _attempt_of(path: Path) -> Path | None:
    """Return torchrun's folder of a start that a file lies in."""
    return next((f for f in path.parents if _TORCHRUN_ATTEMPT.match(f.name)), None)


def _group_of(path: Path) -> object:
    """Return what the files of all ranks of a start have in common."""
    if _RANK_FILE.match(path.name):
        return path.parent
    attempt = _attempt_of(path)
    if attempt is not None:
        return attempt, path.name
    return path.parent, _LAST_NUMBER.sub("", path.name)


def _family_of(path: Path) -> object:
    """Return what the files of all starts have in common whose numbers tell their order."""
    if _RANK_FILE.match(path.name):
        return path.parent
    attempt = _attempt_of(path)
    if attempt is not None:
        return attempt.parent, path.name
    return path.parent, _NUMBERS.sub("", path.name)


def _read_time(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text.strip())
    except ValueError:  # none, or of another form
        return None


def _files_beside(path: Path) -> list[Path]:
    """Return the files of the other ranks, of a rank's file."""
    path = path.resolve()
    attempt = _attempt_of(path)
    around = path.parent.glob("*") if attempt is None else attempt.glob("**/*")
    groups = (group for group in _groups(around) if path in group)
    return next(groups, [])


def _numbers(path: Path) -> tuple[list[int], str]:
    """Order paths by the numbers in their last two parts: rank 2 comes before rank 10."""
    words = "/".join(path.parts[-2:])
    return [int(number) for number in _NUMBERS.findall(words)], str(path)
