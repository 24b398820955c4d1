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
from megatron_skyladder.megatron_lm.patching.definitions import Patch, PatchError


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


def choose_patch(folder: Path, line: str | None = None) -> Patch:
    """Return the patch for a checkout.

    Args:
        folder: the root of the checkout.
        line: a release line, instead of the one that the checkout's version says.

    Raises:
        PatchError: the folder is no Megatron-LM checkout, or there is no patch for it.
    """
    found = releases.megatron_in(folder)
    if found is None:
        raise PatchError(
            f"{folder} is not a Megatron-LM checkout: looked for megatron/core/"
            f"{releases.PACKAGE_INFO} in it. Give the folder that holds pretrain_gpt.py."
        )
    return definitions.load(line or found.line)


def examine(folder: Path, patch: Patch) -> list[FileState]:
    """Return the state of each file that a patch touches.

    Raises:
        PatchError: a place is not found; the message lists all that are not.
    """
    states, complaints = [], []
    for name in patch.files:
        path = (folder / name).resolve()
        if not path.is_file():
            complaints.append(
                f"{name}: looked for this file; there is none. {_nearest(folder, name)}"
            )
            continue
        try:
            state, errors = _examine_file(name, path, patch)
        except PatchError as error:
            errors = [error]
        else:
            states.append(state)
        complaints += [str(error) for error in errors]
    if complaints:
        raise PatchError(
            f"{folder} does not fit the patch for Megatron {patch.line}, and nothing was changed:\n"
            + "\n".join(f"  {complaint}" for complaint in complaints)
        )
    return states


def _nearest(folder: Path, name: str) -> str:
    """Say where a checkout has files that are called like the one that is missing."""
    candidates = (path.relative_to(folder) for path in folder.rglob(Path(name).name))
    nearest = sorted(candidates, key=lambda path: (len(path.parts), path))[: places.NUM_CANDIDATES]
    return f"Nearest: {', '.join(map(str, nearest)) or 'nothing like it'}."


def _examine_file(name: str, path: Path, patch: Patch) -> tuple[FileState, list[PatchError]]:
    current = path.read_bytes()
    text, encoding = _decode(name, current)
    stock = places.without_marked_lines(text)
    wanted = [place for place in patch.places if place.file == name]
    patched, errors = places.insert(stock, wanted)
    return FileState(name, path, current, stock.encode(encoding), patched.encode(encoding)), errors


def _decode(name: str, content: bytes) -> tuple[str, str]:
    """Decode as Python would, by byte-order mark or coding comment."""
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        return content.decode(encoding), encoding
    except (SyntaxError, UnicodeDecodeError) as error:
        raise PatchError(f"{name} cannot be read as Python source: {error}.") from None


def marked_files(folder: Path) -> list[FileState]:
    """Return the files with inserted lines, of whatever patch, ready to be put back to stock."""
    names = [name for line in definitions.known_lines() for name in definitions.load(line).files]
    states = []
    for name in dict.fromkeys(names):
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
    with os.fdopen(handle, "wb") as temporary:
        temporary.write(content)
        os.fchmod(temporary.fileno(), original.st_mode & 0o7777)
        with contextlib.suppress(PermissionError):
            os.fchown(temporary.fileno(), original.st_uid, original.st_gid)
    return Path(name)
