"""A folder that appears when it is whole: made under another name, then renamed.

A run that was stopped leaves ``NAME.partial``. The same command goes on in it; a command with other
settings is refused.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from megatron_skyladder import files

RECORD = "skyladder_export.json"
LOCK = ".lock"


def is_finished(folder: Path, settings: dict[str, Any]) -> bool:
    """Return whether an earlier run with these settings made the folder.

    Raises:
        ValueError: something else is there.
    """
    if not folder.exists():
        return False
    record = folder / RECORD
    if record.is_file() and json.loads(record.read_text()) == settings:
        return True
    raise ValueError(
        f"{folder} exists already and was made from something else or with other settings. "
        "Delete it, or give another name."
    )


class InUseError(ValueError):
    """Another command is making the folder."""


class Staging:
    """The folder under its other name; the context manager renames it at the end.

    Args:
        folder: what it will be called.
        settings: what decides the content, plain JSON values. Kept in `RECORD`.

    Raises:
        InUseError: another command is writing it.
        ValueError: an unfinished one had other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.target = folder
        self.folder = folder.with_name(folder.name + ".partial")
        self.settings = settings
        self._lock: IO[str] | None = None

    def __enter__(self) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / LOCK).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._still_there()
            self._compare()
        except (BlockingIOError, FileNotFoundError):
            self._lock.close()
            raise InUseError(
                f"{self.folder} is in use: another command is writing it. Wait for it or stop it."
            ) from None
        except BaseException:
            self._lock.close()
            raise
        return self.folder

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._lock is not None
        try:
            if kind is None:
                for left in self.folder.glob(f"*{files.PARTIAL}"):  # of a run that was killed
                    left.unlink()
                sync_folder(self.folder)
                # the lock goes last: without it another command could begin in this folder
                os.rename(self.folder, self.target)
                (self.target / LOCK).unlink()
                sync_folder(self.target.parent)
        finally:
            self._lock.close()

    def _still_there(self) -> None:
        """Raise FileNotFoundError where another command has finished the folder meanwhile."""
        assert self._lock is not None
        mine, now = os.fstat(self._lock.fileno()), os.stat(self.folder / LOCK)
        if (mine.st_dev, mine.st_ino) != (now.st_dev, now.st_ino):
            raise FileNotFoundError(self.folder)
        if self.target.exists():  # the lock is of a folder that was made anew just now
            (self.folder / LOCK).unlink()
            self.folder.rmdir()
            raise FileNotFoundError(self.target)

    def _compare(self) -> None:
        record = self.folder / RECORD
        if not record.is_file():
            files.write_text(record, json.dumps(self.settings, indent=1) + "\n")
            return
        before = json.loads(record.read_text())
        differences = [
            f"{name} was {_short(before.get(name))} and is {_short(self.settings.get(name))}"
            for name in sorted(before.keys() | self.settings.keys())
            if before.get(name) != self.settings.get(name)
        ]
        if differences:
            raise ValueError(
                f"{self.folder} belongs to an unfinished run with other settings: "
                f"{'; '.join(differences)}. Give that run's settings to go on, or delete it."
            )


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
