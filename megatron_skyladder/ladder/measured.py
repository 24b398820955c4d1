"""Which kernel was fastest on a GPU, as ``skyladder check-gpu`` found it: read by ``auto``.

One small JSON file for all GPUs of a user, in the cache folder or where a variable says. Standard
library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_skyladder import files
from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder.kernels import KERNELS, Call

VARIABLE = "SKYLADDER_MEASURED"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """What was measured on one kind of GPU.

    Args:
        device: its name, as torch gives it.
        date: of the check, YYYY-MM-DD.
        milliseconds: call -> kernel -> mean time of the windows tried, forward and backward.
    """

    device: str
    date: str
    milliseconds: Mapping[Call, Mapping[str, float]]

    def order(self, call: Call) -> tuple[str, ...]:
        """Return the kernels that were measured for a kind of call, the fastest first."""
        times = self.milliseconds.get(call, {})
        return tuple(sorted(times, key=lambda name: times[name]))

    def reason(self, call: Call, name: str) -> str:
        """Return why a kernel is taken, for people."""
        times = self.milliseconds[call]
        others = [f"{other} {times[other]:.3g} ms" for other in self.order(call) if other != name]
        beside = f", {', '.join(others)}" if others else ""
        return f"measured here on {self.date}: {name} {times[name]:.3g} ms{beside}"


def path(environment: Mapping[str, str] | None = None) -> Path:
    """Return where the file is: ``$SKYLADDER_MEASURED``, or in the user's cache folder."""
    environment = os.environ if environment is None else environment
    if environment.get(VARIABLE):
        return Path(environment[VARIABLE])
    return cache_folder(environment) / "attention.json"


def cache_folder(environment: Mapping[str, str] | None = None) -> Path:
    """Return the folder that this user's commands keep things in, below ``$XDG_CACHE_HOME``."""
    environment = os.environ if environment is None else environment
    cache = Path(environment.get("XDG_CACHE_HOME") or "~/.cache")
    with contextlib.suppress(RuntimeError):  # nobody says where the home is
        cache = cache.expanduser()
    return cache / "megatron-skyladder"


def read(device: str, file: Path | None = None) -> Measured | None:
    """Return what was measured on a GPU of this name; None where none was.

    Raises:
        UsageError: the file is damaged, or names a kernel that is not known.
    """
    try:
        entry = _entries(file or path()).get(device)
    except OSError as error:  # on one node of many, perhaps, and for a table that only helps
        logger.warning(
            "%s cannot be read (%s), so --skyladder-attention-backend auto goes by its own order",
            file or path(),
            error.strerror or error,
        )
        return None
    if entry is None:
        return None
    try:
        milliseconds = {
            Call[call]: {str(name): float(time) for name, time in times.items()}
            for call, times in entry["milliseconds"].items()
        }
        found = Measured(device, str(entry["date"]), milliseconds)
        if not all(name in KERNELS for times in milliseconds.values() for name in times):
            raise KeyError("a kernel")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(file or path(), error) from error
    return found


def write(measured: Measured, file: Path | None = None) -> Path:
    """Add a GPU to the file, or replace what it says of it; return the file."""
    file = file or path()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_name(f".{file.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two kinds of GPU, one home folder
        entries = _entries(file)
        entries[measured.device] = {
            "date": measured.date,
            "milliseconds": {call.name: dict(each) for call, each in measured.milliseconds.items()},
        }
        files.write_text(file, json.dumps(entries, indent=2) + "\n")
    return file


def _entries(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    try:
        entries = json.loads(text)
        if not isinstance(entries, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise _damaged(file, error) from error
    return entries


def _damaged(file: Path, error: Exception) -> UsageError:
    return UsageError(
        f"{file} is not a table of skyladder check-gpu ({error}). Delete it, or name another with "
        f"{VARIABLE}."
    )
