"""A patch and a folder: what would change, and changing it, all or nothing."""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import tempfile
import tokenize
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_skyladder.megatron_lm import releases
from megatron_skyladder.megatron_lm.patching import definitions, places
from megatron_skyladder.megatron_lm.patching.definitions import Patch, PatchError, Place
from megatron_skyladder.megatron_lm.patching.places import Insertion
from megatron_skyladder.megatron_lm.releases import Megatron


@dataclass(frozen=True)
class FileState:
    """One file of a checkout: as it is, as it was without a patch, and as it is with one.

    Args:
        name: path from the root of the checkout.
        path: the file itself, symbolic links resolved.
        current: its bytes now.
        stock: its bytes without marked lines.
        patched: its bytes with the patch's lines.
    """

    name: str
    path: Path
    current: bytes
    stock: bytes
    patched: bytes


@dataclass(frozen=True)
class Fit:
    """Where the lines of one place go in one checkout."""

    place: Place
    insertion: Insertion

    def __str__(self) -> str:
        return f"{self.place.file}:{self.insertion.index + 1}, {self.insertion.anchor}"


def version_of(folder: Path) -> Megatron:
    """Return which Megatron a checkout is.

    Raises:
        PatchError: the folder is no Megatron-LM checkout.
    """
    found = releases.megatron_in(folder)
    if found is None:
        raise PatchError(
            f"{folder} is not a Megatron-LM checkout: looked for megatron/core/"
            f"{releases.PACKAGE_INFO} in it. Give the folder that holds pretrain_gpt.py."
        )
    return found


def examine(folder: Path, patch: Patch) -> tuple[list[FileState], list[Fit]]:
    """Return the state of each file that a patch touches, and where each place lies.

    Raises:
        PatchError: a place is not found. The message lists all that are not, with what is there
            instead, and all lines with where they go, to insert them by hand.
    """
    states, fits = [], []
    complaints: dict[Place, PatchError] = {}
    for name in patch.files:
        wanted = [place for place in patch.places if place.file == name]
        path = (folder / name).resolve()
        if not path.is_file():
            if all(place.optional for place in wanted):
                continue
            missing = PatchError(
                f"{name}: looked for this file; there is none. {_nearest(folder, name)}"
            )
            complaints |= dict.fromkeys(wanted, missing)
            continue
        try:
            state, found, errors = _examine_file(name, path, wanted)
        except PatchError as error:
            complaints |= dict.fromkeys(wanted, error)
            continue
        states.append(state)
        fits += [Fit(place, insertion) for place, insertion in found.items()]
        complaints |= errors
    if complaints:
        raise PatchError(_refusal(folder, patch, fits, complaints))
    return states, fits


def _refusal(
    folder: Path, patch: Patch, fits: list[Fit], complaints: dict[Place, PatchError]
) -> str:
    lines = [f"{folder} does not fit the patch, and nothing was changed. What does not fit:"]
    lines += [f"  {complaint}" for complaint in dict.fromkeys(map(str, complaints.values()))]
    lines.append("What can be done: insert the lines by hand, indented as their neighbours are.")
    where = {fit.place: str(fit) for fit in fits}
    for place in patch.places:
        if place.optional and not (folder / place.file).is_file():
            continue
        alternatives = " or ".join(str(anchor) for anchor in place.anchors)
        lines.append(f"  {where.get(place, f'{place.file}, {alternatives} or what stands for it')}")
        lines += [f"      {line}" for line in place.lines]
    return "\n".join(lines)


def _nearest(folder: Path, name: str) -> str:
    """Say where a checkout has files that are called like the one that is missing."""
    candidates = (path.relative_to(folder) for path in folder.rglob(Path(name).name))
    nearest = sorted(candidates, key=lambda path: (len(path.parts), path))[: places.NUM_CANDIDATES]
    return f"Nearest: {', '.join(map(str, nearest)) or 'nothing like it'}."


def _examine_file(
    name: str, path: Path, wanted: list[Place]
) -> tuple[FileState, dict[Place, Insertion], dict[Place, PatchError]]:
    current = path.read_bytes()
    text, encoding = _decode(name, current)
    stock = places.without_marked_lines(text)
    patched, found, errors = places.insert(stock, wanted)
    state = FileState(name, path, current, stock.encode(encoding), patched.encode(encoding))
    return state, found, errors


def _decode(name: str, content: bytes) -> tuple[str, str]:
    """Decode as Python would, by byte-order mark or coding comment."""
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        return content.decode(encoding), encoding
    except (SyntaxError, UnicodeDecodeError) as error:
        raise PatchError(f"{name} cannot be read as Python source: {error}.") from None


def marked_files(folder: Path) -> list[FileState]:
    """Return the files with inserted lines, ready to be put back to stock."""
    states = []
    for name in definitions.load().files:
        path = (folder / name).resolve()
        if path.is_file():
            current = path.read_bytes()
            text, encoding = _decode(name, current)
            stock = places.without_marked_lines(text).encode(encoding)
            if stock != current:
                states.append(FileState(name, path, current, stock, current))
    return states


def diff(changes: Iterable[tuple[str, bytes, bytes]]) -> str:
    """Return a unified diff that ``git apply`` and ``patch -p1`` take.

    Args:
        changes: name, bytes before and bytes after, for each file.
    """
    parts = []
    for name, before, after in changes:
        old, new = (_decode(name, content)[0] for content in (before, after))
        for line in difflib.unified_diff(
            places.split_lines(old), places.split_lines(new), f"a/{name}", f"b/{name}"
        ):
            parts.append(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n")
    return "".join(parts)


def write(changes: Iterable[tuple[Path, bytes]]) -> None:
    """Write files, all or none: temporaries first, then renames, undone where one fails.

    Modes stay as they are.
    """
    staged: list[tuple[Path, Path]] = []
    renamed: list[tuple[Path, bytes]] = []
    try:
        for path, content in changes:
            staged.append((path, _write_beside(path, content)))
        for path, temporary in staged:
            before = path.read_bytes()
            os.replace(temporary, path)
            renamed.append((path, before))
    except BaseException:
        for path, before in renamed:
            os.replace(_write_beside(path, before), path)
        for _, temporary in staged:
            temporary.unlink(missing_ok=True)
        raise


def _write_beside(path: Path, content: bytes) -> Path:
    """Write a temporary file in the same folder, with the mode and owner of the original."""
    original = path.stat()
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as temporary:
            temporary.write(content)
            os.fchmod(temporary.fileno(), original.st_mode & 0o7777)
            with contextlib.suppress(PermissionError):
                os.fchown(temporary.fileno(), original.st_uid, original.st_gid)
    except BaseException:  # a full disk, and nobody knows the name yet
        os.unlink(name)
        raise
    return Path(name)
