"""A folder that appears when it is whole: made under another name, then renamed.

An export that was stopped leaves ``NAME.partial``. The same command goes on in it; a command with
other settings is refused. Of an import nothing is used again, so it leaves nothing behind.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from safetensors import SafetensorError

from megatron_skyladder import files
from megatron_skyladder.errors import UsageError

RECORD = "skyladder_export.json"
LOCK = ".lock"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)|\bcode: (\d+)")  # as Rust displays and debugs it


def is_finished(folder: Path, settings: dict[str, Any], *, record: str = RECORD) -> bool:
    """Return whether an earlier run with these settings made the folder.

    Args:
        folder: by its final name.
        settings: as for `Staging`.
        record: likewise.

    Raises:
        ValueError: something else is there.
    """
    if not folder.exists():
        return False
    if not (folder / record).is_file():
        raise ValueError(f"{folder} exists already. Delete it, or give another name.")
    differences = _differences(json.loads((folder / record).read_text()), settings)
    if differences:
        raise ValueError(
            f"{folder} exists already and was made from something else or with other settings: "
            f"{'; '.join(differences)}. Give what it was made with, delete it, or give another "
            "name."
        )
    return True


def identity_of(folder: Path, paths: Iterable[Path]) -> str:
    """Return a text that changes with names, sizes and times of files; a moved folder keeps it."""
    facts = [
        (str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(paths)
    ]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


class InUseError(ValueError):
    """Another command is making the folder."""


class Staging:
    """The folder under its other name; the context manager renames it at the end.

    Args:
        folder: what it will be called.
        settings: what decides the content, plain JSON values. Kept in ``record``.
        record: the file's name for them.
        resumes: whether the same settings go on in what an earlier run left. Otherwise that is
            removed first, and an error leaves nothing behind.

    Raises:
        InUseError: another command is writing it.
        UsageError: the disk is full, or its file system has no locks.
        ValueError: an unfinished one had other settings.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        *,
        record: str = RECORD,
        resumes: bool = True,
    ) -> None:
        self.target = folder
        self.folder = folder.with_name(folder.name + ".partial")
        self.settings = settings
        self.record = record
        self.resumes = resumes
        self._lock: IO[str] | None = None
        self._is_mine = False  # whether the folder is, not the lock file alone

    def __enter__(self) -> Path:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            self._still_there()
            self._is_mine = True
            if self.resumes:
                self._compare()
            else:
                self._empty()
            self._note()
        except (BlockingIOError, FileNotFoundError):
            self._close()
            raise InUseError(
                f"{self.folder} is in use: another command is writing it. Wait for it or stop it."
            ) from None
        except BaseException as error:
            self._fail(error)
            raise
        return self.folder

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._fail(error)
            return
        try:
            for left in self.folder.glob(f"*{files.PARTIAL}"):  # of a run that was killed
                left.unlink()
            sync_folder(self.folder)
            # the lock goes last: without it another command could begin in this folder
            os.rename(self.folder, self.target)
            self._is_mine = False  # what has this name from here on
            (self.target / LOCK).unlink()
            sync_folder(self.target.parent)
        except BaseException as late:
            self._fail(late)
            raise
        self._close()

    def _take_lock(self) -> None:
        self._lock = (self.folder / LOCK).open("w")
        files.lock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB, self.folder)

    def _close(self) -> None:
        """Give up the lock, and remove the folder where there is nothing in it."""
        if self._lock is not None:
            self._lock.close()
        with suppress(OSError):  # gone, or not empty: of this command or of another
            self.folder.rmdir()

    def _fail(self, error: BaseException) -> None:
        """Leave what can be used again; raise UsageError where the disk is full."""
        if self._is_mine and not self.resumes:
            with suppress(OSError):  # the error that led here is the one to be seen
                self._empty()
                (self.folder / LOCK).unlink()  # last: another command begins from here on
        self._close()
        reason = _why_full(error)
        if reason is not None:
            then = "goes on after the last whole file" if self.resumes else "begins anew"
            raise UsageError(
                f"could not write {self.folder}: {reason}. Make room there and give the same "
                f"command again; it {then}."
            ) from error

    def _empty(self) -> None:
        """Remove everything but the lock."""
        for path in self.folder.iterdir():
            if path.name == LOCK:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _still_there(self) -> None:
        """Raise FileNotFoundError where another command has finished the folder meanwhile."""
        assert self._lock is not None
        mine, now = os.fstat(self._lock.fileno()), os.stat(self.folder / LOCK)
        if (mine.st_dev, mine.st_ino) != (now.st_dev, now.st_ino):
            raise FileNotFoundError(self.folder)
        if self.target.exists():  # the lock is of a folder that was made anew just now
            (self.folder / LOCK).unlink()
            raise FileNotFoundError(self.target)

    def _compare(self) -> None:
        record = self.folder / self.record
        if not record.is_file():
            return
        differences = _differences(json.loads(record.read_text()), self.settings)
        if differences:
            raise ValueError(
                f"{self.folder} belongs to an unfinished run with other settings: "
                f"{'; '.join(differences)}. Give that run's settings to go on, or delete it."
            )

    def _note(self) -> None:
        record = self.folder / self.record
        if not record.is_file():
            files.write_text(record, json.dumps(self.settings, indent=1) + "\n")


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return in which settings two runs differ, each in words."""
    before, now = _flat(before), _flat(now)
    words = {
        "source": "the source is another, or was changed or copied since (names, sizes or times of "
        "config.json and the safetensors files)"
    }
    return [
        words.get(name, f"{name} was {_short(before.get(name))} and is {_short(now.get(name))}")
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings with those of a group, such as config, by names of their own."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        group = value if isinstance(value, dict) else {}
        flat |= {f"{name}.{key}": each for key, each in group.items()} if group else {name: value}
    return flat


def _why_full(error: BaseException | None) -> str | None:
    """Return the system's words where an error comes from a full disk or quota, else None.

    safetensors has the system's number in its text only. torch's zip writer raises a RuntimeError
    about positions in the file, in whose context the OSError is.
    """
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        if isinstance(error, SafetensorError) and (match := _SYSTEM_ERROR.search(str(error))):
            number = int(match[1] or match[2])
        if number in _FULL:
            return os.strerror(number)
        error = error.__cause__ or error.__context__
    return None


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder onto the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
