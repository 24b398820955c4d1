"""Files that are there whole or not at all: written under another name, then renamed; and locks."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megatron_skyladder.errors import UsageError

PARTIAL = ".partial"  # how the names end that files are written under
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # Lustre without flock, among others


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


def lock(file: IO[Any] | int, kind: int, what: str | Path) -> None:
    """Lock an open file against other commands, until it is closed.

    Args:
        file: it, or its descriptor.
        kind: as for `fcntl.flock`.
        what: is protected by it, for the message.

    Raises:
        BlockingIOError: another command holds it, and ``kind`` says not to wait.
        UsageError: the file system has no locks.
    """
    try:
        fcntl.flock(file, kind)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise UsageError(
            f"cannot lock {what} against other commands: {error.strerror}. Give a folder on a file "
            "system with locks (for Lustre, one mounted with flock), and move what is made there."
        ) from None


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file, whole or not at all."""
    with whole(path) as partial:
        partial.write_bytes(data)
