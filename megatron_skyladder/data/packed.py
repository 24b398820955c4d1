"""The reference code's packed files -> .bin/.idx, without tokenizing again.

A packed file (lit_gpt/packed_dataset.py of sail-sg/SkyLadder and of TinyLlama), little-endian:

    7 bytes   b"LITPKDS"
    uint64    version, 1
    uint8     the token type; integers have the codes of Megatron's format
    uint64    num_tokens
    tokens    documents that end in EOS, one after the other

One process wrote NAME_PROCESS_0000000000.bin, NAME_PROCESS_0000000001.bin and so on: a document
that one file cuts off goes on in the next.
"""

from __future__ import annotations

import glob
import logging
import re
import struct
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_skyladder.data.encode import Documents
from megatron_skyladder.data.identity import identity
from megatron_skyladder.data.indexed import DTYPES
from megatron_skyladder.data.output import ResumableOutput, finished_records, opened
from megatron_skyladder.data.progress import Progress, ProgressMeter
from megatron_skyladder.data.sources import InputFile, Place

logger = logging.getLogger(__name__)

MAGIC = b"LITPKDS"
HEADER = struct.Struct("<7sQBQ")
KEY = "text"  # the reference encodes one field


class PackedFile(NamedTuple):
    """One packed file and where it belongs: the ``number``-th that ``stream`` was cut into."""

    path: Path
    stream: str
    number: int
    dtype: np.dtype
    num_tokens: int

    def follows(self, other: PackedFile) -> bool:
        """Whether a document that ``other`` cuts off goes on here."""
        return self.stream == other.stream and self.number == other.number + 1

    def tokens(self) -> np.ndarray:
        return np.memmap(
            self.path, dtype=self.dtype, mode="r", offset=HEADER.size, shape=(self.num_tokens,)
        )


class Part(NamedTuple):
    """Whole documents of the packed files, and the place in them where the next part begins."""

    documents: Documents
    next_place: Place
    cut_off: int = 0
    padding: int = 0


def unpack(
    inputs: list[str],
    output_prefix: str,
    eod: int,
    report: Callable[[Progress], None],
    *,
    same_input: bool = False,
) -> list[dict[str, Any]]:
    """Write the documents of packed files into ``PREFIX_text_document.bin`` and ``.idx``.

    The tokens stay as they are and in their order. A document ends after an EOS; what a process
    left unfinished in its last file is a document without EOS. Padding at the end of a last file
    (one token over and over after the last EOS) is left out.

    Args:
        inputs: folders, files or patterns, all of one data set.
        output_prefix: see above.
        eod: the EOS token; the files do not say.
        report: called after every file.
        same_input: large files of another time than in an earlier run are the same.

    Raises:
        ValueError: something the user can fix; the work so far is kept.
    """
    files = find_packed(inputs)
    named = [InputFile(f.path, f.path.name, "packed", f.path.stat().st_size) for f in files]
    settings = {
        **identity(named, "packed"),
        "num_files": len(files),
        "num_bytes": sum(file.num_bytes for file in named),
        "eod": eod,
        "dtype": files[0].dtype.name,
    }
    records = finished_records(output_prefix, [KEY], settings, same_input=same_input)
    if records is not None:
        logger.info("%s is prepared already: nothing to do", output_prefix)
        return records
    output = ResumableOutput(output_prefix, [KEY], files[0].dtype, settings, same_input=same_input)
    with opened(output):
        read_bytes = list(accumulate(file.num_bytes for file in named))  # up to each file
        meter = ProgressMeter(output, read_bytes[-1], report)
        for part in read_documents(files, eod, output.place):
            output.add(
                {KEY: part.documents}, part.next_place, cut_off=part.cut_off, padding=part.padding
            )
            meter.show(read_bytes[min(part.next_place.file, len(named) - 1)])
        if output.counts["cut_off"] == sum(p.num_documents for p in output.positions.values()):
            raise ValueError(
                f"token {eod} is nowhere in the packed files, so it cannot be their EOS. Give the "
                "tokenizer's: --eod-id 2 for Llama-2, 0 for StarCoder."
            )
        return output.finish()


def find_packed(inputs: list[str]) -> list[PackedFile]:
    """Return the packed files of one data set, those of a process one after the other.

    Raises:
        ValueError: there are none, one is damaged, or they belong to several data sets.
    """
    paths: list[Path] = []
    for given in inputs:
        # in a folder, names end in a number, so that an output beside them is not taken for input
        pattern = f"{glob.escape(given)}/*[0-9].bin" if Path(given).is_dir() else given
        found = sorted(glob.glob(pattern))
        if not found:
            raise ValueError(f"--from-packed {given}: no packed .bin files there.")
        paths += map(Path, found)
    files = sorted((_packed_file(path) for path in paths), key=lambda f: (f.stream, f.number))
    data_sets = sorted({re.sub(r"_\d+$", "", file.stream) for file in files})
    if len(data_sets) > 1:
        raise ValueError(
            f"the packed files belong to {len(data_sets)} data sets: {', '.join(data_sets)}. "
            f"Prepare each for itself, such as --from-packed '{paths[0].parent}/{data_sets[0]}_*', "
            "and give Megatron both (--train-data-path and --valid-data-path)."
        )
    types = sorted({file.dtype.name for file in files})
    if len(types) > 1:
        raise ValueError(f"the packed files hold {' and '.join(types)} tokens. Prepare each kind.")
    return files


def read_documents(files: list[PackedFile], eod: int, start: Place) -> Iterator[Part]:
    """Yield the documents in order, from a place an earlier `Part` gave as its ``next_place``."""
    open_parts: list[np.ndarray] = []  # of a document whose EOS has not come yet
    for index in range(start.file, len(files)):
        file = files[index]
        if open_parts and not file.follows(files[index - 1]):
            yield _unfinished(open_parts, Place(index))
            open_parts = []
        begin = start.offset if index == start.file else 0
        tokens = file.tokens()[begin:]
        ends = np.flatnonzero(tokens == eod) + 1
        if len(ends):
            whole = np.concatenate([*open_parts, tokens[: ends[-1]]])
            lengths = np.diff(ends, prepend=0)
            lengths[0] += sum(len(part) for part in open_parts)
            yield Part(_documents(whole, lengths), Place(index, begin + int(ends[-1])))
            open_parts, tokens = [], tokens[ends[-1] :]
        if len(tokens):
            open_parts.append(tokens)
    if open_parts:
        yield _unfinished(open_parts, Place(len(files)))


def _unfinished(parts: list[np.ndarray], next_place: Place) -> Part:
    """Return what follows a process's last EOS: padding, or a document that was cut off."""
    tokens = np.concatenate(parts)
    if len(tokens) > 1 and np.all(tokens == tokens[0]):
        return Part(_documents(tokens[:0], np.zeros(0, int)), next_place, padding=len(tokens))
    return Part(_documents(tokens, np.array([len(tokens)])), next_place, cut_off=1)


def _documents(tokens: np.ndarray, lengths: np.ndarray) -> Documents:
    return Documents(tokens, lengths.astype("<i4"), np.ones(len(lengths), dtype=np.int64))


def _packed_file(path: Path) -> PackedFile:
    with open(path, "rb") as file:
        head = file.read(HEADER.size)
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise ValueError(f"{path} is no packed file: it does not start with LITPKDS.")
    _, version, code, num_tokens = HEADER.unpack(head)
    dtype = DTYPES.get(code)
    if version != 1 or dtype is None or dtype.kind == "f":
        raise ValueError(
            f"{path} has version {version} and token type {code}; this reads version 1 with "
            "integer tokens."
        )
    size, needed = path.stat().st_size, HEADER.size + num_tokens * dtype.itemsize
    if size != needed:
        raise ValueError(f"{path} has {size:,} bytes where {needed:,} are needed. Copy it again.")
    stream, _, number = path.stem.rpartition("_")
    if not number.isdigit():  # renamed: a stream of its own
        return PackedFile(path, path.stem, 0, dtype, num_tokens)
    return PackedFile(path, stream, int(number), dtype, num_tokens)
