"""The study's text: documents of packages, each once, some held out for validation."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_skyladder.errors import UsageError
from megatron_skyladder.files import sha256, whole, write_text
from megatron_skyladder.study.extract import plain_text
from megatron_skyladder.study.packages import Package

logger = logging.getLogger(__name__)

TRAIN, VALIDATION = "train.jsonl", "validation.jsonl"
RECORD = "corpus.json"
SHORTEST = 200  # characters; below are redirects and stubs
LONG = 8192  # characters: about the study's 2,048 tokens


@dataclass(frozen=True)
class Source:
    """What a package gave.

    Args:
        kind: as `Package.kind`.
        name: in its registry.
        version: exactly.
        file: as the registry calls it.
        sha256: of this file.
        documents: that were taken, duplicates left out.
        duplicates: documents that an earlier one repeats, blanks aside.
        num_bytes: of the documents, UTF-8.
    """

    kind: str
    name: str
    version: str
    file: str
    sha256: str
    documents: int
    duplicates: int
    num_bytes: int


def build(
    packages: Sequence[Package],
    folder: Path,
    validation_share: float,
    report: Callable[[str], None] = logger.info,
) -> dict[str, Any]:
    """Download the packages and write their documents, or find that written.

    Whether a document is held out depends on a hash of its text and on nothing else, so it stays so
    when packages are added. Documents are in an order of such hashes, too: each part of the
    training file has something of every package.

    Args:
        packages: in an order that decides which of two equal documents is the duplicate.
        folder: gets ``packages/``, the JSON lines `TRAIN` and `VALIDATION`, and `RECORD`.
        validation_share: of the documents, 0 to 1.
        report: is called with a line for each package.

    Returns:
        The record: what came from where, and totals.

    Raises:
        UsageError: a package cannot be had, or has no document.
    """
    request = {
        "packages": [asdict(package) for package in packages],
        "validation_share": validation_share,
    }
    request = json.loads(json.dumps(request))
    written = folder / RECORD
    if written.exists():
        record = json.loads(written.read_text(encoding="utf-8"))
        if record["request"] == request:
            return dict(record)
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[bytes] = set()
    documents: list[tuple[bytes, str, str]] = []
    sources = []
    for package in packages:
        before = len(documents)
        source = _read(package, folder / "packages", seen, documents)
        sources.append(source)
        report(
            f"{package.name} {package.version}: {source.documents:,} documents, "
            f"{source.num_bytes / 1e6:.1f} MB, {source.duplicates:,} duplicates left out"
        )
        if len(documents) == before:
            raise UsageError(
                f"{package.name} {package.version} has no document that matches "
                f"{' '.join(package.patterns)}. Look at what is in it: dpkg-deb --contents, or "
                "python -m zipfile -l."
            )
    documents.sort(key=lambda document: document[0])
    held_out = [document for document in documents if _share(document[0]) < validation_share]
    trained = [document for document in documents if _share(document[0]) >= validation_share]
    for name, part in ((TRAIN, trained), (VALIDATION, held_out)):
        if not part:
            raise UsageError(
                f"none of {len(documents)} documents is left for {name} with validation-share = "
                f"{validation_share}. Name more packages, or another share."
            )
        _write(folder / name, part)
    record = {
        "request": request,
        "sources": [asdict(source) for source in sources],
        "train": _totals(trained),
        "validation": _totals(held_out),
    }
    write_text(written, json.dumps(record, indent=1) + "\n")
    return record


def texts(path: Path, max_characters: int) -> Iterator[str]:
    """Yield the documents of a file that `build` wrote, until there are so many characters."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            text = json.loads(line)["text"]
            yield text
            max_characters -= len(text)
            if max_characters <= 0:
                return


def _read(
    package: Package, folder: Path, seen: set[bytes], documents: list[tuple[bytes, str, str]]
) -> Source:
    path = package.download(folder)
    taken = duplicates = num_bytes = 0
    for name, text in package.texts(path):
        text = plain_text(text)
        if len(text) < SHORTEST:
            continue
        digest = hashlib.sha256(" ".join(text.split()).encode()).digest()
        if digest in seen:
            duplicates += 1
            continue
        seen.add(digest)
        documents.append((digest, f"{package.name}/{name.lstrip('./')}", text))
        taken += 1
        num_bytes += len(text.encode())
    return Source(
        *(package.kind, package.name, package.version, path.name, sha256(path)),
        *(taken, duplicates, num_bytes),
    )


def _share(digest: bytes) -> float:
    """Return a number from 0 to 1 that is as good as drawn; not from the bytes that sort."""
    return int.from_bytes(digest[-8:], "big") / 2**64


def _write(path: Path, documents: Sequence[tuple[bytes, str, str]]) -> None:
    with whole(path) as partial, partial.open("w", encoding="utf-8") as out:
        for _, name, text in documents:
            out.write(json.dumps({"name": name, "text": text}) + "\n")


def _totals(documents: Sequence[tuple[bytes, str, str]]) -> dict[str, int]:
    lengths = [len(text) for _, _, text in documents]
    return {
        "documents": len(documents),
        "bytes": sum(len(text.encode()) for _, _, text in documents),
        "long_documents": sum(length >= LONG for length in lengths),
        "longest": max(lengths),
        "characters": sum(lengths),
        "characters_in_long": sum(length for length in lengths if length >= LONG),
    }
