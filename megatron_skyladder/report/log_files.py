"""Which files are the log of a run, and in which order: those of each start together.

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path

SUFFIXES = (".log", ".out", ".txt", ".err")
ATTEMPTS = "attempts"
BLOCK_CHARACTERS = 1 << 20  # read at a time
_RANK_FILE = re.compile(r"rank\.\d+\.log$")
_TORCHRUN_ATTEMPT = re.compile(r"attempt_\d+$")
_NUMBERS = re.compile(r"\d+")
_LAST_NUMBER = re.compile(r"\d+(?=\D*$)")
_CLOCKS_APART = timedelta(days=1)  # more than clocks of two time zones differ by
Finder = Callable[[str], object]  # a pattern's search
Start = list["Log"]  # what one start printed, in the order to be read


class Log:
    """A log file, read anew in pieces whenever it is asked about; it may be larger than memory.

    Args:
        path: the file.
        training, arguments: see `logs_of_starts`.
    """

    def __init__(self, path: Path, training: Finder, arguments: Finder) -> None:
        self.path, self._training, self._arguments = path, training, arguments
        # a pipe can be read only once
        self._text = None if path.is_file() else path.read_text(encoding="utf-8", errors="replace")

    def blocks(self) -> Iterator[str]:
        """Yield the text, whole lines, about `BLOCK_CHARACTERS` at a time."""
        if self._text is not None:
            yield self._text
            return
        with self.path.open(encoding="utf-8", errors="replace") as file:
            while lines := file.readlines(BLOCK_CHARACTERS):
                yield "".join(lines)

    def lines(self) -> Iterator[str]:
        """Yield the lines."""
        for block in self.blocks():
            yield from block.splitlines()

    @cached_property
    def first_time(self) -> str | None:
        """The time of the first training line, empty where it has none; None: there is no line."""
        match = self._first(self._training)
        if isinstance(match, re.Match):
            return match[1] or ""
        return "" if match else None

    @property
    def trains(self) -> bool:
        """Whether it has a training line."""
        return self.first_time is not None

    @cached_property
    def has_arguments(self) -> bool:
        """Whether it has the head of Megatron's arguments."""
        return bool(self._first(self._arguments))

    def _first(self, find: Finder) -> object:
        return next(filter(None, map(find, self.blocks())), None)


def logs_of_starts(path: Path, training: Finder, arguments: Finder) -> list[Log]:
    """Return the files to read one after the other, for what each start of a run printed in turn.

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
        return reader.of_file(path)
    families: dict[object, list[Start]] = {}
    groups = _groups([*path.glob("*"), *path.glob("logs/**/*")])
    for files in sorted(groups, key=lambda files: _numbers(_attempt_of(files[0]) or files[0])):
        found = reader.of_start(files) if _are_ranks(files) else reader.of_family(files)
        families.setdefault(_family_of(files[0]), []).extend(filter(_trains, found))
    starts = list(heapq.merge(*map(_in_order, families.values()), key=_first_time))
    below = "*" if path.name == ATTEMPTS else f"{ATTEMPTS}/*"
    for folder in sorted(path.glob(below), key=_numbers):
        # one that ended before its first training line was a start as well
        starts += reader.of_start(rank_logs(folder))
    return [log for start in starts for log in start]


def rank_logs(attempt: Path) -> list[Path]:
    """Return the logs of an attempt's ranks, the first rank's first."""
    return sorted(attempt.glob("rank.*.log"), key=_numbers)


def ranks_that_log(files: Sequence[Path]) -> list[Path]:
    """Return those of a start's rank files that training lines may be in, of thousands.

    Megatron's last rank prints them, Megatron Bridge's first.
    """
    return list(dict.fromkeys([*files[-1:], *files[:1]]))


class _Reader:
    """Looks into files of ranks and puts those of a start together."""

    def __init__(self, training: Finder, arguments: Finder) -> None:
        self._training, self._arguments = training, arguments
        self._logs: dict[Path, Log] = {}

    def log(self, path: Path) -> Log:
        """Return a file, the same object each time: it remembers what was found in it."""
        if path not in self._logs:
            self._logs[path] = Log(path, self._training, self._arguments)
        return self._logs[path]

    def of_file(self, path: Path) -> Start:
        """Return a file; of a rank's file, also what the other ranks printed."""
        log = self.log(path)
        if log.trains and log.has_arguments:
            return [log]
        ranks = _files_beside(path)
        if ranks and _are_ranks(ranks):
            return next(iter(self.of_start(ranks)), [])
        return [*self.head_of(ranks), log] if log.trains else [log]

    def of_start(self, files: list[Path]) -> list[Start]:
        """Return the files of the ranks of one start: the first one's head, the last one's lines.

        The others may be thousands, and are not read.
        """
        lines = next((log for log in map(self.log, ranks_that_log(files)) if log.trains), None)
        if lines is not None and lines.has_arguments:
            return [[lines]]
        found = self.head_of(files[:1]) + ([] if lines is None else [lines])
        return [found] if found else []

    def of_family(self, files: list[Path]) -> list[Start]:
        """Return the starts of files whose names differ in a number: of a rank, or of a start."""
        trained = [log for log in map(self.log, files) if log.trains]
        lines = [log for log in trained if not log.has_arguments]
        head = self.head_of(files) if lines else []
        if not head:
            return [[log] for log in trained]
        return [
            [log] if log.has_arguments else [*head, log]
            for log in trained
            if log.has_arguments or log is lines[-1]
        ]

    def head_of(self, files: Sequence[Path]) -> Start:
        """Return the file of the first rank that knows the arguments; nothing where none does."""
        for log in map(self.log, files):
            if log.has_arguments and not log.trains:
                # torchrun keeps what a rank prints and what it logs apart
                other = log.path.with_name("stderr.log")
                logged = log.path.name == "stdout.log" and other.exists()
                return [log, self.log(other)] if logged else [log]
        return []


def _in_order(starts: list[Start]) -> list[Start]:
    """Return the starts of numbered files in their order.

    Numbers that times contradict by more than clocks can differ are of nodes, or the like.
    """
    given = [time for start in starts if (time := _read_time(_first_time(start)))]
    is_order = all(before - after <= _CLOCKS_APART for before, after in itertools.pairwise(given))
    return starts if is_order else sorted(starts, key=_first_time)


def _trains(start: Start) -> bool:
    return any(log.trains for log in start)


def _first_time(start: Start) -> str:
    """Return the time of the first training line; empty where it has none."""
    return next((log.first_time for log in start if log.first_time is not None), "")


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
