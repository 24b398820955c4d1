"""Files that are there whole or not at all: written under another name, then renamed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"  # how the names end that files are written under


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """Yield the name to write a file under; it gets its own name when the block ends well.

    A block that raises leaves an earlier file as it was. What was written is on the disk before the
    name is: no crash leaves an empty file behind. Two processes may write the same file.

    Args:
        path: of the file, in a folder that is there.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def sha256(path: str | Path) -> str:
    """Return the hash of a file's bytes, in hexadecimal digits."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()  # file_digest needs Python 3.11


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file, whole or not at all."""
    with whole(path) as partial:
        partial.write_bytes(data)
