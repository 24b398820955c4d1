"""Whether input is the same as when a run began: by names, sizes and what the files hold.

Small files are hashed whole. Of large ones a sample is hashed, blocks spread over the file, and the
time of their last change is noted too: a change outside of the sample is not missed, it is asked
about.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_skyladder.data.sources import InputFile

BLOCK_BYTES = 16 * 1024
FILE_BYTES = 64 * 1024, 8 * 1024**2  # hashed of a file: at least, at most
TOTAL_BYTES = 256 * 1024**2  # of all files, where they are few enough
THREADS = 16  # files are many, and their places far away
FILES_AT_ONCE = 1024  # handed to the threads: each takes a Future, and there may be millions
CHANGED = "modified"  # what may differ where a user says that the files are the same


def identity(files: Sequence[InputFile], name: str = "inputs") -> dict[str, Any]:
    """Return what tells these files from others, for the settings of a run.

    Returns:
        ``name``: changes with names, sizes, formats, order and content. ``names``: with all but the
        content, as runs of earlier versions noted it. ``modified``: with the times of the last
        change of files that are not hashed whole.
    """
    budget = TOTAL_BYTES // max(1, len(files))
    num_bytes = max(FILE_BYTES[0], min(FILE_BYTES[1], budget))
    content, names, times = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
    is_sampled = False
    with ThreadPoolExecutor(THREADS) as pool:
        for first in range(0, len(files), FILES_AT_ONCE):
            some = files[first : first + FILES_AT_ONCE]
            hashes = pool.map(lambda file: _hash(file, num_bytes), some)
            for file, hashed in zip(some, hashes, strict=True):
                line = f"{file.name}\t{file.num_bytes}\t{file.format}\n"
                names.update(_bytes(line))
                content.update(_bytes(line + hashed))
                if file.num_bytes > num_bytes:
                    is_sampled = True
                    times.update(_bytes(f"{file.name}\t{file.path.stat().st_mtime_ns}\n"))
    return {
        name: _short(content),
        "names": _short(names),
        CHANGED: _short(times) if is_sampled else None,
    }


def digest(files: Sequence[InputFile]) -> str:
    """Return a short text that changes with names, sizes, formats, order or content of files."""
    return str(identity(files)["inputs"])


def differences(before: dict[str, Any], now: dict[str, Any], *, same_input: bool) -> list[str]:
    """Return in which settings two runs differ, each in words.

    Args:
        before: settings of an earlier run.
        now: of this one.
        same_input: whether a user says that files with other times are the same.
    """
    if "names" in now and "names" not in before:  # noted when names and sizes were compared alone
        before = {**{key: now[key] for key in ("names", CHANGED)}, **before}
        kind = "packed" if "packed" in now else "inputs"
        if before.get(kind) == now["names"]:
            before[kind] = now[kind]
    changed = [
        name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)
    ]
    if same_input and changed == [CHANGED]:
        return []
    words = {
        "inputs": "the input files are others (names, sizes, order or content)",
        "packed": "the packed files are others (names, sizes, order or content)",
        CHANGED: "large input files were changed since, or copied without their times; if they are "
        "the same all the same, say so with --same-input",
    }
    hidden = (
        {"names", "num_files", "num_bytes"} if {"inputs", "packed"} & set(changed) else {"names"}
    )
    return [
        words.get(name, f"{name} was {before.get(name)} and is {now.get(name)}")
        for name in changed
        if name not in hidden and not (name == CHANGED and len(changed) > 1)
    ]


def _hash(file: InputFile, num_bytes: int) -> str:
    """Hash a file whole, or as many bytes of it as blocks from its first to its last byte."""
    state = hashlib.blake2b(digest_size=16)
    with open(file.path, "rb") as stream:
        if file.num_bytes <= num_bytes:
            state.update(stream.read())
        else:
            blocks = num_bytes // BLOCK_BYTES
            for block in range(blocks):
                stream.seek((file.num_bytes - BLOCK_BYTES) * block // (blocks - 1))
                state.update(stream.read(BLOCK_BYTES))
    return state.hexdigest()


def _short(state: hashlib._Hash) -> str:
    return state.hexdigest()[:16]


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogateescape")  # names of files need not be UTF-8
