"""Which of Megatron's checkpoints are complete, and making the newest of them the one it loads.

Megatron loads what ``latest_checkpointed_iteration.txt`` names and does not look further: a node
that fails while saving, a full disk or a lost file then ends every restart in the same way. What
tells that a checkpoint is complete depends on its format (Megatron 0.16 to main of August 2026):

    torch_dist                metadata.json, written after .metadata; then integrity.json where
                              --verify-integrity is given
    torch_dcp, fsdp_dtensor   .metadata, which gets its name when all ranks have written
    torch                     nothing in the folder: the tracker file, written after a barrier;
                              each file is a zip archive, whose table of contents comes last
    zarr and other backends   metadata.json (written by Megatron before 0.16)
    local                     files outside of these folders; Megatron's manager checks them itself

``.metadata`` says which bytes belong to the checkpoint, so that lost and short files are found
without loading anything. A folder that is none of these is left as it is: what is unknown is never
renamed, and is used where the tracker file names it. Megatron Bridge writes torch_dist and
fsdp_dtensor, then ``iter_N/train_state.pt``, which it copies to ``latest_train_state.pt``: that is
its tracker file, and the other one a courtesy to Megatron-LM. Non-persistent global checkpoints are
torch_dist ones in a folder of their own with a tracker file of their own, see `folders`.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_skyladder.files import write_bytes, write_text

TRACKER = "latest_checkpointed_iteration.txt"
TRAIN_STATE, BRIDGES_TRACKER = "train_state.pt", "latest_train_state.pt"
SET_ASIDE = "incomplete_"  # prefix of folders that must not be loaded, nor written into
DCP_FORMATS = ("torch_dcp", "fsdp_dtensor")  # torch.distributed.checkpoint without a mark of ours
INDEX, BACKEND, INTEGRITY, COMMON = ".metadata", "metadata.json", "integrity.json", "common.pt"
_FOLDER = re.compile(r"iter_(\d{7,})$")
_LOCAL_FILE = re.compile(r"iter_(\d{7,})_\d+_local\.pt$")
# keys of Megatron's ShardedObject, which only torch_dist writes: rng_state/shard_0.0_1.1
_TORCH_DIST_KEY = "/shard_"


@dataclass(frozen=True)
class Skipped:
    """A checkpoint that is not used, and why."""

    folder: Path
    reason: str


@dataclass(frozen=True)
class Found:
    """What a folder of checkpoints holds.

    Args:
        newest: iteration of the newest complete checkpoint; 0: there is none.
        incomplete: those that are newer than it, newest first.
        named: the iteration that the tracker file names, as text; None: there is no file.
        unknown: newer ones that nothing tells to be complete or incomplete.
    """

    newest: int
    incomplete: tuple[Skipped, ...]
    named: str | None
    unknown: tuple[Skipped, ...] = ()


class UnknownError(Exception):
    """A folder that may or may not be complete; the message says why it is not known."""


class IncompleteError(Exception):
    """A folder that is an incomplete checkpoint; the message says what it lacks."""


def find(folder: Path, ckpt_format: str | None = None) -> Found:
    """Look for the newest complete checkpoint; nothing is changed.

    Args:
        folder: Megatron's --save.
        ckpt_format: the run's --ckpt-format, where it is known.
    """
    named = _named(folder)
    look = _Look(named, _siblings(folder, named), ckpt_format)
    incomplete: list[Skipped] = []
    unknown: list[Skipped] = []
    for iteration, path in sorted(_iterations(folder).items(), reverse=True):
        try:
            look.check(path, iteration)
            return Found(iteration, tuple(incomplete), named, tuple(unknown))
        except IncompleteError as error:
            incomplete.append(Skipped(path, str(error)))
        except UnknownError as error:
            if named == str(iteration):
                return Found(iteration, tuple(incomplete), named, tuple(unknown))
            unknown.append(Skipped(path, str(error)))
    return Found(0, tuple(incomplete), named, tuple(unknown))


def settle(folder: Path, ckpt_format: str | None = None) -> Found:
    """Make the newest complete checkpoint the one that Megatron loads.

    Incomplete ones that are newer are renamed, so that nothing is later written between their
    remains; unknown ones are not. Called before training, while no rank runs.

    Returns:
        What was found before.
    """
    found = find(folder, ckpt_format)
    for skipped in found.incomplete:
        _set_aside(skipped.folder)
    if found.newest:
        if found.named != str(found.newest):
            write_text(folder / TRACKER, str(found.newest))
        _settle_bridge(folder, _iterations(folder)[found.newest] / TRAIN_STATE)
    elif found.named != "release":
        for name in (TRACKER, BRIDGES_TRACKER):
            (folder / name).unlink(missing_ok=True)  # Megatron would end on it
    return found


def _settle_bridge(folder: Path, train_state: Path) -> None:
    """Let Bridge's tracker file be the checkpoint's own; without one, it reads the other tracker.

    Where there is no such tracker, or it is right, nothing is written.
    """
    tracker = folder / BRIDGES_TRACKER
    if not tracker.exists() and not train_state.exists():
        return
    if not train_state.exists():
        tracker.unlink()  # Megatron-LM saved this one, and Bridge an older or a damaged one
    elif not tracker.exists() or tracker.read_bytes() != train_state.read_bytes():
        write_bytes(tracker, train_state.read_bytes())


def why_incomplete(
    folder: Path, *, named_by_tracker: bool, ckpt_format: str | None = None
) -> str | None:
    """Return what a checkpoint lacks, or None where it is complete or its format is not known.

    Args:
        folder: one iteration's.
        named_by_tracker: whether Megatron has noted this iteration as saved.
        ckpt_format: as for `find`.
    """
    iteration = int(folder.name.rpartition("_")[2])
    named = str(iteration) if named_by_tracker else _named(folder.parent)
    try:
        _Look(named, _siblings(folder.parent, named), ckpt_format).check(folder, iteration)
    except IncompleteError as error:
        return str(error)
    except UnknownError:
        return None
    return None


def folders(save: Path, flags: Mapping[str, str]) -> list[Path]:
    """Return the folders in which Megatron looks for global checkpoints, --save first.

    With ``--non-persistent-ckpt-type global`` it loads the newest of two folders.

    Args:
        save: Megatron's --save and --load.
        flags: of the run, with their values.
    """
    if flags.get("--non-persistent-ckpt-type") != "global":
        return [save]
    other = flags.get("--non-persistent-global-ckpt-dir")
    return [save, Path(other) if other else save / "non_persistent"]


def newest_local(flags: Mapping[str, str]) -> int:
    """Return the newest iteration among this node's local checkpoints; 0: there is none here.

    Whether the ranks of all nodes have it, and load it, is for Megatron's manager to find out.
    """
    folder = flags.get("--non-persistent-local-ckpt-dir")
    if not folder or flags.get("--non-persistent-ckpt-type") != "local":
        return 0
    matches = (_LOCAL_FILE.match(path.name) for path in Path(folder).rglob("iter_*_local.pt"))
    return max((int(match[1]) for match in matches if match), default=0)


@dataclass(frozen=True)
class _Siblings:
    """What the other checkpoints of a folder tell about one: they were written alike."""

    backend: bool = False  # one of them has metadata.json
    integrity: bool = False  # the one that the tracker file names has integrity.json
    train_state: bool = False  # and train_state.pt: Bridge saves here


@dataclass(frozen=True)
class _Look:
    """Checks checkpoints of one folder; the methods raise IncompleteError or UnknownError."""

    named: str | None
    siblings: _Siblings = field(default_factory=_Siblings)
    ckpt_format: str | None = None

    def check(self, folder: Path, iteration: int) -> None:
        """Check one in the order in which Megatron's _get_checkpoint_format tells formats apart."""
        names = {path.name for path in folder.iterdir()}
        if BACKEND in names:
            self._check_with_backend(folder, names)
        elif any(folder.glob("mp_rank_*/model_optim_rng.pt")):
            self._check_torch(folder, iteration)
        elif INDEX in names:
            self._check_with_index(folder, names)
        elif any(name.startswith("mp_rank_") for name in names):
            self._check_torch(folder, iteration)
        elif not names or names & {COMMON, f"{INDEX}.tmp"} or _only_shards(names):
            raise IncompleteError("it has no .metadata, which is written when all ranks have saved")
        else:
            raise UnknownError("it has the files of no format that is known here")

    def _check_with_backend(self, folder: Path, names: set[str]) -> None:
        try:
            backend = json.loads((folder / BACKEND).read_text()).get("sharded_backend")
        except (ValueError, AttributeError):
            raise IncompleteError("its metadata.json is cut off") from None
        if INDEX not in names:
            if backend in (None, "torch_dist"):
                raise IncompleteError("it has no .metadata, which is written last but one")
            return  # another backend, such as zarr: metadata.json is all that is known of it
        _check_bytes(folder)
        if self.siblings.integrity and INTEGRITY not in names:
            raise IncompleteError("it has no integrity.json, which the one before it has")
        self._check_train_state(folder, names)

    def _check_with_index(self, folder: Path, names: set[str]) -> None:
        """Tell torch_dcp and fsdp_dtensor from a torch_dist checkpoint that lacks its last file."""
        keys = _check_bytes(folder)
        if COMMON in names or any(_TORCH_DIST_KEY in key for key in keys):
            is_torch_dist = True
        elif self.ckpt_format is not None:
            is_torch_dist = self.ckpt_format not in DCP_FORMATS
        else:
            is_torch_dist = self.siblings.backend
        if is_torch_dist:
            raise IncompleteError("it has no metadata.json, which is written last")
        self._check_train_state(folder, names)

    def _check_train_state(self, folder: Path, names: set[str]) -> None:
        """Without it, Bridge would go on with this checkpoint from the first sample of the data."""
        if self.siblings.train_state and TRAIN_STATE not in names:
            raise IncompleteError(f"it has no {TRAIN_STATE}, which the one before it has")
        if TRAIN_STATE in names and _is_cut_off(folder / TRAIN_STATE):
            raise IncompleteError(f"its {TRAIN_STATE} is cut off")

    def _check_torch(self, folder: Path, iteration: int) -> None:
        cut_off = next((path for path in folder.glob("mp_rank_*/*.pt") if _is_cut_off(path)), None)
        if cut_off is not None:
            raise IncompleteError(f"{cut_off.relative_to(folder)} is cut off")
        if self.named is None:
            raise UnknownError(
                f"there is no {TRACKER}, the only sign that all ranks have saved; write "
                f"{iteration} into it to begin from there"
            )
        # a file that is there and cannot be read was being written, after the newest was saved
        saved = int(self.named) if self.named.isdigit() else 0 if self.named == "release" else None
        if saved is not None and saved < iteration:
            raise IncompleteError("Megatron has not noted it as saved")


def noted(folder: Path) -> int:
    """Return the iteration that Megatron noted last as saved in a folder; 0: none."""
    named = _named(folder)
    return int(named) if named is not None and named.isdigit() else 0


def _named(folder: Path) -> str | None:
    tracker = folder / TRACKER
    return tracker.read_text(errors="replace").strip() if tracker.exists() else None


def _siblings(folder: Path, named: str | None) -> _Siblings:
    others = _iterations(folder)
    noted = others.get(int(named)) if named is not None and named.isdigit() else None
    return _Siblings(
        backend=any((path / BACKEND).exists() for path in others.values()),
        integrity=noted is not None and (noted / INTEGRITY).exists(),
        train_state=noted is not None and (noted / TRAIN_STATE).exists(),
    )


def _iterations(folder: Path) -> dict[int, Path]:
    if not folder.is_dir():
        return {}
    matches = ((_FOLDER.match(path.name), path) for path in folder.iterdir() if path.is_dir())
    return {int(match[1]): path for match, path in matches if match}


def _only_shards(names: set[str]) -> bool:
    return all(name.endswith(".distcp") for name in names)


def _is_cut_off(path: Path) -> bool:
    """Whether this is the beginning of what torch.save writes: an archive without its end."""
    with path.open("rb") as file:
        begins_as_archive = file.read(4) in (b"", b"PK\x03\x04")
    return begins_as_archive and not zipfile.is_zipfile(path)


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


def _check_bytes(folder: Path) -> set[str]:
    """Check that the bytes that the index names are there; return the keys that are stored.

    An index whose layout is unknown here (another torch) is believed: that it is there is the mark.

    Raises:
        IncompleteError: a file is missing or too short, or the index is damaged.
    """
    try:
        needed, keys = _read_index(folder / INDEX)
    except (AttributeError, KeyError, TypeError):
        return set()
    except (pickle.UnpicklingError, EOFError, IndexError, ValueError) as error:
        raise IncompleteError(f"its .metadata cannot be read ({error})") from None
    for name, num_bytes in needed.items():
        path = folder / name
        size = path.stat().st_size if path.exists() else None
        if size is None:
            raise IncompleteError(f"{name} is missing")
        if size < num_bytes:
            raise IncompleteError(f"{name} has {size:,} of {num_bytes:,} bytes")
    return keys


def _read_index(index: Path) -> tuple[dict[str, int], set[str]]:
    """Return how long each file of a ``torch.distributed`` checkpoint has to be, and the keys.

    Raises:
        ValueError: it names no files.
        AttributeError, KeyError or TypeError: its layout is not known here.
    """
    with index.open("rb") as file:
        metadata = _IndexReader(file).load()
    places = metadata.state["storage_data"]
    if not places.values():
        raise ValueError("it names no files")
    needed: dict[str, int] = {}
    for place in places.values():
        name = place.state["relative_path"]
        needed[name] = max(needed.get(name, 0), place.state["offset"] + place.state["length"])
    return needed, set(metadata.state["state_dict_metadata"])
