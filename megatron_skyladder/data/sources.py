"""What there is to read: JSON lines, Parquet and plain text, as batches in a fixed order.

A batch carries raw input, which the workers parse, and the place in the input where the next one
begins, so that a run can go on from any batch. Nothing here depends on the number of workers.
"""

from __future__ import annotations

import glob
import gzip
import importlib.util
import io
import logging
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

logger = logging.getLogger(__name__)

BATCH_BYTES = 512 * 1024
PARQUET_ROWS = 256
FORMATS = ("jsonl", "parquet", "text", "lines")
SUFFIXES = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
}
COMPRESSIONS = (".gz", ".zst")
# Not read: the names, and how such files begin. .zip and the like are archives of several files.
OTHER_COMPRESSIONS = (
    *(".xz", ".bz2", ".lz4", ".lzma", ".br", ".z", ".lz", ".lzo", ".sz", ".snappy"),
    *(".zip", ".7z", ".rar", ".tar", ".tgz", ".tbz2", ".txz"),
)
_BEGINNINGS = {
    b"\xfd7zXZ\0": "xz",
    b"BZh": "bzip2",
    b"\x04\x22\x4d\x18": "lz4",
    b"\x5d\0\0": "lzma",
    b"\x1f\x9d": "compress",
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xff\x06\0\0sNaPpY": "snappy",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!": "rar",
}
_TAR_MARK = slice(257, 262)
HEAD_BYTES = 512  # that tell a compression


class Place(NamedTuple):
    """Where in the input to go on.

    file: index into the list of input files.
    offset: in that file, uncompressed: bytes, or rows for Parquet.
    line: lines (rows) before it.
    """

    file: int = 0
    offset: int = 0
    line: int = 0


START = Place()


@dataclass(frozen=True)
class InputFile:
    """One file to read. ``name`` is what tells it apart where the folder above it moves."""

    path: Path
    name: str
    format: str
    num_bytes: int


@dataclass(frozen=True)
class Batch:
    """Raw input for one call of a worker.

    Attributes:
        format: one of FORMATS.
        payload: bytes of whole lines (jsonl, lines), or a list of rows (parquet: dicts) or of
            whole files (text: bytes).
        names: the file of each document (text), or the one file.
        first_line: lines before it in the file.
        next_place: where the batch after it begins.
        read_bytes: input bytes on disk up to here, for progress.
    """

    format: str
    payload: bytes | list[Any]
    names: list[str]
    first_line: int
    next_place: Place
    read_bytes: int

    def locate(self, item: int) -> str:
        """Return file and line of the batch's line, row or file ``item``, counted from 0."""
        if self.format == "text":
            return self.names[item]
        unit = "row " if self.format == "parquet" else ""
        return f"{self.names[0]}:{unit}{self.first_line + item + 1}"


def find_inputs(inputs: Iterable[str], input_format: str | None = None) -> list[InputFile]:
    """Return the files behind files, folders and glob patterns, in the order they are read.

    Arguments keep their order; a folder's files and a pattern's matches are sorted by path.
    Hidden files are left out, and in a folder also what is in none of the formats.

    Args:
        inputs: paths or patterns.
        input_format: one of FORMATS for all files; None goes by their names.

    Raises:
        ValueError: nothing is there, or a name tells no format.
    """
    files: list[InputFile] = []
    for given in inputs:
        found = _expand(given, input_format)
        if not found:
            raise ValueError(
                f"--input {given}: no such file, or nothing to read in it. Known names end in "
                f"{', '.join(SUFFIXES)}, with .gz or .zst after it where compressed; for others "
                f"give --input-format {{{','.join(FORMATS)}}}."
            )
        files += found
    return files


def read_batches(
    files: list[InputFile],
    keys: list[str],
    start: Place = START,
    batch_bytes: int | None = None,
) -> Iterator[Batch]:
    """Read the input in order, from a place an earlier `Batch` gave as its ``next_place``.

    Raises:
        ValueError: a file is damaged or lacks a column.
    """
    batch_bytes = batch_bytes or BATCH_BYTES
    read_before = sum(file.num_bytes for file in files[: start.file])
    index, texts = start.file, _TextGroup(batch_bytes)
    while index < len(files):
        file = files[index]
        begin = start if index == start.file else Place(index)
        try:
            if file.format == "text":
                texts.add(file, index, read_before)
                if texts.is_full or index + 1 == len(files) or files[index + 1].format != "text":
                    yield texts.take()
            elif file.format == "parquet":
                yield from _parquet_batches(file, begin, keys, read_before)
            else:
                yield from _line_batches(file, begin, batch_bytes, read_before)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(
                f"{file.path} cannot be read: {error}. Get it again; the work so far is kept."
            ) from error
        read_before += file.num_bytes
        index += 1


def compression_of(head: bytes) -> str | None:
    """Return the name of a compression by how a file begins; None: it does not look compressed."""
    found = (name for begin, name in _BEGINNINGS.items() if head.startswith(begin))
    return next(found, "tar" if head[_TAR_MARK] == b"ustar" else None)


def advice_on(compression: str) -> str:
    """Return what to do with a file that is compressed in a way, for messages."""
    if compression.lstrip(".") in ("gzip", "zstd"):
        suffix = {"gzip": ".gz", "zstd": ".zst"}[compression]
        return f"it is compressed ({compression}): give its name the ending {suffix}"
    return (
        f"it is compressed or packed ({compression}), which is not read here. Unpack it, or "
        "compress it with gzip (.gz) or zstd (.zst)"
    )


def _expand(given: str, input_format: str | None) -> list[InputFile]:
    path = Path(given)
    if path.is_dir():
        return _in_folder(path, input_format)
    matches = [path] if path.is_file() else map(Path, sorted(glob.glob(given, recursive=True)))
    files = [each for each in matches if each.is_file()]
    for each in files:
        if input_format != "text":
            _refuse_compressed(each, f"--input {each}")
    unknown = [each for each in files if not (input_format or format_of(each))]
    if unknown:
        raise ValueError(
            f"--input {unknown[0]}: its name does not tell the format. Give --input-format "
            f"{{{','.join(FORMATS)}}}."
        )
    return [_input_file(each, each.name, input_format or format_of(each)) for each in files]


def _in_folder(folder: Path, input_format: str | None) -> list[InputFile]:
    files, left_out = [], []
    for path in _files_below(folder):
        inside = path.relative_to(folder)
        if input_format in ("jsonl", "lines", "parquet") or format_of(_inner(path)):
            _refuse_compressed(path, str(path))
        if form := input_format or format_of(path):
            files.append(_input_file(path, inside.as_posix(), form))
        else:
            left_out.append(inside.as_posix())
    if left_out:
        logger.warning(
            "%s: left out %d files whose names tell no format, such as %s",
            folder,
            len(left_out),
            left_out[0],
        )
    return files


def _files_below(folder: Path) -> list[Path]:
    """Return the files in a folder and below it, sorted by path; nothing that is hidden.

    Links to folders are followed, each folder is read once: links may lead around in circles, and
    documents must not count twice. Where a folder is in its place as well, that path counts.
    """
    found: list[Path] = []
    read: set[tuple[int, int]] = set()
    repeated, unread = [], []
    waiting = [folder]
    while waiting:
        start, waiting = waiting[0], waiting[1:]
        links = []
        for place, names, files in os.walk(start, onerror=lambda e: unread.append(e.filename)):
            status = os.stat(place)
            # below the folder itself nothing repeats, whatever numbers its file system gives
            if start != folder and (status.st_dev, status.st_ino) in read:
                repeated.append(place)
                names.clear()
                continue
            read.add((status.st_dev, status.st_ino))
            names[:] = [name for name in names if not name.startswith(".")]
            links += [Path(place, name) for name in names if os.path.islink(f"{place}/{name}")]
            paths = [Path(place, name) for name in files if not name.startswith(".")]
            found += [path for path in paths if path.is_file()]
            unread.extend(str(path) for path in paths if path.is_symlink() and not path.exists())
        waiting += sorted(links)
    for left_out, why in (
        (repeated, "left out %d links to folders that are read under another path"),
        (unread, "%d folders or links cannot be read and are left out"),
    ):
        if left_out:
            logger.warning(f"%s: {why}, such as %s", folder, len(left_out), left_out[0])
    return sorted(found)


def format_of(path: Path) -> str:
    """Return the format a file name stands for, empty where it stands for none."""
    bare = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    return SUFFIXES.get(bare.suffix.lower(), "")


def _inner(path: Path) -> Path:
    """Return a name without the endings of compressions and archives."""
    while path.suffix.lower() in (*COMPRESSIONS, *OTHER_COMPRESSIONS):
        path = path.with_suffix("")
    return path


def _refuse_compressed(path: Path, what: str) -> None:
    """Refuse a file whose name says that it is compressed as nothing here reads it."""
    endings = [suffix.lower() for suffix in path.suffixes[len(_inner(path).suffixes) :]]
    unread = next((suffix for suffix in endings if suffix in OTHER_COMPRESSIONS), None)
    if unread:
        raise ValueError(f"{what}: {advice_on(unread)}.")
    if endings and format_of(_inner(path)) == "parquet":
        raise ValueError(
            f"{what}: Parquet compresses its columns itself, and is not read from within "
            f"{endings[-1]}. Decompress it."
        )


def _input_file(path: Path, name: str, input_format: str) -> InputFile:
    return InputFile(path, name, input_format, path.stat().st_size)


def _line_batches(
    file: InputFile, begin: Place, batch_bytes: int, read_before: int
) -> Iterator[Batch]:
    with open(file.path, "rb") as raw, _decompressed(raw, file.path) as stream:
        compression = compression_of(cast(Any, stream).peek(HEAD_BYTES)[:HEAD_BYTES])
        if compression is not None:
            raise ValueError(f"{file.path}: {advice_on(compression)}.")
        _skip(stream, begin.offset, is_plain=stream is raw)
        offset, line = begin.offset, begin.line
        while block := stream.read(batch_bytes):
            block += stream.readline()
            first, offset = line, offset + len(block)
            line += block.count(b"\n")
            yield Batch(
                format=file.format,
                payload=block,
                names=[str(file.path)],
                first_line=first,
                next_place=Place(begin.file, offset, line),
                read_bytes=read_before + raw.tell(),
            )


def _decompressed(raw: BinaryIO, path: Path) -> BinaryIO:
    """Return the stream of uncompressed bytes; a file that was cut off raises when it is read."""
    if path.suffix.lower() == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if path.suffix.lower() == ".zst":
        # not the zstandard package: its stream_reader takes a file that was cut off for whole
        arrow = _pyarrow("reading .zst")
        stream = arrow.CompressedInputStream(arrow.PythonFile(raw, mode="r"), "zstd")
        return io.BufferedReader(stream, 1 << 20)
    return raw


def _skip(stream: BinaryIO, num_bytes: int, *, is_plain: bool) -> None:
    if is_plain:
        stream.seek(num_bytes)
        return
    while num_bytes:
        passed = len(stream.read(min(num_bytes, 1 << 22)))
        if not passed:
            raise EOFError("it is shorter than when the run began")
        num_bytes -= passed


def _parquet_batches(
    file: InputFile, begin: Place, keys: list[str], read_before: int
) -> Iterator[Batch]:
    """Read the wanted columns, one row group at a time; those before the place are not touched."""
    arrow = _pyarrow("reading Parquet")
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file.path) as table:
            _check_columns(table, keys, file.path)
            num_rows = max(1, table.metadata.num_rows)
            for first, rows in _parquet_rows(table, keys, begin.offset):
                end = first + len(rows)
                yield Batch(
                    format="parquet",
                    payload=rows,
                    names=[str(file.path)],
                    first_line=first,
                    next_place=Place(begin.file, end, end),
                    read_bytes=read_before + file.num_bytes * end // num_rows,
                )
    except arrow.ArrowException as error:
        raise OSError(str(error)) from error


def _check_columns(table: Any, keys: list[str], path: Path) -> None:
    columns = table.schema_arrow.names
    missing = [key for key in keys if key not in columns]
    if missing:
        raise ValueError(
            f"{path} has no column {missing[0]!r}; it has {', '.join(columns)}. Give --json-keys."
        )


def _parquet_rows(table: Any, keys: list[str], begin: int) -> Iterator[tuple[int, list[Any]]]:
    """Yield (first row, rows) from row ``begin`` on."""
    row = 0
    for group in range(table.num_row_groups):
        group_rows = table.metadata.row_group(group).num_rows
        if row + group_rows <= begin:
            row += group_rows
            continue
        for part in table.iter_batches(PARQUET_ROWS, row_groups=[group], columns=keys):
            skipped = min(max(0, begin - row), part.num_rows)
            if skipped < part.num_rows:
                yield row + skipped, part.slice(skipped).to_pylist()
            row += part.num_rows


class _TextGroup:
    """Collects small text files, so that a folder of many does not cost a call each."""

    def __init__(self, batch_bytes: int) -> None:
        self._batch_bytes = batch_bytes
        self._texts: list[bytes] = []
        self._names: list[str] = []
        self._held_bytes = 0
        self._next, self._read_bytes = Place(), 0

    def add(self, file: InputFile, index: int, read_before: int) -> None:
        with open(file.path, "rb") as raw, _decompressed(raw, file.path) as stream:
            self._texts.append(stream.read())
        self._held_bytes += len(self._texts[-1])
        self._names.append(str(file.path))
        self._next, self._read_bytes = Place(index + 1), read_before + file.num_bytes

    @property
    def is_full(self) -> bool:
        return self._held_bytes >= self._batch_bytes

    def take(self) -> Batch:
        texts, names = self._texts, self._names
        self._texts, self._names, self._held_bytes = [], [], 0
        return Batch("text", texts, names, 0, self._next, self._read_bytes)


def _pyarrow(purpose: str) -> Any:
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"{purpose} needs pyarrow: pip install pyarrow.")
    import pyarrow

    return pyarrow
