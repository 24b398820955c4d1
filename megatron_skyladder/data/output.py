"""Outputs that grow in step with a place in the input, and survive being killed.

A journal beside the outputs notes, every few seconds, how far the input has been read and how much
of each output that stands for. Whatever was written after the last note is cut off and made again,
so no document is lost or doubled.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from megatron_skyladder.data.encode import Documents
from megatron_skyladder.data.identity import differences
from megatron_skyladder.data.indexed import IndexedWriter, WriterPosition, count_empty
from megatron_skyladder.data.record import (
    is_remainder,
    misfit,
    read_record,
    record_path,
    write_record,
)
from megatron_skyladder.data.sources import START, Place
from megatron_skyladder.errors import UsageError
from megatron_skyladder.files import lock

logger = logging.getLogger(__name__)

COMMIT_SECONDS = 5.0


class Journal:
    """Notes of a run, one JSON object per line: the settings, then how far it got.

    Holding it open is the right to write the outputs: a second run is refused.

    Args:
        path: created where it does not exist.
        settings: what decides the output; an earlier run's must be the same.
        same_input: see `identity.differences`.

    Raises:
        UsageError: its file system has no locks.
        ValueError: another run holds it, or its settings differ.
    """

    def __init__(self, path: Path, settings: dict[str, Any], *, same_input: bool = False) -> None:
        self.path = path
        self._same_input = same_input
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b")  # noqa: SIM115 (close)
        try:
            self._lock()
            notes = self._whole_notes()
            if not notes:
                self.note({"settings": settings})
            else:
                self._compare(notes[0]["settings"], settings)
        except BaseException:
            self._file.close()
            raise
        self.last: dict[str, Any] | None = notes[-1] if len(notes) > 1 else None

    def note(self, entry: dict[str, Any]) -> None:
        """Append one line and bring it onto the disk."""
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        """Forget the run: it is finished."""
        self.path.unlink(missing_ok=True)
        self.close()

    def _lock(self) -> None:
        try:
            lock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, self.path)
        except UsageError:
            if not os.path.getsize(self.path):  # made just now
                self.path.unlink()
            raise
        except BlockingIOError:
            raise ValueError(
                f"{self.path} is in use: another skyladder prepare is writing this output. Wait "
                "for it, or stop it, or give another --output-prefix."
            ) from None

    def _whole_notes(self) -> list[dict[str, Any]]:
        """Return the notes, and cut off a last line that a kill left unfinished."""
        self._file.seek(0)
        whole = self._file.read().rpartition(b"\n")[0].splitlines(keepends=True)
        self._file.truncate(sum(len(line) for line in whole) + (1 if whole else 0))
        return [json.loads(line) for line in whole]

    def _compare(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        different = differences(before, now, same_input=self._same_input)
        if different:
            raise ValueError(
                f"{self.path} belongs to an unfinished run with other settings: "
                f"{'; '.join(different)}. Give that run's settings to continue it, or delete "
                f"{self.path} to start over."
            )


class ResumableOutput:
    """The .bin/.idx pairs of one run, one for each key: ``PREFIX_KEY_document``.

    Args:
        prefix: the run's --output-prefix.
        keys: names of the outputs.
        dtype: type of the stored tokens.
        settings: what decides the output, plain JSON values.
        same_input: see `identity.differences`.

    Attributes:
        place: where in the input to go on; `START` for a new run.
        counts: what the caller counts, kept across kills.

    Raises:
        ValueError: see `Journal` and `IndexedWriter`.
    """

    def __init__(
        self,
        prefix: str,
        keys: list[str],
        dtype: np.dtype,
        settings: dict[str, Any],
        *,
        same_input: bool = False,
    ) -> None:
        self.settings = settings
        self.prefixes = output_prefixes(prefix, keys)
        self._folder = os.path.dirname(prefix)
        self._journal = Journal(journal_path(prefix), settings, same_input=same_input)
        last = self._journal.last or {"place": START, "counts": {}, "outputs": {}}
        self.place = Place(*last["place"])
        self.counts: Counter[str] = Counter(last["counts"])
        self._positions = {
            key: WriterPosition(*position) for key, position in last["outputs"].items()
        }
        self._writers: dict[str, IndexedWriter] = {}
        try:
            for key, path in self.prefixes.items():
                if not (self.is_resumed and _is_closed(path)):
                    resume_at = self._positions.get(key)
                    self._writers[key] = IndexedWriter(path, dtype, resume_at=resume_at)
        except BaseException:
            self.close()
            raise
        self._committed_at = time.monotonic()
        if self.is_resumed:
            logger.info("going on after %d tokens of an earlier run", self.num_tokens)

    @property
    def journal(self) -> Path:
        """The journal's file."""
        return self._journal.path

    @property
    def is_resumed(self) -> bool:
        """Whether an earlier run's work is being continued."""
        return bool(self._positions)

    @property
    def num_tokens(self) -> int:
        """Tokens in all outputs."""
        return sum(position.num_tokens for position in self.positions.values())

    @property
    def positions(self) -> dict[str, WriterPosition]:
        """How much each output holds."""
        now = {key: writer.position for key, writer in self._writers.items()}
        return {**self._positions, **now}

    def add(self, documents: dict[str, Documents], next_place: Place, **counts: int) -> None:
        """Append what was made of the input up to next_place, and commit now and then."""
        for key, writer in self._writers.items():
            writer.add_documents(*documents[key])
        self.place = next_place
        self.counts.update(counts)
        if time.monotonic() - self._committed_at >= COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Make everything so far safe."""
        for key, writer in self._writers.items():
            self._positions[key] = writer.flush()
        self._journal.note({"place": self.place, "counts": self.counts, "outputs": self._positions})
        self._committed_at = time.monotonic()

    def finish(self) -> list[dict[str, Any]]:
        """Give the outputs their names, write a record beside each and return the records."""
        self.commit()
        for writer in self._writers.values():
            writer.close()
        records = []
        for key, path in self.prefixes.items():
            record = {
                "settings": self.settings,
                "output": os.path.relpath(path, self._folder or None),
                "tokens": self._positions[key].num_tokens,
                "documents": self._positions[key].num_documents,
                **self.counts,
                "empty": count_empty(path),  # of this key: the counts are of the input
            }
            write_record(path, record)
            records.append(record)
        self._journal.remove()
        return records

    def close(self) -> None:
        """Let go of the files; the journal stays for a later run, where there is work to keep."""
        for writer in self._writers.values():
            writer.abandon()
        if self._writers and not self.num_tokens:
            for path in partial_files(self.prefixes.values()):
                path.unlink(missing_ok=True)
            self._journal.remove()
        self._journal.close()


@contextmanager
def opened(output: ResumableOutput) -> Iterator[ResumableOutput]:
    """Let go of an output at the end of a block, and say what is left where it ends early."""
    try:
        with closing(output):
            yield output
    except BaseException:
        files = partial_files(output.prefixes.values())
        if output.journal.exists() and files:
            logger.warning(
                "the work so far is kept in %s and %s: the same command goes on from there; delete "
                "them to start over",
                output.journal,
                ", ".join(map(str, files)),
            )
        raise


def output_prefixes(prefix: str, keys: list[str]) -> dict[str, str]:
    """Return the path of each output without .bin/.idx, named as Megatron's tool names them."""
    return {key: f"{prefix}_{key}_document" for key in keys}


def journal_path(prefix: str) -> Path:
    return Path(f"{prefix}.prepare.journal")


def partial_files(prefixes: Iterable[str]) -> list[Path]:
    """Return the files that an unfinished run keeps its work in."""
    parts = ("bin", "idx", "lengths", "documents")
    files = (Path(f"{prefix}.{part}.partial") for prefix in prefixes for part in parts)
    return [file for file in files if file.exists()]


def finished_records(
    prefix: str, keys: list[str], settings: dict[str, Any], *, same_input: bool = False
) -> list[dict[str, Any]] | None:
    """Return the records of an earlier run with these settings that is finished, else None.

    A pair of which a file is missing or cut off since is to be prepared anew, from the same input.

    Raises:
        ValueError: the outputs are there already, but made otherwise, or others than were noted.
    """
    if journal_path(prefix).exists():
        return None
    paths = output_prefixes(prefix, keys).values()
    there = [path for path in paths if Path(f"{path}.bin").exists() or Path(f"{path}.idx").exists()]
    if not there:
        return None
    records = {path: record for path in paths if (record := read_record(path))}
    different = [
        each
        for record in records.values()
        for each in differences(record["settings"], settings, same_input=same_input)
    ]
    if len(records) < len(keys) or different:
        why = f": {'; '.join(dict.fromkeys(different))}" if different else ""
        raise ValueError(
            f"{there[0]}.bin/.idx exist already and were made from other input or with other "
            f"settings{why}. Delete them, or give another --output-prefix."
        )
    misfits = {path: why for path, record in records.items() if (why := misfit(path, record))}
    for path, why in misfits.items():
        if not is_remainder(path, records[path]):
            raise ValueError(
                f"{path}.bin/.idx are not the pair that {record_path(path)} is of: "
                f"{why.rstrip('.')}. Something else was put there since. Move it away to prepare "
                "the data again, or give another --output-prefix."
            )
    for path, why in misfits.items():
        logger.warning("%s was prepared before and is prepared anew: %s", path, why)
    return None if misfits else list(records.values())


def _is_closed(prefix: str) -> bool:
    """Whether a writer got as far as giving both files their names; tidies up after it."""
    partial = (Path(f"{prefix}.{part}.partial") for part in ("bin", "idx"))
    # the .idx may be an earlier pair's, which is prepared anew: then the new one is still partial
    is_closed = Path(f"{prefix}.idx").exists() and not any(file.exists() for file in partial)
    if is_closed:
        for part in ("lengths", "documents"):
            Path(f"{prefix}.{part}.partial").unlink(missing_ok=True)
    return is_closed
