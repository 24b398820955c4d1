"""A corpus of real documents that every machine with CPython has: its standard library.

One document a documentation topic (``help("for")`` and its like) and one a source file, in an order
that depends on nothing but their names.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from megatron_skyladder.files import whole

logger = logging.getLogger(__name__)

_LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "__pycache__"}


def documents() -> Iterator[tuple[str, str]]:
    """Yield (name, text) of every topic and source file of the running Python."""
    from pydoc_data import topics

    for name, text in topics.topics.items():
        yield f"topic/{name}", text
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if not _LEFT_OUT.intersection(parts):
            yield "source/" + "/".join(parts), path.read_text(encoding="utf-8", errors="replace")


def write_corpus(path: Path) -> int:
    """Write the documents as JSON lines, shuffled by a hash of their names; return their number.

    The same Python version gives the same file everywhere, so that the last documents can be held
    out for validation.
    """
    shuffled = sorted(documents(), key=lambda item: hashlib.sha256(item[0].encode()).digest())
    with whole(path) as partial, partial.open("w", encoding="utf-8") as out:
        for name, text in shuffled:
            out.write(json.dumps({"name": name, "text": text}) + "\n")
    return len(shuffled)


def texts(corpus: Path) -> Iterator[str]:
    """Yield the documents of a file that `write_corpus` wrote."""
    with corpus.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]
