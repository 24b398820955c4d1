"""Megatron's .bin/.idx files: a writer that can be stopped and resumed, and a memory-mapped reader.

The .bin holds the tokens of all documents, one after the other. The .idx, little-endian:

    9 bytes   b"MMIDIDX\\0\\0"
    uint64    version, 1
    uint8     the token type: a key of DTYPES
    uint64    num_sequences
    uint64    num_documents + 1
    int32     [num_sequences]      tokens of each sequence
    int64     [num_sequences]      byte offset of each sequence in the .bin
    int64     [num_documents + 1]  first sequence of each document; the last entry is num_sequences

A document is one sequence, except where its text was a list of strings: then it has one sequence
for each of them that has tokens. An empty document has none.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPES: dict[int, np.dtype] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}
HEADER = struct.Struct("<9sQBQQ")
CHUNK = 1 << 20  # sequences that are looked at together, so that memory stays flat
BUFFER_BYTES = 1 << 20


def best_dtype(vocab_size: int) -> np.dtype:
    """Return the type Megatron stores tokens of this vocabulary in: uint16 below 65,500."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


class WriterPosition(NamedTuple):
    """How much of a document collection has been written: all it takes to go on from there."""

    num_tokens: int
    num_sequences: int
    num_documents: int


class IndexedWriter:
    """Writes ``PREFIX.bin`` and ``PREFIX.idx``.

    Everything goes to ``PREFIX.*.partial`` until `close` gives the files their names, so a pair
    that has its names is complete. Memory does not grow with the number of documents.

    Args:
        prefix: path without ``.bin``/``.idx``.
        dtype: type of the stored tokens, see `best_dtype`.
        resume_at: what an earlier writer's `flush` returned, to go on after it; what that writer
            wrote later is cut off. None starts anew.

    Raises:
        ValueError: the partial files are shorter than resume_at says.
    """

    def __init__(
        self, prefix: str | Path, dtype: Any, *, resume_at: WriterPosition | None = None
    ) -> None:
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype)
        self._code = _code_of(self.dtype)
        self.position = resume_at or WriterPosition(0, 0, 0)
        Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
        if resume_at is not None:
            self._take_back_name()
        self._bin = self._open("bin", self.position.num_tokens * self.dtype.itemsize, resume_at)
        self._lengths = self._open("lengths", self.position.num_sequences * 4, resume_at)
        self._documents = self._open("documents", self.position.num_documents * 8, resume_at)

    def add_document(
        self, tokens: Sequence[int] | np.ndarray, sequence_lengths: Sequence[int] | None = None
    ) -> None:
        """Append one document.

        Args:
            tokens: its tokens, end-of-document token included. None at all is an empty document.
            sequence_lengths: tokens of each of its sequences; default: one sequence.
        """
        array = np.asarray(tokens)
        if sequence_lengths is None:
            sequence_lengths = [len(array)] if len(array) else []
        self.add_documents(
            fit_tokens(array, self.dtype),
            np.asarray(sequence_lengths, dtype="<i4"),
            np.asarray([len(sequence_lengths)]),
        )

    def add_documents(
        self, tokens: np.ndarray, sequence_lengths: np.ndarray, num_sequences: np.ndarray
    ) -> None:
        """Append several documents whose tokens are laid out one after the other.

        Args:
            tokens: [num_tokens], of the writer's dtype.
            sequence_lengths: int32, [sum(num_sequences)], in tokens.
            num_sequences: int, [num_documents], sequences of each document.
        """
        assert tokens.dtype == self.dtype and sequence_lengths.dtype == np.dtype("<i4")
        assert sequence_lengths.sum(dtype=np.int64) == len(tokens), "lengths and tokens disagree"
        assert num_sequences.sum() == len(sequence_lengths), "documents and sequences disagree"
        ends = self.position.num_sequences + np.cumsum(num_sequences, dtype="<i8")
        self._bin.write(memoryview(np.ascontiguousarray(tokens)).cast("B"))
        self._lengths.write(sequence_lengths.tobytes())
        self._documents.write(ends.tobytes())
        self.position = WriterPosition(
            self.position.num_tokens + len(tokens),
            self.position.num_sequences + len(sequence_lengths),
            self.position.num_documents + len(num_sequences),
        )

    def flush(self) -> WriterPosition:
        """Bring everything so far onto the disk and return the position to resume at."""
        for file in (self._bin, self._lengths, self._documents):
            file.flush()
            os.fsync(file.fileno())
        return self.position

    def close(self) -> None:
        """Write the index and give both files their names. Safe to repeat after a crash."""
        self.flush()
        for file in (self._bin, self._lengths, self._documents):
            file.close()
        with open(self._partial("idx"), "wb") as idx:
            self._write_index(idx)
            idx.flush()
            os.fsync(idx.fileno())
        os.replace(self._partial("bin"), f"{self.prefix}.bin")
        os.replace(self._partial("idx"), f"{self.prefix}.idx")
        os.remove(self._partial("lengths"))
        os.remove(self._partial("documents"))

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:  # the partial files stay, for a writer that resumes
            self.abandon()

    def abandon(self) -> None:
        """Close the files as they are, without giving them their names."""
        for file in (self._bin, self._lengths, self._documents):
            file.close()

    def _partial(self, part: str) -> str:
        return f"{self.prefix}.{part}.partial"

    def _open(self, part: str, num_bytes: int, resume_at: WriterPosition | None) -> BinaryIO:
        path = self._partial(part)
        if resume_at is None:
            return open(path, "wb", buffering=BUFFER_BYTES)
        size = os.path.getsize(path) if os.path.exists(path) else 0
        if size < num_bytes:
            raise ValueError(
                f"{path} has {size:,} bytes, but {num_bytes:,} had been written. Something changed "
                "it since; delete the .partial files and the journal beside it to start over."
            )
        file = open(path, "r+b", buffering=BUFFER_BYTES)  # noqa: SIM115 (close or abandon)
        file.truncate(num_bytes)
        file.seek(num_bytes)
        return file

    def _take_back_name(self) -> None:
        """Undo the first half of a `close` that was killed between its two renames."""
        if os.path.exists(f"{self.prefix}.bin") and not os.path.exists(self._partial("bin")):
            os.replace(f"{self.prefix}.bin", self._partial("bin"))

    def _write_index(self, idx: BinaryIO) -> None:
        _, num_sequences, num_documents = self.position
        idx.write(HEADER.pack(MAGIC, VERSION, self._code, num_sequences, num_documents + 1))
        lengths = _map(self._partial("lengths"), "<i4", 0, num_sequences)
        for start in range(0, num_sequences, CHUNK):
            idx.write(lengths[start : start + CHUNK].tobytes())
        offset = np.int64(0)
        for start in range(0, num_sequences, CHUNK):
            ends = offset + np.cumsum(lengths[start : start + CHUNK], dtype="<i8")
            pointers = np.concatenate(([offset], ends[:-1])) * self.dtype.itemsize
            idx.write(pointers.astype("<i8").tobytes())
            offset = ends[-1]
        idx.write(np.zeros(1, dtype="<i8").tobytes())
        documents = _map(self._partial("documents"), "<i8", 0, num_documents)
        for start in range(0, num_documents, CHUNK):
            idx.write(documents[start : start + CHUNK].tobytes())


class IndexedReader:
    """Reads ``PREFIX.bin`` and ``PREFIX.idx`` through memory maps.

    ``len(reader)`` is the number of documents and ``reader[i]`` the tokens of document i.

    Attributes:
        tokens: [num_tokens], all documents one after the other.
        sequence_lengths: int32, [num_sequences], in tokens.
        document_indices: int64, [num_documents + 1], the first sequence of each document.

    Raises:
        ValueError: a file is missing, not in this format, or its size is not what the index says.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        idx, bin_path = f"{self.prefix}.idx", f"{self.prefix}.bin"
        for path in (idx, bin_path):
            if not os.path.exists(path):
                raise ValueError(
                    f"{path} does not exist. Give the path without .bin or .idx, such as "
                    "data/cc_text_document."
                )
        self.dtype, num_sequences, num_documents = _read_header(idx)
        offset = HEADER.size
        self.sequence_lengths = _map(idx, "<i4", offset, num_sequences)
        offset += 12 * num_sequences  # the lengths and the pointers, which the lengths imply
        self.document_indices = _map(idx, "<i8", offset, num_documents + 1)
        starts = np.zeros(num_sequences + 1, dtype=np.int64)  # of sequences, and the token total
        starts[1:] = self.sequence_lengths  # a sum from the map itself takes a copy
        np.cumsum(starts, out=starts)
        self.num_tokens = int(starts[-1])
        size, needed = os.path.getsize(bin_path), self.num_tokens * self.dtype.itemsize
        if size != needed:
            raise ValueError(
                f"{bin_path} has {size:,} bytes, but its index stands for {needed:,}. The two do "
                "not belong together, or one was cut off while it was copied."
            )
        self.tokens = _map(bin_path, self.dtype, 0, self.num_tokens)
        one_each = _counts_up(self.document_indices, num_sequences)
        self._document_starts = starts if one_each else starts[self.document_indices]

    def __len__(self) -> int:
        return len(self.document_indices) - 1

    def __getitem__(self, document: int) -> np.ndarray:
        if not 0 <= document < len(self):
            raise IndexError(f"document {document} of {len(self)}")
        start, end = self._document_starts[document : document + 2]
        return self.tokens[start:end]

    @property
    def document_lengths(self) -> np.ndarray:
        """Tokens of each document, int64 [num_documents]."""
        return np.diff(self._document_starts)

    @property
    def document_starts(self) -> np.ndarray:
        """First token of each document and the token total, int64 [num_documents + 1]."""
        return self._document_starts


def _counts_up(indices: np.ndarray, last: int) -> bool:
    """Return whether these are 0, 1, 2 and so on up to the last: each document is one sequence."""
    if len(indices) != last + 1:
        return False
    starts = range(0, len(indices), CHUNK)
    chunks = ((start, indices[start : start + CHUNK]) for start in starts)
    return all((chunk == np.arange(start, start + len(chunk))).all() for start, chunk in chunks)


class Counts(NamedTuple):
    """How much a pair holds, by its index."""

    num_tokens: int
    num_documents: int
    dtype: np.dtype


def read_counts(prefix: str | Path) -> Counts:
    """Return how much a pair holds; takes two reads of its index and none of its .bin.

    Args:
        prefix: path without ``.bin``/``.idx``.

    Raises:
        ValueError: the index is damaged.
    """
    idx = f"{prefix}.idx"
    dtype, num_sequences, num_documents = _read_header(idx)
    if not num_sequences:
        return Counts(0, num_documents, dtype)
    lengths = _map(idx, "<i4", HEADER.size, num_sequences)
    pointers = _map(idx, "<i8", HEADER.size + 4 * num_sequences, num_sequences)
    num_tokens = int(pointers[-1]) // dtype.itemsize + int(lengths[-1])
    return Counts(num_tokens, num_documents, dtype)


def count_empty(prefix: str | Path) -> int:
    """Return how many documents of a pair have no tokens; reads its list of documents.

    Args:
        prefix: path without ``.bin``/``.idx``.

    Raises:
        ValueError: the index is damaged.
    """
    idx = f"{prefix}.idx"
    _, num_sequences, num_documents = _read_header(idx)
    firsts = _map(idx, "<i8", HEADER.size + 12 * num_sequences, num_documents + 1)
    empty = 0
    for start in range(0, num_documents, CHUNK):
        empty += int((np.diff(firsts[start : start + CHUNK + 1]) == 0).sum())
    return empty


def last_tokens(prefix: str | Path, count: int) -> np.ndarray:
    """Return the last tokens of some documents, spread evenly over a pair.

    Takes a few reads per document, where an `IndexedReader` goes through the whole index.

    Args:
        prefix: path without ``.bin``/``.idx``.
        count: documents to look at; those without tokens are passed over.

    Raises:
        ValueError: the index is damaged, or the .bin does not belong to it.
    """
    idx, bin_path = f"{prefix}.idx", f"{prefix}.bin"
    dtype, num_sequences, num_documents = _read_header(idx)
    lengths = _map(idx, "<i4", HEADER.size, num_sequences)
    pointers = _map(idx, "<i8", HEADER.size + 4 * num_sequences, num_sequences)
    starts = _map(idx, "<i8", HEADER.size + 12 * num_sequences, num_documents + 1)
    documents = np.unique(np.linspace(0, num_documents - 1, min(count, num_documents), dtype=int))
    last = starts[documents + 1][starts[documents + 1] > starts[documents]] - 1
    last = last[lengths[last] > 0]
    places = pointers[last] // dtype.itemsize + lengths[last] - 1
    num_tokens = os.path.getsize(bin_path) // dtype.itemsize
    if len(places) and places.max() >= num_tokens:
        raise ValueError(
            f"{bin_path} has {num_tokens:,} tokens, but its index goes on to token "
            f"{int(places.max()):,}. The two do not belong together."
        )
    return np.array(_map(bin_path, dtype, 0, num_tokens)[places])


def fit_tokens(tokens: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return the tokens in this type, refusing those that it cannot hold.

    Raises:
        ValueError: a token is outside the type's range.
    """
    if len(tokens):
        low, high = int(tokens.min()), int(tokens.max())
        limits = np.iinfo(dtype)
        if low < limits.min or high > limits.max:
            raise ValueError(
                f"token {high if high > limits.max else low} does not fit {dtype}, the type for "
                "this vocabulary size. The tokenizer gives out ids beyond its own vocab_size: "
                "check --tokenizer-model and --vocab-size."
            )
    return tokens.astype(dtype, copy=False)


def _code_of(dtype: np.dtype) -> int:
    for code, known in DTYPES.items():
        if known == dtype:
            return code
    raise ValueError(f"{dtype} is no token type of this format. Use uint16 or int32.")


def _read_header(path: str) -> tuple[np.dtype, int, int]:
    """Return the token type, the number of sequences and of documents, checked against the size."""
    with open(path, "rb") as file:
        head = file.read(HEADER.size)
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise ValueError(f"{path} is not an index of Megatron's: it does not start with MMIDIDX.")
    _, version, code, num_sequences, num_entries = HEADER.unpack(head)
    if version != VERSION or code not in DTYPES or not num_entries:
        raise ValueError(
            f"{path} has version {version}, token type {code} and {num_entries} document entries; "
            f"this reads version {VERSION} with token types 1 to 8 and at least one entry."
        )
    needed = HEADER.size + 12 * num_sequences + 8 * num_entries
    size = os.path.getsize(path)
    if size < needed:  # multimodal indices have one more byte per sequence
        raise ValueError(f"{path} has {size:,} bytes of {needed:,}: it was cut off. Copy it again.")
    return DTYPES[code], num_sequences, num_entries - 1


def _map(path: str, dtype: Any, offset: int, count: int) -> np.ndarray:
    """Map a part of a file; numpy refuses to map nothing at all."""
    if not count:
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))
