"""The record beside a .bin/.idx pair: what `skyladder prepare` noted of the pair that it finished.

A record stays where it is when a file of the pair is deleted, cut off while it is copied, or
overwritten by another pair of the same name. So nothing is taken from a record before the pair
beside it was compared with it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from megatron_skyladder.data.indexed import HEADER, MAGIC, read_counts
from megatron_skyladder.files import write_text


def record_path(prefix: str) -> Path:
    return Path(f"{prefix}.prepared")


def read_record(prefix: str) -> dict[str, Any] | None:
    """Return what `skyladder prepare` noted about a finished pair, None where it made none.

    Raises:
        ValueError: the file is no record.
    """
    path = record_path(prefix)
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text())
    except ValueError:
        record = None
    if isinstance(record, dict) and {"settings", "tokens", "documents"} <= record.keys():
        return record
    raise ValueError(
        f"{path} is not a record of skyladder prepare: it is damaged, or another program wrote it. "
        "Delete it; to prepare the data again, delete .bin and .idx beside it too."
    )


def write_record(prefix: str, record: dict[str, Any]) -> None:
    write_text(record_path(prefix), json.dumps(record, indent=1) + "\n")


def misfit(prefix: str, record: dict[str, Any]) -> str:
    """Return in words why a pair is not the one that its record is of; empty where it is.

    Compared is what takes a few reads, whatever the pair's size: token type, documents and tokens
    in the .idx, and the bytes of the .bin.
    """
    idx, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (data, idx):
        if not path.is_file():
            return f"{path} does not exist"
    try:
        found = read_counts(prefix)
    except ValueError as error:
        return str(error)
    noted = record["settings"].get("dtype")
    if found.dtype.name != noted:
        return f"{idx} is of {found.dtype.name} tokens, noted was {noted}"
    for word, count in (("documents", found.num_documents), ("tokens", found.num_tokens)):
        if count != record.get(word):
            return f"{idx} is of {count} {word}, noted were {record.get(word)}"
    size, needed = data.stat().st_size, found.num_tokens * found.dtype.itemsize
    return "" if size == needed else f"{data} has {size} bytes of {needed}"


def is_remainder(prefix: str, record: dict[str, Any]) -> bool:
    """Return whether a pair that does not fit can be what is left of the one that was noted.

    Each file is missing, cut off, or as it was. Anything else was put there by somebody.
    """
    idx, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    dtype = np.dtype(record["settings"]["dtype"])
    if data.exists() and data.stat().st_size > record["tokens"] * dtype.itemsize:
        return False
    if not idx.exists():
        return True
    with idx.open("rb") as file:
        head = file.read(HEADER.size)
    if len(head) < HEADER.size:
        return MAGIC.startswith(head[: len(MAGIC)])
    try:
        found = read_counts(prefix)
    except ValueError:  # cut off further on, or no index at all
        magic, _, _, _, num_entries = HEADER.unpack(head)
        return bool(magic == MAGIC and num_entries == record["documents"] + 1)
    noted = (record["tokens"], record["documents"], dtype)
    return (found.num_tokens, found.num_documents, found.dtype) == noted
