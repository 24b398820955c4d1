"""Which of Megatron's checkpoints are complete, and making the newest of them the one it loads.

Megatron loads what ``latest_checkpointed_iteration.txt`` names and does not look further: a node
that fails while saving, a full disk or a lost file then ends every restart in the same way. A
``torch_dist`` checkpoint says itself which bytes belong to it, so completeness can be checked
without loading anything.
"""

from __future__ import annotations

import json
import os
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TRACKER = "latest_checkpointed_iteration.txt"
SET_ASIDE = "incomplete_"  # prefix of folders that must not be loaded, nor written into
_FOLDER = re.compile(r"iter_(\d{7,})$")


@dataclass(frozen=True)
class Incomplete:
    """A checkpoint that was skipped."""

    folder: Path
    reason: str


@dataclass(frozen=True)
class Found:
    """What a folder of checkpoints holds.

    Args:
        newest: iteration of the newest complete checkpoint; 0: there is none.
        incomplete: those that are newer than it, newest first.
        named: the iteration that the tracker file names, as text; None: there is no file.
    """

    newest: int
    incomplete: tuple[Incomplete, ...]
    named: str | None


def find(folder: Path) -> Found:
    """Look for the newest complete checkpoint; nothing is changed."""
    tracker = folder / TRACKER
    named = tracker.read_text().strip() if tracker.exists() else None
    incomplete: list[Incomplete] = []
    for iteration, path in sorted(_iterations(folder).items(), reverse=True):
        reason = why_incomplete(path, named_by_tracker=named == str(iteration))
        if reason is None:
            return Found(iteration, tuple(incomplete), named)
        incomplete.append(Incomplete(path, reason))
    return Found(0, tuple(incomplete), named)


def settle(folder: Path) -> Found:
    """Make the newest complete checkpoint the one that Megatron loads.

    Incomplete ones that are newer are renamed, so that nothing is later written between their
    remains. Called before training, while no rank runs.

    Returns:
        What was found before.
    """
    found = find(folder)
    for skipped in found.incomplete:
        _set_aside(skipped.folder)
    if found.newest and found.named != str(found.newest):
        temporary = folder / f".{TRACKER}.partial"
        temporary.write_text(str(found.newest))
        os.replace(temporary, folder / TRACKER)
    elif not found.newest and found.named is not None and found.named != "release":
        (folder / TRACKER).unlink()
    return found


def why_incomplete(folder: Path, *, named_by_tracker: bool) -> str | None:
    """Return what a checkpoint lacks, or None where it is complete.

    Args:
        folder: one iteration's.
        named_by_tracker: whether Megatron has noted this iteration as saved; the only sign of
            completeness that the old format (``--ckpt-format torch``) has.
    """
    index = folder / ".metadata"
    if any(folder.glob("mp_rank_*")):
        return None if named_by_tracker else "Megatron has not noted it as saved"
    if not index.exists():
        return "it has no .metadata, which is written last but one"
    try:
        json.loads((folder / "metadata.json").read_text())
    except FileNotFoundError:
        return "it has no metadata.json, which is written last"
    except ValueError:
        return "its metadata.json is cut off"
    try:
        sizes = _needed_bytes(index)
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, ValueError) as error:
        return f"its .metadata cannot be read ({error})"
    for name, needed in sizes.items():
        path = folder / name
        size = path.stat().st_size if path.exists() else None
        if size is None:
            return f"{name} is missing"
        if size < needed:
            return f"{name} has {size:,} of {needed:,} bytes"
    return None


def _iterations(folder: Path) -> dict[int, Path]:
    if not folder.is_dir():
        return {}
    matches = ((_FOLDER.match(path.name), path) for path in folder.iterdir() if path.is_dir())
    return {int(match[1]): path for match, path in matches if match}


def _set_aside(folder: Path) -> None:
    number = 1
    while (target := folder.with_name(f"{SET_ASIDE}{folder.name}.{number}")).exists():
        number += 1
    folder.rename(target)


class _Anything:
    """Stands for an object of any class: the index is read without importing torch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.state: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {}


class _IndexReader(pickle.Unpickler):
    """Unpickles data and nothing else: no class is looked up, no code is run."""

    def find_class(self, module: str, name: str) -> Any:
        return type(name, (_Anything,), {})


def _needed_bytes(index: Path) -> dict[str, int]:
    """Return how long each file of a ``torch.distributed`` checkpoint has to be at least.

    Raises:
        ValueError: the index is not one.
    """
    with index.open("rb") as file:
        metadata = _IndexReader(file).load()
    places = metadata.state.get("storage_data") if isinstance(metadata, _Anything) else None
    if not places:
        raise ValueError("it names no files")
    needed: dict[str, int] = {}
    for place in places.values():
        name = place.state["relative_path"]
        needed[name] = max(needed.get(name, 0), place.state["offset"] + place.state["length"])
    return needed
